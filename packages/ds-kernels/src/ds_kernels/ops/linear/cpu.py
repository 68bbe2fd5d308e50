"""linear on CPU: numba with vector code for quantised weights and for few rows of bf16; torch for the rest."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_kernels._cpu.dtypes import CODES
from ds_kernels._cpu.launch import HAS_NUMBA, bind, launch
from ds_kernels.ops.linear import reference
from ds_kernels.ops.linear.weight import PANEL, QuantizedWeight, middle

__all__ = [
    "FEW_ROWS",
    "WithoutOneDNN",
    "bound",
    "by_vectors",
    "linear",
    "linear_backward",
    "linear_bf16",
    "takes_bf16",
    "takes_vectors",
]

FEW_ROWS = 8
"""Activation rows that one pass over the weights serves."""
VECTOR_ROWS = 2
"""Rows of bf16 for which, without numba, torch's own product with a vector is faster than oneDNN's with a matrix."""
CHUNK_NUMEL = 1 << 20
"""Elements of a weight that are dequantised at a time."""
GRAIN_NBYTES = 1 << 15
"""Bytes of weights that are handed to a thread at a time."""
_HAS_VECTORS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
"""Whether torch was built with its fast product of a bf16 matrix and a vector for this CPU."""
TILE_NBYTES = 1 << 14
"""Bytes of bf16 activations that stay in the first cache while weight rows pass by."""
TILED_GRAIN = 16
"""Groups of weight rows that share a tile of activations."""
WEIGHT_ROWS = {1: 8, 2: 4, 4: 4, 8: 2}
"""bf16 weight rows that are read side by side, by rows of activations: as many sums as there are registers."""


def linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation_bits: int | None) -> Tensor:
    """As the reference, with activations of 16 bits (24 for fp32) per group of columns: see `cpu_numba`."""
    code = CODES.get(x.dtype)
    if not HAS_NUMBA or code is None or (bias is not None and bias.dtype not in CODES):
        return _chunked(x, weight, bias, activation_bits)
    y = torch.empty((*x.shape[:-1], weight.outputs), dtype=x.dtype)
    if x.numel():
        _quantised(launch, x, weight, bias, y, activation_bits)
    return y


def _quantised(
    start: Callable[..., Any], x: Tensor, weight: QuantizedWeight, bias: Tensor | None, y: Tensor,
    activation_bits: int | None,
) -> Any:  # fmt: skip
    """`start` (`launch`, or `bind` for few rows) the kernel that fills y."""
    code, bias_code = CODES[x.dtype], 0 if bias is None else CODES[bias.dtype]
    columns, depth, group, bits, outputs = weight.columns, weight.depth, weight.group_size, weight.bits, weight.outputs
    rows = x.numel() // columns
    kernels = _kernels()
    planes = 1 if activation_bits == 8 else 3 if code == 0 else 2
    block = _block(rows)
    words: Tensor | int = 0
    facts: Tensor | int = 0
    if rows > block:
        blocks = -(-rows // block)
        words = torch.empty(blocks * block * planes * depth // 4, dtype=torch.int32)
        facts = torch.empty(blocks * block * (planes + 2) * -(-depth // group), dtype=torch.int32)
        launch(
            kernels.pack_blocks, x, words, facts, rows, columns, depth, group, block, planes, middle(bits), code,
            items=blocks,
        )  # fmt: skip
    centre = weight.centre
    return start(
        kernels.QUANTISED[bits, planes, 0 if centre is None else 1], x, weight.codes, weight.scale,
        0 if centre is None else centre, 0 if bias is None else bias, y, words, facts, rows, outputs, columns, depth,
        group, block, code, bias_code,
        items=-(-outputs // PANEL), grain=max(1, GRAIN_NBYTES // (2 * bits * depth)) if rows <= block else 1,
    )  # fmt: skip


def bound(
    x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, y: Tensor, activation_bits: int | None
) -> Callable[[], None] | None:
    """A call that fills y from what x holds by then, or None where no kernel of ours takes these."""
    if isinstance(weight, Tensor):
        found: Callable[[], None] | None = _rows_bf16(bind, x, weight, bias, y) if takes_bf16(x, weight, bias) else None
        return found
    few = 0 < x.numel() <= FEW_ROWS * weight.columns
    if not (HAS_NUMBA and few and x.dtype in CODES and (bias is None or bias.dtype in CODES)):
        return None
    ready: Callable[[], None] = _quantised(bind, x, weight, bias, y, activation_bits)
    return ready


@functools.cache
def _kernels() -> Any:
    """The module of numba kernels, imported when it is first needed."""
    return importlib.import_module("ds_kernels.ops.linear.cpu_numba")


def linear_backward(grad: Tensor, weight: QuantizedWeight) -> Tensor:
    """As the reference, some panels of the weight at a time."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    flat = grad.reshape(-1, weight.outputs).to(wide)
    result = flat.new_zeros((flat.shape[0], weight.columns))
    for first, part in _parts(weight):
        result.addmm_(flat[:, first : first + part.outputs], part.dequantize(wide))
    return result.to(grad.dtype).view(*grad.shape[:-1], weight.columns)


