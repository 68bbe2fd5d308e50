"""Holds a validated config against the support table: which keys ask for something refused, which were given in vain.

A block that is switched off asks for nothing, whatever else it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deepspeed.config.base import Section
from deepspeed.config.model_runtime import Compile, TensorParallel
from deepspeed.config.support import SUPPORT, Support, support_of

__all__ = ["ignored_keys", "refused_keys"]


def _switch(section: Section) -> str | None:
    """The on/off key of a section, None when it has none."""
    if isinstance(section, TensorParallel):
        return "autotp_size"
    if isinstance(section, Compile):
        return "deepcompile"
    return "enabled" if "enabled" in type(section).model_fields else None


def _is_off(section: Section) -> bool:
    if isinstance(section, TensorParallel):
        return section.autotp_size <= 1 and section.tensor_parallel.tp_size == 1
    switch = _switch(section)
    return switch is not None and not getattr(section, switch)


def _default(section: Section, name: str) -> Any:
    return type(section).model_fields[name].get_default(call_default_factory=True)


def refused_keys(section: Section, prefix: str = "") -> Iterator[tuple[str, Any, Support]]:
    """The keys that ask for something unsupported: (path, value, entry). Blocks that are switched off ask for
    nothing.
    """
    for name in type(section).model_fields:
        path, value, default = f"{prefix}{name}", getattr(section, name), _default(section, name)
        if isinstance(value, Section):
            whole = SUPPORT.get(f"{path}.*")
            if _is_off(value):
                continue
            if whole is None or whole.status != "unsupported" or (default is not None and _switch(value) is None):
                yield from refused_keys(value, f"{path}.")
            else:
                switch = _switch(value)
                yield (f"{path}.{switch}", getattr(value, switch), whole) if switch else (path, "{...}", whole)
        elif support_of(path).status == "unsupported" and value != default and not _harmless(path, value):
            yield path, value, support_of(path)


def _harmless(path: str, value: Any) -> bool:
    """Values other than the default that still ask for nothing."""
    if isinstance(value, dict):
        return not _asks(value)
    return False


def _asks(block: Mapping[str, Any]) -> bool:
    """Whether an unchecked block has a feature on: an `enabled` is true, or it has no such switch and is not empty."""
    switches = list(_enabled(block))
    return any(switches) if switches else bool(block)


def _enabled(block: Mapping[str, Any]) -> Iterator[bool]:
    for key, value in block.items():
        if key == "enabled":
            yield bool(value)
        elif isinstance(value, Mapping):
            yield from _enabled(value)


def ignored_keys(section: Section, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys that the user set and that are documented no-ops: (path, reason). Defaults and blocks that are off
    are passed over.
    """
    for name in type(section).model_fields:
        path, value = f"{prefix}{name}", getattr(section, name)
        if isinstance(value, Section):
            if not _is_off(value):
                yield from ignored_keys(value, f"{path}.")
        elif (
            name in section.model_fields_set and support_of(path).status == "no-op" and value != _default(section, name)
        ):
            yield path, support_of(path).note
