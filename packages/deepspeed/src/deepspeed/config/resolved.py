"""The resolved config: what the engine and everything else read. Frozen, complete, printable with the origin of
every value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import PrivateAttr

from deepspeed.config.base import FloatDtype, Positive, Section
from deepspeed.config.batch import BATCH_KEYS
from deepspeed.config.keys import known_keys
from deepspeed.config.model import ConfigModel

__all__ = ["ResolvedConfig"]


class ResolvedConfig(ConfigModel):
    """A `ConfigModel` without open questions: batch sizes are ints, derived values are filled in. Made by `resolve`
    only.
    """

    train_batch_size: Positive
    """Samples per optimizer step over all ranks."""
    train_micro_batch_size_per_gpu: Positive
    """Samples per forward pass of one rank."""
    gradient_accumulation_steps: Positive
    """Micro-batches per optimizer step."""
    communication_data_type: FloatDtype
    """Dtype in which gradients travel."""
    dp_world_size: Positive
    """Data-parallel ranks that the batch sizes were solved for."""
    model_dtype: Literal["fp32", "bf16", "fp16"]
    """Dtype of the model, from fp16.enabled and bf16.enabled."""

    _raw: Mapping[str, Any] = PrivateAttr(default_factory=dict)
    _origin: str = PrivateAttr(default="config")
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    def with_context(self, raw: Mapping[str, Any], origin: str, sources: Mapping[str, str]) -> ResolvedConfig:
        """The same values with what they were made of."""
        made = self.model_copy()
        made._raw, made._origin, made._sources = raw, origin, dict(sources)
        return made

    @property
    def raw(self) -> Mapping[str, Any]:
        """The user's own dict (the object given, not a copy), or the content of the file."""
        return self._raw

    @property
    def origin(self) -> str:
        """Where the config came from: "config dict", "file ds.json", ..."""
        return self._origin

    @property
    def sources(self) -> Mapping[str, str]:
        """Dotted key -> "file ds.json: key", "default", "derived: why" or "argument"."""
        return MappingProxyType(self._sources)

    def given(self, path: str) -> bool:
        """Whether somebody set the key, or any key of the section, at `path`; "auto" does not count."""
        return any(
            not source.startswith(("default", "derived"))
            for key, source in self._sources.items()
            if key == path or key.startswith(f"{path}.")
        )

    def with_batch(
        self, *, train_batch_size: int | None = None, train_micro_batch_size_per_gpu: int | None = None
    ) -> ResolvedConfig:
        """Another batch at run time: a new total changes the accumulation steps, a new micro-batch changes the total.

        Raises ValueError if the total is no multiple of micro-batch times ranks, or a size is less than 1.
        """
        micro = train_micro_batch_size_per_gpu or self.train_micro_batch_size_per_gpu
        unit = micro * self.dp_world_size
        total = unit * self.gradient_accumulation_steps if train_batch_size is None else train_batch_size
        if micro < 1 or total < 1 or total % unit != 0:
            raise ValueError(
                f"train_batch_size {total} is not divisible by micro-batch {micro} x {self.dp_world_size} ranks = "
                f"{unit}; choose a multiple of it"
            )
        values = dict(zip(BATCH_KEYS, (total, micro, total // unit), strict=True))
        changed = {key: "set at run time" for key, value in values.items() if value != getattr(self, key)}
        return self.model_copy(update=values).with_context(self._raw, self._origin, {**self._sources, **changed})

    def values(self) -> Iterator[tuple[str, Any]]:
        """(dotted key, value) of every key; a block that was not given counts as one value, None."""
        for key in known_keys(ConfigModel):
            parent = _at(self, key.path.rpartition(".")[0])
            if isinstance(parent, Section):
                value = getattr(parent, key.path.rpartition(".")[2])
                if not isinstance(value, Section):
                    yield key.path, value

    def explain(self, *, defaults: bool = True) -> str:
        """One line per key: `key = value  <- where it came from`. `defaults=False` leaves out what nobody chose."""
        rows = [(path, repr(value), self._sources.get(path, "default")) for path, value in self.values()]
        shown = [row for row in rows if defaults or row[2] != "default"]
        wide, deep = (max((len(row[i]) for row in shown), default=0) for i in (0, 1))
        head = (
            f"DeepSpeed config from {self._origin}, {self.dp_world_size} data-parallel ranks, {self.model_dtype} model"
        )
        return "\n".join(
            [head, *(f"  {path:<{wide}} = {value:<{min(deep, 40)}}  <- {source}" for path, value, source in shown)]
        )

    def __str__(self) -> str:
        return self.explain(defaults=False)


def _at(config: Section, path: str) -> Any:
    value: Any = config
    for name in path.split(".") if path else ():
        value = getattr(value, name, None)
    return value