def _chunked(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation_bits: int | None) -> Tensor:
    """The reference, some panels of the weight at a time: a whole dequantised head is large."""
    parts = []
    for first, part in _parts(weight):
        own = None if bias is None else bias[first : first + part.outputs]
        parts.append(reference.linear(x, part, own, activation_bits))
    return torch.cat(parts, -1)


def _parts(weight: QuantizedWeight) -> list[tuple[int, QuantizedWeight]]:
    """`(first row, rows of the weight)`, about CHUNK_NUMEL elements each."""
    return weight.split(max(1, CHUNK_NUMEL // weight.depth))


def _block(rows: int) -> int:
    return 1 if rows <= 1 else 2 if rows <= 2 else 4 if rows <= 4 else 8


def takes_bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear_bf16` is for these: few rows of bf16, weights as torch's layers keep them."""
    return (
        HAS_NUMBA
        and x.dtype == torch.bfloat16
        and weight.dtype == torch.bfloat16
        and 0 < x.numel() <= FEW_ROWS * weight.shape[1]
        and weight.is_contiguous()
        and (bias is None or (bias.dtype in CODES and bias.is_contiguous()))
    )


def takes_vectors(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `by_vectors` is for these: one row of bf16 where numba is missing, or without a bias two."""
    return (
        not HAS_NUMBA
        and x.dtype == torch.bfloat16
        and 0 < x.numel() <= (VECTOR_ROWS if bias is None else 1) * weight.shape[1]
        and weight.dtype == torch.bfloat16
        and weight.is_contiguous()
        and _HAS_VECTORS
        and not torch.compiler.is_compiling()
    )


def by_vectors(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias row by row, by torch's own loop: it reads weights twice as fast as oneDNN's for one row."""
    outputs, columns = weight.shape
    with _WITHOUT_ONEDNN:
        if bias is not None:
            return torch.nn.functional.linear(x, weight, bias.to(x.dtype))
        if x.numel() == columns:
            return torch.mv(weight, x.reshape(columns)).view(*x.shape[:-1], outputs)
        rows = [torch.mv(weight, row) for row in x.reshape(-1, columns).unbind()]
    return torch.stack(rows).view(*x.shape[:-1], outputs)


class WithoutOneDNN:
    """oneDNN switched off while somebody is inside: the switch is the process's, so threads are counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: Any = True

    def __enter__(self) -> None:
        switch: Any = torch.backends.mkldnn
        with self._lock:
            if not self._inside:
                self._before = switch.enabled
                switch.enabled = False
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        switch: Any = torch.backends.mkldnn
        with self._lock:
            self._inside -= 1
            if not self._inside:
                switch.enabled = self._before


_WITHOUT_ONEDNN = WithoutOneDNN()


def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias for what `takes_bf16` takes: products of bf16, sums in fp32, rounded once."""
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype)
    _rows_bf16(launch, x, weight, bias, y)
    return y


def _rows_bf16(start: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Any:
    outputs, columns = weight.shape
    rows = x.numel() // columns
    block = _block(rows)
    weights, chunks = WEIGHT_ROWS[block], columns // 32
    tiles = max(1, -(-64 * chunks * block // TILE_NBYTES))
    grain = max(1, GRAIN_NBYTES // (2 * columns * weights))
    return start(
        _kernels().BF16_ROWS, x, weight, 0 if bias is None else bias, y, rows, outputs, columns, block, weights,
        max(1, -(-chunks // tiles)), 0 if bias is None else CODES[bias.dtype],
        items=-(-outputs // weights), grain=grain if tiles == 1 else max(grain, TILED_GRAIN),
    )  # fmt: skip
