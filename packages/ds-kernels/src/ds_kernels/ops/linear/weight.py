"""`QuantizedWeight`: a matrix [outputs, columns] as codes of 8 or 4 bits with a scale per group of columns.

    weight[n, k] = scale[n, k // group_size] * (code[n, k] - middle) + centre[n, k // group_size]

middle is 128 or 8; the centre is there only for asymmetric quantisation. Vocabulary: a *panel* is 16 rows, a *quad*
4 neighbouring columns. The layout is the one that vector units and memory like best, on every device:

    codes   uint8 [panels, depth / 4 (8 bits) or depth / 8 (4 bits), 16, 4]     a panel is read as one stream
            bits 8: [p, q, r, j] is the code of row 16 p + r, column 4 q + j
            bits 4: low half: column 8 q + j, high half: column 8 q + 4 + j
    scale   bf16 [panels, groups, 16], centre likewise

Rows are padded to 16, columns to 32 (`depth`); the padding's scale is 0 or meets activations that are 0.
Scale and centre are rounded to bf16 first and the codes chosen for the rounded ones, so their rounding adds no error.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from ds_kernels._checks import FLOATS, check_dtype, require

__all__ = ["BITS", "PANEL", "QuantizedWeight", "middle", "quantize_weight"]

BITS = (8, 4)
PANEL = 16
"""Rows of a panel."""
DEPTH = 32
"""Columns are padded to a multiple of this."""
MAX_GROUP = 1 << 16
"""Columns of a group: its products of two bytes (255 * 127 at most) add up in 32 bits."""
SEARCH = tuple(1.0 - 0.04 * step for step in range(1, 10))
"""Factors by which `search` narrows a group's range."""


