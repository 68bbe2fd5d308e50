"""The optimizers' updates on CPU: numba loops at memory bandwidth; without numba the reference, block by block so that
its intermediate results stay in the cache.

Signatures as in `reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ds_kernels._cpu.dtypes import CODES
from ds_kernels._cpu.launch import HAS_NUMBA, launch
from ds_kernels.optim import reference

__all__ = ["adagrad", "adam", "lamb_apply", "lamb_moments", "lion", "sgd"]

BLOCK = 1 << 16
"""Elements that the reference works on at a time: 256 KiB per fp32 temporary."""


def _takes(*tensors: Tensor | None) -> bool:
    return HAS_NUMBA and all(tensor is None or tensor.dtype in CODES for tensor in tensors)


def _codes(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else CODES[tensor.dtype] for tensor in tensors]


def _slots(*tensors: Tensor | None) -> list[Tensor | int]:
    return [0 if tensor is None else tensor for tensor in tensors]


def _rounding(seed: int | None) -> tuple[int, int]:
    return (0, 0) if seed is None else (1, seed)


def _blocks(numel: int) -> Iterator[slice]:
    for start in range(0, numel, BLOCK):
        yield slice(start, min(start + BLOCK, numel))


def _blocked(function: Callable[..., Any], *tensors: Tensor | None, **numbers: Any) -> list[Any]:
    """A reference function over blocks of its tensors; what it returns for each."""
    numel = next(tensor.numel() for tensor in tensors if tensor is not None)
    flat = [None if tensor is None else tensor.view(-1) for tensor in tensors]
    return [
        function(*(None if tensor is None else tensor[part] for tensor in flat), first=part.start, **numbers)
        for part in _blocks(numel)
    ]


def adam(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor | None, out: Tensor | None,
    **numbers: Any,
) -> None:  # fmt: skip
    tensors = (param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, out)
    if not _takes(*tensors):
        _blocked(reference.adam, *tensors, **numbers)
        return
    from ds_kernels.optim.cpu_numba import ITEM
    from ds_kernels.optim.cpu_numba import adam as run

    n = numbers
    numel = param.numel()
    launch(
        run, *_slots(*tensors), numel, *_codes(param, grad, exp_avg, exp_avg_sq, out),
        int(max_exp_avg_sq is not None), int(out is not None), *_rounding(n["seed"]), float(n["scale"]), n["beta1"],
        n["beta2"], n["decay"], n["keep"], n["size"], n["root"], n["eps"], items=-(-numel // ITEM),
    )  # fmt: skip


def adagrad(param: Tensor, grad: Tensor, total: Tensor, out: Tensor | None, **numbers: Any) -> None:
    tensors = (param, grad, total, out)
    if not _takes(*tensors):
        _blocked(reference.adagrad, *tensors, **numbers)
        return
    from ds_kernels.optim.cpu_numba import ITEM
    from ds_kernels.optim.cpu_numba import adagrad as run

    n = numbers
    launch(
        run, *_slots(*tensors), param.numel(), *_codes(*tensors), int(out is not None), *_rounding(n["seed"]),
        n["scale"], n["decay"], n["lr"], n["eps"], items=-(-param.numel() // ITEM),
    )  # fmt: skip


def lion(param: Tensor, grad: Tensor, exp_avg: Tensor, out: Tensor | None, **numbers: Any) -> None:
    tensors = (param, grad, exp_avg, out)
    if not _takes(*tensors):
        _blocked(reference.lion, *tensors, **numbers)
        return
    from ds_kernels.optim.cpu_numba import ITEM
    from ds_kernels.optim.cpu_numba import lion as run

    n = numbers
    launch(
        run, *_slots(*tensors), param.numel(), *_codes(*tensors), int(out is not None), *_rounding(n["seed"]),
        n["scale"], n["beta1"], n["beta2"], n["keep"], n["lr"], items=-(-param.numel() // ITEM),
    )  # fmt: skip


def sgd(param: Tensor, grad: Tensor, buffer: Tensor | None, out: Tensor | None, **numbers: Any) -> None:
    tensors = (param, grad, buffer, out)
    if not _takes(*tensors):
        _blocked(reference.sgd, *tensors, **numbers)
        return
    from ds_kernels.optim.cpu_numba import ITEM
    from ds_kernels.optim.cpu_numba import sgd as run

    n = numbers
    launch(
        run, *_slots(*tensors), param.numel(), *_codes(*tensors), int(buffer is not None), int(out is not None),
        *_rounding(n["seed"]), n["scale"], n["decay"], n["momentum"], n["rest"], n["ahead"], n["behind"], n["lr"],
        items=-(-param.numel() // ITEM),
    )  # fmt: skip


def lamb_moments(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, **numbers: Any) -> Tensor:
    tensors = (param, grad, exp_avg, exp_avg_sq)
    if not param.numel():
        return torch.zeros(2, dtype=torch.float64)
    if not _takes(*tensors):
        return torch.stack(_blocked(reference.lamb_moments, *tensors, **numbers)).sum(0)
    from ds_kernels.optim.cpu_numba import ITEM
    from ds_kernels.optim.cpu_numba import lamb_moments as run

    n, items = numbers, -(-param.numel() // ITEM)
    sums = torch.empty(items, 2, dtype=torch.float64)
    launch(
        run, *tensors, sums, param.numel(), *_codes(*tensors), *_rounding(n["seed"]), n["scale"], n["beta1"],
        n["beta2"], n["size"], n["root"], n["eps"], n["inside"], n["decay"], items=items,
    )  # fmt: skip
    return sums.sum(0)


def lamb_apply(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, out: Tensor | None, **numbers: Any) -> None:
    tensors = (param, exp_avg, exp_avg_sq, out)
    if not _takes(*tensors):
        _blocked(reference.lamb_apply, *tensors, **numbers)
        return
    from ds_kernels.optim.cpu_numba import ITEM
    from ds_kernels.optim.cpu_numba import lamb_apply as run

    n = numbers
    launch(
        run, *_slots(*tensors), param.numel(), *_codes(*tensors), int(out is not None), *_rounding(n["seed"]),
        n["step"], n["size"], n["root"], n["eps"], n["inside"], n["decay"], items=-(-param.numel() // ITEM),
    )  # fmt: skip
