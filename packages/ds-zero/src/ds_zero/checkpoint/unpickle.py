"""Reading upstream's .pt files without running what is in them.

A pickle is a program: loading one may import any module and call anything in it. `load_inert` therefore builds only
tensors, numbers, strings and containers; every other class or function that the pickle names becomes an `Inert`
object, which records how it would have been built and does nothing. Neither upstream nor the user's classes need to
be importable. The format stays a risk (a defect in the unpickler itself), hence the explicit opt-in.
"""

from __future__ import annotations

import os
import pickle
import types
from pathlib import Path
from typing import Any

import torch

from ds_zero.errors import CheckpointError

__all__ = ["ALLOW_PICKLE_ENV", "Inert", "check_allowed", "load_inert"]

ALLOW_PICKLE_ENV = "DEEPSPEED_ALLOW_PICKLE"

_SAFE = {
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("collections", "deque"),
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("builtins", "complex"),
    ("builtins", "bytearray"),
    ("builtins", "slice"),
    ("builtins", "range"),
    ("builtins", "dict"),
    ("builtins", "list"),
    ("builtins", "tuple"),
    ("builtins", "int"),
    ("builtins", "float"),
    ("builtins", "str"),
    ("builtins", "bool"),
    ("_codecs", "encode"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.serialization", "_get_layout"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
}


class Inert:
    """Stands for an object of a class that was not imported; `inert_class` names it, attributes are its state."""

    inert_class = ""
    inert_args: tuple[Any, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = object.__new__(cls)
        self.__dict__["inert_args"] = args
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept whatever the pickle passes."""

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__.setdefault("inert_items", []).append((key, value))

    def append(self, value: Any) -> None:
        self.__dict__.setdefault("inert_items", []).append(value)

    def extend(self, values: Any) -> None:
        self.__dict__.setdefault("inert_items", []).extend(values)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<{self.inert_class} (not imported)>"


def _rebuild_without_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """torch's _rebuild_from_type_v2 for tensors with attributes: the tensor alone."""
    return function(*args)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _SAFE:
            return super().find_class(module, name)
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _rebuild_without_type
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name.rpartition(".")[2], (Inert,), {"inert_class": f"{module}.{name}"})


def _load(file: Any, **kwargs: Any) -> Any:
    return _Unpickler(file, **kwargs).load()


_PICKLE_MODULE = types.ModuleType("inert_pickle")
_PICKLE_MODULE.Unpickler = _Unpickler  # type: ignore[attr-defined]
_PICKLE_MODULE.load = _load  # type: ignore[attr-defined]


def check_allowed(path: Path, allow_pickle: bool | None) -> None:
    """CheckpointError that explains the risk unless the caller, or DEEPSPEED_ALLOW_PICKLE=1, opted in."""
    allowed = os.environ.get(ALLOW_PICKLE_ENV, "") in ("1", "true", "True") if allow_pickle is None else allow_pickle
    if not allowed:
        raise CheckpointError(
            f"{path} was written by upstream DeepSpeed as Python pickles. A pickle that you do not trust can run code "
            "when it is read; this reader is restricted and imports and calls nothing from it, but the choice is "
            f"yours: pass allow_pickle=True (or set {ALLOW_PICKLE_ENV}=1) if you trust these files"
        )


def load_inert(path: Path) -> Any:
    """The content of a torch.save file, tensors memory-mapped, foreign objects as `Inert`."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_PICKLE_MODULE)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except Exception as error:  # torch and pickle raise many kinds for a damaged file
        raise CheckpointError(
            f"{path} cannot be read as a torch.save file ({type(error).__name__}: {error})"
        ) from error
