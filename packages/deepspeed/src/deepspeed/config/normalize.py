"""From what a user may write to upstream's canonical keys: the only place that knows "auto", aliases and deprecated
forms.

    raw dict  ->  [copy] -> ["auto" and empty blocks dropped] -> [aliases] -> [deprecated forms]  ->  canonical dict
    + what was done

Pure: no validation of values (that is the models' work), no logging; the raw dict is never touched. "auto" means "no
wish": the key is dropped and its default (or derived value) holds, everywhere, since a client such as transformers
leaves it where it had no value to fill in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepspeed.config.keys import ALIASES
from deepspeed.errors import ConfigConflictError, DeepSpeedConfigError

__all__ = ["Normalized", "normalize"]


@dataclass
class Normalized:
    """A config in canonical keys, and how it came to be."""

    data: dict[str, Any]
    written: dict[str, str] = field(default_factory=dict)
    """Canonical path -> the path as written, where they differ."""
    auto: dict[str, str] = field(default_factory=dict)
    """Canonical path of each key that said "auto" -> the path as written."""
    notes: list[str] = field(default_factory=list)
    """Deprecation warnings, one line each."""

    def as_written(self, path: str) -> str:
        """How the user spelt the key at canonical `path`."""
        names = path.split(".")
        for length in range(len(names), 0, -1):
            prefix = ".".join(names[:length])
            if prefix in self.written:
                return ".".join([self.written[prefix], *names[length:]])
        return path


def normalize(raw: Mapping[str, Any]) -> Normalized:
    """Canonical form of a config. Raises DeepSpeedConfigError for keys that are no strings, ConfigConflictError for
    one thing said twice.
    """
    result = Normalized({})
    result.data = _clean(raw, "", "", result)
    for section, names in ALIASES.items():
        block = result.data.get(section) if section else result.data
        if isinstance(block, dict):
            _rename(block, section, names, result)
    _legacy_zero(result)
    return result


def _clean(raw: Mapping[str, Any], prefix: str, canonical: str, result: Normalized) -> dict[str, Any]:
    """A copy without "auto" values; a top-level null is an absent key. `canonical` is `prefix` in upstream's names."""
    made: dict[str, Any] = {}
    names = ALIASES.get(canonical.rstrip("."), {})
    for key, value in raw.items():
        if not isinstance(key, str):
            raise DeepSpeedConfigError(f"{prefix}{key!r}: config keys are strings, this one is {type(key).__name__}")
        name = f"{canonical}{names.get(key, key)}"
        if isinstance(value, str) and value == "auto":
            result.auto[name] = f"{prefix}{key}"
        elif isinstance(value, Mapping):
            made[key] = _clean(value, f"{prefix}{key}.", f"{name}.", result)
        elif value is not None or prefix:
            made[key] = value
    return made


def _rename(block: dict[str, Any], section: str, names: Mapping[str, str], result: Normalized) -> None:
    prefix = f"{section}." if section else ""
    for alias, key in names.items():
        if alias not in block:
            continue
        if key in block:
            raise ConfigConflictError(
                f"{prefix}{alias} and {prefix}{key} are two names of one key and both are given "
                f"({block[alias]!r} and {block[key]!r}); keep {prefix}{key}"
            )
        block[key] = block.pop(alias)
        result.written[f"{prefix}{key}"] = f"{prefix}{alias}"
        if alias == "stage3_gather_fp16_weights_on_model_save":
            result.notes.append(f"{prefix}{alias} is deprecated; use {prefix}{key}")


def _legacy_zero(result: Normalized) -> None:
    """`"zero_optimization": true` (with top-level allgather_size), and the cpu_offload switches."""
    zero = result.data.get("zero_optimization")
    if isinstance(zero, bool):
        result.notes.append(f'"zero_optimization": {str(zero).lower()} is deprecated; use {{"stage": {int(zero)}}}')
        block: dict[str, Any] = {"stage": int(zero)}
        size = result.data.get("allgather_size")
        if zero and size is not None:
            block["allgather_bucket_size"] = size
            result.written["zero_optimization.allgather_bucket_size"] = "allgather_size"
        result.written["zero_optimization.stage"] = "zero_optimization"
        result.data["zero_optimization"] = block
    elif isinstance(zero, dict):
        for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
            wanted = zero.pop(old, None)
            if wanted is None:
                continue
            if not isinstance(wanted, bool):
                raise DeepSpeedConfigError(
                    f"zero_optimization.{old}: got {wanted!r}; expected true or false, or better a {new} block"
                )
            if zero.get(new) is not None:
                raise ConfigConflictError(
                    f"zero_optimization.{old} (deprecated) and zero_optimization.{new} are both given; keep {new}"
                )
            zero[new] = {"device": "cpu" if wanted else "none"}
            result.written[f"zero_optimization.{new}.device"] = f"zero_optimization.{old}"
            result.notes.append(f'zero_optimization.{old} is deprecated; use {new}: {{"device": "cpu"}}')
