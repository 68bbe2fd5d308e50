"""Packages whose names are imported on first use (PEP 562), and the sentences for names that upstream has and we lack.

A package says in one table which module each of its public names comes from; `attach` turns the table into its
`__getattr__` and `__dir__`. A name that was used once is an ordinary attribute afterwards, so that
`unittest.mock.patch` and identity tests work as on any module.

What upstream has and this release has not stands in `_absent`, which is loaded when such a name is asked for:
`AbsentModules` answers imports of modules, `attach` and `explain_absent` reads of attributes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

_ROOT = __name__.partition(".")[0]


def attach(
    package: str, names: Mapping[str, str], submodules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the `__getattr__` and `__dir__` of `package`.

    Args:
        names: attribute -> "module:attribute", or "module" for the module itself.
        submodules: children of the package that are importable as attributes.
    """
    targets = {**names, **{child: f"{package}.{child}" for child in submodules}}

    def get(name: str) -> Any:
        if name in targets:
            module, _, attribute = targets[name].partition(":")
            value: Any = importlib.import_module(module)
            value = getattr(value, attribute) if attribute else value
            setattr(sys.modules[package], name, value)
            return value
        raise AttributeError(f"module {package!r} has no attribute {name!r}{_reason(package, name)}")

    def names_of() -> list[str]:
        return sorted({*vars(sys.modules[package]), *targets})

    return get, names_of


def explain_absent(module: str) -> None:
    """Give a module, after its last name, a `__getattr__` that raises the sentences of `_absent`.

    It raises an AttributeError with the sentence of the name; to `from module import name`, which would drop that
    text, an ImportError. Set from outside, so that type checkers go on finding misspelt names.
    """

    def get(name: str) -> Any:
        reason = _reason(module, name)
        frame = sys._getframe(1)
        if reason and _imports_by_name(frame.f_code.co_code[frame.f_lasti]):
            raise ImportError(f"cannot import name {name!r} from {module!r}{reason}", name=module)
        raise AttributeError(f"module {module!r} has no attribute {name!r}{reason}")

    vars(sys.modules[module])["__getattr__"] = get


def _imports_by_name(operation: int) -> bool:
    from opcode import opmap

    return operation == opmap["IMPORT_FROM"]


def _reason(module: str, name: str) -> str:
    """ ": " and the sentence of a name, or nothing when upstream has no such name either."""
    if name.startswith("__"):
        return ""
    from deepspeed._absent import CONSTANT, NAMES

    below = module.removeprefix(_ROOT).removeprefix(".")
    known = NAMES.get(below, {}).get(name) or _module_reason(f"{below}.{name}".removeprefix("."))
    if known is None and below and name.isupper():
        known = CONSTANT
    return f": {known}" if known else ""


def _module_reason(below: str) -> str | None:
    from deepspeed._absent import MODULES

    while below not in MODULES and below:
        below = below.rpartition(".")[0]
    return MODULES.get(below)


class AbsentModules:
    """The last finder of `sys.meta_path`: `import deepspeed.nvme` raises the sentence that says what replaces it."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> None:
        """Find nothing, and say why when upstream has the module.

        Raises:
            ModuleNotFoundError: with the sentence. It bears no `name`: the import system would swallow it otherwise
                where the module is imported by `from package import module`.
        """
        if fullname.startswith(f"{_ROOT}."):
            package, _, name = fullname.rpartition(".")
            below = fullname.removeprefix(f"{_ROOT}.")
            reason = _module_reason(below) or _reason(package, name).removeprefix(": ")
            if reason:
                raise ModuleNotFoundError(f"no module or name {fullname!r}: {reason}")


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
