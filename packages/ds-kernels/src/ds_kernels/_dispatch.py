"""Which backend runs an operation: the tensor's device decides, `use_backend` overrides.

Backends:
    reference   plain torch, the specification; runs anywhere, in the precision of its inputs' definition
    cpu         torch's fused operations, numba loops (extra `ds-kernels[cpu]`) where those are faster
    triton      GPU kernels; on CPU tensors only in Triton's interpreter (environment TRITON_INTERPRET=1)

The override is one value per process, not per thread: autograd runs backward passes of GPU tensors in threads of its
own, and they must take the backend that the forward pass took. Nothing here imports triton or probes a device before
an operation is called.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ds_kernels.errors import BackendError

__all__ = [
    "BACKENDS",
    "HAS_TRITON",
    "available_backends",
    "backend_for",
    "implementation",
    "interpreting",
    "use_backend",
]

BACKENDS = ("reference", "cpu", "triton")
HAS_TRITON: bool = importlib.util.find_spec("triton") is not None
"""Whether triton is installed (it need not be usable: see `available_backends`)."""

_forced: str | None = None


def interpreting() -> bool:
    """Whether Triton's interpreter was asked for, which runs kernels on CPU tensors (slowly, for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available_backends() -> tuple[str, ...]:
    """The backends that can run on this machine now."""
    triton = HAS_TRITON and (interpreting() or torch.cuda.is_available())
    return BACKENDS if triton else BACKENDS[:2]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation inside by one backend, in this whole process.

    Raises:
        BackendError: no backend of this name, or it cannot run here.
    """
    global _forced
    if name not in available_backends():
        known = "is not usable here" if name in BACKENDS else "is unknown"
        hint = " (triton needs a GPU, or TRITON_INTERPRET=1 for its interpreter)" if name == "triton" else ""
        raise BackendError(f"backend {name!r} {known}; available are {', '.join(available_backends())}{hint}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def backend_for(tensor: Tensor) -> str:
    """The backend of an operation on this tensor.

    Raises:
        BackendError: `use_backend` asked for one that cannot take tensors of this device.
    """
    device = tensor.device.type
    if _forced is not None:
        if (_forced == "cpu" and device != "cpu") or (_forced == "triton" and device == "cpu" and not interpreting()):
            raise BackendError(f"use_backend({_forced!r}) cannot run on a tensor of device {device!r}")
        return _forced
    if device == "cpu":
        return "cpu"
    return "triton" if HAS_TRITON and device in ("cuda", "xpu") else "reference"


def implementation(op: str, tensor: Tensor) -> Any:
    """The module `ds_kernels.ops.<op>.<backend>` of the backend for this tensor; all of them have the same functions.

    Raises:
        BackendError: as `backend_for`.
    """
    return _module(op, backend_for(tensor))


@functools.cache
def _module(op: str, backend: str) -> Any:
    return importlib.import_module(f"ds_kernels.ops.{op}.{backend}")
