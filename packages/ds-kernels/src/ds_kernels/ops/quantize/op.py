"""quantize: a tensor as codes of 8 or 4 bits with a scale per block of its last dimension.

For states, activations and messages that are kept or sent small; weights that are multiplied as they are packed have a
layout of their own (`ds_kernels.quantize_weight`). Sources: Dettmers et al. 2022, "8-bit Optimizers via Block-wise
Quantization" (arXiv:2110.02861); Micikevicius et al. 2022, "FP8 Formats for Deep Learning" (arXiv:2209.05433).

Limit: memory; x is read and `Quantized.nbytes` written, once. Plain torch on every device, on CPU in chunks that stay
in cache; there is no Triton kernel (under torch.compile the expression fuses into one).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ds_kernels._checks import FLOATS, check_dtype
from ds_kernels.errors import KernelArgumentError
from ds_kernels.ops.quantize import reference

__all__ = ["FORMATS", "Quantized", "quantize"]

FORMATS = ("int8", "int4", "fp8_e4m3", "fp8_e5m2")
CHUNK_NUMEL = 1 << 16
"""Elements that are worked on at a time on CPU: temporaries of 256 KB."""


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A tensor in blocks; made by `quantize`.

    Attributes:
        codes: int8, uint8 (int4, two to a byte along the last dimension) or float8; the tensor's shape otherwise.
        scale: fp32 [..., blocks].
        offset: fp32 [..., blocks], or None when symmetric.
        format: one of `FORMATS`.
        block_size: elements of the last dimension that share a scale.
        columns: size of the last dimension.
        dtype: of the tensor that was quantised.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    format: str
    block_size: int
    columns: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return sum(part.nbytes for part in (self.codes, self.scale, self.offset) if part is not None)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor again, computed in fp32 and rounded once to `dtype` (default: what it was)."""
        wanted = self.dtype if dtype is None else dtype
        facts = (self.format, self.block_size, self.columns)
        if not _in_chunks(self.codes):
            return reference.dequantize(self.codes, self.scale, self.offset, *facts).to(wanted)
        out = torch.empty((*self.codes.shape[:-1], self.columns), dtype=wanted)
        rows, codes, scale = out.view(-1, self.columns), _rows(self.codes), _rows(self.scale)
        offset = None if self.offset is None else _rows(self.offset)
        for part in _slices(rows):
            shift = None if offset is None else offset[part]
            rows[part] = reference.dequantize(codes[part], scale[part], shift, *facts)
        return out


def quantize(x: Tensor, format: str = "int8", *, block_size: int = 128, symmetric: bool = True) -> Quantized:
    """Quantise blocks of the last dimension, rounding to nearest.

    Args:
        x: [..., columns], fp32, bf16, fp16 or fp64 (taken as fp32), any strides; treated as a constant by autograd.
        format: "int8", "int4", "fp8_e4m3" or "fp8_e5m2".
        block_size: elements per scale, an even number; the last block may be shorter.
        symmetric: codes around zero; else every block has an offset, its minimum ("int8" and "int4" only).

    Returns:
        Quantized. |x - dequantised| is at most half a step (scale / 2; for fp8 2^-4 or 2^-3 of the element) and its
        fp32 rounding. A block with an infinity or NaN comes back as NaN or clamped.

    Raises:
        KernelArgumentError: format, block_size, dtype or a scalar that is not supported.
    """
    if format not in FORMATS:
        raise KernelArgumentError(f"quantize: format is {format!r}; supported are {', '.join(FORMATS)}")
    if block_size <= 0 or block_size % 2:
        raise KernelArgumentError(f"quantize: block_size is {block_size}; it must be positive and even")
    if not symmetric and format not in reference.LEVELS:
        raise KernelArgumentError(f"quantize: {format} is symmetric only; asymmetric are int8 and int4")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise KernelArgumentError(f"quantize: x has shape {tuple(x.shape)}; expected a last dimension to work along")
    check_dtype("quantize", "x", x, FLOATS)
    x, columns = x.detach(), x.shape[-1]
    if not _in_chunks(x):
        parts = reference.quantize(x, format, block_size, symmetric)
        return Quantized(*parts, format, block_size, columns, x.dtype)
    blocks = -(-columns // block_size)
    codes = torch.empty((*x.shape[:-1], -(-columns // 2) if format == "int4" else columns), dtype=_storage(format))
    scale = torch.empty((*x.shape[:-1], blocks))
    offset = None if symmetric else torch.empty_like(scale)
    rows = x.reshape(-1, columns)
    for part in _slices(rows):
        found = reference.quantize(rows[part], format, block_size, symmetric)
        _rows(codes)[part], _rows(scale)[part] = found[0], found[1]
        if offset is not None and found[2] is not None:
            _rows(offset)[part] = found[2]
    return Quantized(codes, scale, offset, format, block_size, columns, x.dtype)


def _storage(format: str) -> torch.dtype:
    return reference.STORAGE[format]


def _in_chunks(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() > CHUNK_NUMEL and not torch.compiler.is_compiling()


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _slices(rows: Tensor) -> list[slice]:
    step = max(1, CHUNK_NUMEL // rows.shape[1])
    return [slice(first, first + step) for first in range(0, rows.shape[0], step)]
