"""Packages whose names are imported on first use (PEP 562).

A package says in one table which module each of its public names comes from; `attach` turns the table into its
`__getattr__` and `__dir__`. A name that was used once is an ordinary attribute afterwards, so that
`unittest.mock.patch` and identity tests work as on any module.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any


def attach(
    package: str,
    names: Mapping[str, str],
    submodules: Iterable[str] = (),
    later: Mapping[str, str] | None = None,
    gone: Mapping[str, str] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the `__getattr__` and `__dir__` of `package`.

    Args:
        names: attribute -> "module:attribute", or "module" for the module itself.
        submodules: children of the package that are importable as attributes.
        later: attribute -> where it will come from; using it raises an AttributeError that says so.
        gone: attribute -> what to use instead of it; likewise.
    """
    targets = {**names, **{child: f"{package}.{child}" for child in submodules}}

    def get(name: str) -> Any:
        if name in targets:
            module, _, attribute = targets[name].partition(":")
            value: Any = importlib.import_module(module)
            value = getattr(value, attribute) if attribute else value
            setattr(sys.modules[package], name, value)
            return value
        reason = f": it comes with {later[name]}" if later and name in later else ""
        reason = f": {gone[name]}" if gone and name in gone else reason
        raise AttributeError(f"module {package!r} has no attribute {name!r}{reason}")

    def names_of() -> list[str]:
        return sorted({*vars(sys.modules[package]), *targets})

    return get, names_of


class FunctionsOverModules(ModuleType):
    """A package with a submodule that bears the name of the function in it, such as `deepspeed.initialize`.

    The import system binds every submodule to its package after loading it. Here the function wins: callers of
    `deepspeed.initialize(...)` must not depend on who imported which module first.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and value.__name__ == f"{self.__name__}.{name}":
            inner = getattr(value, name, None)
            value = inner if callable(inner) else value
        super().__setattr__(name, value)
