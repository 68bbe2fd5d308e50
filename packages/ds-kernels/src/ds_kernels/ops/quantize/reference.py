"""The specification of quantize: plain torch, elementwise over blocks; runs on every device.

Per block of the last dimension, in fp32:
    symmetric    scale = max|x| / limit,              code = round(x * (limit / max|x|)),   x ~ scale * code
    asymmetric   scale = (max x - min x) / levels,    code = round((x - min x) / scale),    x ~ min x + scale * code
limit is 127, 7 and the largest number of the fp8 format (448, 57344); levels 255 and 15. Rounding is to nearest, halves
to even; a block of equal elements (symmetric: of zeros) has the scale 0 and comes back exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LEVELS", "LIMITS", "STORAGE", "dequantize", "quantize"]

LIMITS = {"int8": 127.0, "int4": 7.0, "fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}
STORAGE = {
    "int8": torch.int8,
    "int4": torch.uint8,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
LEVELS = {"int8": 255.0, "int4": 15.0}


def quantize(x: Tensor, name: str, block: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(codes, scale, offset)` of x [..., n]: codes in `STORAGE`, two to a byte for int4 (the first in the low half);
    asymmetric int8 codes are stored minus 128. scale and offset are fp32 [..., blocks]."""
    blocks = _blocks(x.float(), block)
    if symmetric:
        largest = blocks.abs().amax(-1)
        scale = largest / LIMITS[name]
        inverse = torch.where(largest > 0, LIMITS[name] / largest, 0.0).clamp(max=torch.finfo(torch.float32).max)
        steps, offset = blocks * inverse.unsqueeze(-1), None
    else:
        offset, highest = blocks.amin(-1), blocks.amax(-1)
        scale = (highest - offset) / LEVELS[name]
        spread = scale.unsqueeze(-1)
        steps = torch.where(spread > 0, (blocks - offset.unsqueeze(-1)) / spread, 0.0)
    return _store(steps.flatten(-2)[..., : x.shape[-1]], name, symmetric), scale, offset


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None, name: str, block: int, columns: int) -> Tensor:
    """fp32 [..., columns]."""
    if name == "int4":
        wide = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :columns].float()
        wide = wide - 8.0 if offset is None else wide
    else:
        wide = codes.float() if offset is None else codes.float() + 128.0
    values = _blocks(wide, block) * scale.unsqueeze(-1)
    if offset is not None:
        values = values + offset.unsqueeze(-1)
    return values.flatten(-2)[..., :columns]


def _blocks(x: Tensor, block: int) -> Tensor:
    """[..., blocks, block]; what fills the last block is its own last element, which changes no extreme."""
    missing = -x.shape[-1] % block
    if missing:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1)
    blocks: Tensor = x.unflatten(-1, (-1, block))
    return blocks


def _store(steps: Tensor, name: str, symmetric: bool) -> Tensor:
    if name.startswith("fp8"):
        return steps.clamp(-LIMITS[name], LIMITS[name]).to(STORAGE[name])
    whole = steps.round()
    if name == "int8":
        return (whole.clamp(-127, 127) if symmetric else whole.clamp(0, 255) - 128).to(torch.int8)
    nibbles = (whole.clamp(-7, 7) + 8 if symmetric else whole.clamp(0, 15)).to(torch.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