def middle(bits: int) -> int:
    """The code that means the centre."""
    return 1 << (bits - 1)


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A quantised matrix; made by `quantize_weight`, multiplied by `linear`.

    Attributes:
        codes: uint8 [panels, depth / (4 or 8), 16, 4].
        scale: bf16 [panels, groups, 16].
        centre: bf16 [panels, groups, 16], or None when symmetric.
        bits: of a code, 8 or 4.
        group_size: columns that share a scale.
        outputs: rows of the matrix (a linear layer's out_features).
        columns: columns of the matrix (in_features).
    """

    codes: Tensor
    scale: Tensor
    centre: Tensor | None
    bits: int
    group_size: int
    outputs: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, columns)."""
        return self.outputs, self.columns

    @functools.cached_property
    def depth(self) -> int:
        """Columns with their padding."""
        return -(-self.columns // DEPTH) * DEPTH

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and centres."""
        return sum(part.nbytes for part in (self.codes, self.scale, self.centre) if part is not None)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on another device."""
        centre = None if self.centre is None else self.centre.to(device)
        return dataclasses.replace(self, codes=self.codes.to(device), scale=self.scale.to(device), centre=centre)

    def split(self, rows: int) -> list[tuple[int, QuantizedWeight]]:
        """`(first row, part)` for parts of about `rows` rows (whole panels): views, not copies."""
        step = -(-rows // PANEL)
        parts = []
        for first in range(0, self.codes.shape[0], step):
            centre = None if self.centre is None else self.centre[first : first + step]
            outputs = min(self.outputs - first * PANEL, step * PANEL)
            codes, scale = self.codes[first : first + step], self.scale[first : first + step]
            part = dataclasses.replace(self, codes=codes, scale=scale, centre=centre, outputs=outputs)
            parts.append((first * PANEL, part))
        return parts

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[outputs, columns] in `dtype`: computed in fp32 (fp64 for fp64) and rounded once."""
        wide = torch.promote_types(dtype, torch.float32)
        codes = unpack(self.codes, self.bits).to(wide)
        panels, depth = codes.shape[0] // PANEL, codes.shape[1]
        values = codes - middle(self.bits)
        by = self._spread(self.scale, panels, depth).to(wide)
        values *= by
        if self.centre is not None:
            values += self._spread(self.centre, panels, depth).to(wide)
        return values[: self.outputs, : self.columns].to(dtype)

    def _spread(self, part: Tensor, panels: int, depth: int) -> Tensor:
        rows = part.transpose(1, 2).reshape(panels * PANEL, -1)
        return rows.repeat_interleave(self.group_size, 1)[:, :depth]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [16 panels, depth] as the layout of `QuantizedWeight.codes`."""
    panels = codes.shape[0] // PANEL
    quads = codes.view(panels, PANEL, -1, 4).transpose(1, 2)
    if bits == 8:
        return quads.contiguous()
    return (quads[:, 0::2] | (quads[:, 1::2] << 4)).contiguous()


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`."""
    panels = packed.shape[0]
    quads = packed if bits == 8 else torch.stack([packed & 15, packed >> 4], 2).flatten(1, 2)
    return quads.transpose(1, 2).reshape(panels * PANEL, -1)


def quantize_weight(
    weight: Tensor, bits: int = 8, *, group_size: int = 64, symmetric: bool = True, search: bool = False
) -> QuantizedWeight:
    """Quantise a matrix for `linear`, rounding to nearest; no calibration data is needed.

    Args:
        weight: [outputs, columns], fp32, bf16, fp16 or fp64, any strides.
        bits: 8 or 4.
        group_size: columns per scale, a multiple of 32 up to 65,536. Packed size: bits + 16 / group_size bits per
            weight (twice the second term when asymmetric).
        symmetric: codes around zero with a scale; else a scale and a centre per group, for ranges to one side.
        search: try ten ranges per group and keep that of the least squared error (slower; pays at 4 bits).

    Returns:
        QuantizedWeight on weight's device.

    Raises:
        KernelArgumentError: bits, group_size or the shape is not supported, or a weight is not finite.
    """
    require(bits in BITS, f"quantize_weight: bits is {bits}; supported are 8 and 4")
    require(
        0 < group_size <= MAX_GROUP and group_size % DEPTH == 0,
        f"quantize_weight: group_size is {group_size}; it must be a multiple of {DEPTH} from {DEPTH} to {MAX_GROUP}",
    )
    require(
        weight.dim() == 2 and weight.numel() > 0,
        f"quantize_weight: weight has shape {tuple(weight.shape)}; expected [outputs, columns], neither of them 0",
    )
    check_dtype("quantize_weight", "weight", weight, FLOATS)
    outputs, columns = weight.shape
    rows, depth = -(-outputs // PANEL) * PANEL, -(-columns // DEPTH) * DEPTH
    groups = -(-depth // group_size)
    padded = torch.zeros(rows, groups * group_size, device=weight.device)
    padded[:outputs, :columns] = weight
    require(bool(padded.isfinite().all()), "quantize_weight: weight has infinite or NaN elements")
    grouped = padded.view(rows, groups, group_size)
    scale, centre = _ranges(grouped, bits, symmetric, search)
    codes = _codes(grouped, scale, centre, bits).view(rows, -1)[:, :depth].to(torch.uint8)

    def panels(part: Tensor) -> Tensor:
        return part.view(rows // PANEL, PANEL, groups).transpose(1, 2).contiguous()

    return QuantizedWeight(
        pack(codes, bits), panels(scale), None if centre is None else panels(centre), bits, group_size, outputs, columns
    )


def _ranges(grouped: Tensor, bits: int, symmetric: bool, search: bool) -> tuple[Tensor, Tensor | None]:
    """Scale and centre [rows, groups] in bf16."""
    low, high = grouped.amin(-1), grouped.amax(-1)
    if symmetric:
        # The side with the larger extreme gets the one code more: the scale is negative if that is the upper side.
        extreme = torch.where(high > -low, high, low)
        scale, centre = extreme / -middle(bits), None
        if bits == 8:
            scale = torch.maximum(high, -low) / 127
    else:
        scale = (high - low) / ((1 << bits) - 1)
        centre = (low + scale * middle(bits)).bfloat16()
    best = scale.bfloat16()
    if not search:
        return best, centre
    error = _error(grouped, best, centre, bits)
    for factor in SEARCH:
        trial = (scale * factor).bfloat16()
        trial_error = _error(grouped, trial, centre, bits)
        better = trial_error < error
        best, error = torch.where(better, trial, best), torch.where(better, trial_error, error)
    return best, centre


def _codes(grouped: Tensor, scale: Tensor, centre: Tensor | None, bits: int) -> Tensor:
    """The nearest codes, as fp32."""
    wide = scale.float().unsqueeze(-1)
    values = grouped if centre is None else grouped - centre.float().unsqueeze(-1)
    steps = torch.where(wide == 0, 0.0, values / wide)
    return steps.round_().add_(middle(bits)).clamp_(0, (1 << bits) - 1)


def _error(grouped: Tensor, scale: Tensor, centre: Tensor | None, bits: int) -> Tensor:
    values = (_codes(grouped, scale, centre, bits) - middle(bits)) * scale.float().unsqueeze(-1)
    if centre is not None:
        values += centre.float().unsqueeze(-1)
    return values.sub_(grouped).square_().sum(-1)
