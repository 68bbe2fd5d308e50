"""The specification of linear: plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels.ops.linear.weight import QuantizedWeight

__all__ = ["linear", "linear_backward", "quantize_activations"]


def quantize_activations(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """`(codes, unit)` of 8 bits: x is about unit * codes, one unit per row and group of columns.

    inverse = 127 / max|x| in fp32, codes = round(x * inverse) to even, unit = 1 / inverse. codes is fp32 of x's shape
    with whole numbers, unit fp32 [..., groups]. A group with an infinity or NaN has the unit NaN.
    """
    columns = x.shape[-1]
    groups = -(-columns // group_size)
    padded = torch.nn.functional.pad(x.float(), (0, groups * group_size - columns))
    grouped = padded.unflatten(-1, (groups, group_size))
    largest = grouped.abs().amax(-1).double()
    inverse = torch.where(largest > 0, (127.0 / largest).clamp(max=3e38), 0.0).float()
    unit = torch.where(largest > 0, 1.0 / inverse.double(), 0.0).float()
    unit = torch.where(largest.isfinite(), unit, torch.nan)
    codes = torch.where(largest.isfinite().unsqueeze(-1), grouped * inverse.unsqueeze(-1), 0.0).round()
    return codes.flatten(-2)[..., :columns], unit


def linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation_bits: int | None) -> Tensor:
    """x @ weight.T + bias in fp32 (fp64 for fp64), rounded to x's dtype once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values = x.to(wide)
    if activation_bits == 8:
        codes, unit = quantize_activations(x, weight.group_size)
        values = (codes * unit.repeat_interleave(weight.group_size, -1)[..., : x.shape[-1]]).to(wide)
    y = torch.nn.functional.linear(values, weight.dequantize(wide), None if bias is None else bias.to(wide))
    return y.to(x.dtype)


def linear_backward(grad: Tensor, weight: QuantizedWeight) -> Tensor:
    """The gradient of x (straight through the rounding of 8-bit activations): grad @ weight, rounded once."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    return (grad.to(wide) @ weight.dequantize(wide)).to(grad.dtype)
