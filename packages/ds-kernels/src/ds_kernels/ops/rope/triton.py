"""rope in Triton: one program per position and block of heads, for any strides."""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels._triton import Build, next_power_of_2
from ds_kernels.ops.rope import reference

__all__ = ["builds", "rope"]

HEADS = 8
"""Heads per program."""


@triton.jit
def _rotate(
    x, out, cos, sin, heads, seq, dim, half, angles, x_batch, x_head, x_seq, out_batch, out_head, out_seq,
    INTERLEAVED: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch, position = tl.program_id(0).to(tl.int64) // seq, tl.program_id(0).to(tl.int64) % seq
    head = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    known = pair < half
    mask = (head < heads) & known
    angle = (batch * angles + position) * half + pair
    c, s = tl.load(cos + angle, known, other=0.0), tl.load(sin + angle, known, other=0.0)
    source = x + batch * x_batch + position * x_seq + head * x_head
    target = out + batch * out_batch + position * out_seq + head * out_head
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + half
    a, b = tl.load(source + first, mask, other=0.0).to(tl.float32), tl.load(source + second, mask, other=0.0)
    b = b.to(tl.float32)
    tl.store(target + first, (a * c - b * s).to(out.dtype.element_ty), mask)
    tl.store(target + second, (b * c + a * s).to(out.dtype.element_ty), mask)
    if REST:
        for start in range(2 * half, dim, BLOCK):
            mask = (head < heads) & (start + pair < dim)
            tl.store(target + start + pair, tl.load(source + start + pair, mask, other=0.0), mask)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """As the reference, which takes fp64."""
    if q.dtype == torch.float64:
        return reference.rope(q, k, cos, sin, interleaved)
    return _launch(q, cos, sin, interleaved), _launch(k, cos, sin, interleaved)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    batch, heads, seq, dim = x.shape
    half = cos.shape[-1]
    _rotate[(batch * seq, triton.cdiv(heads, HEADS))](
        x, out, cos, sin, heads, seq, dim, half, 0 if cos.shape[0] == 1 else seq, *x.stride()[:3], *out.stride()[:3],
        interleaved, 2 * half < dim, HEADS, next_power_of_2(half), num_warps=4,
    )  # fmt: skip
    return out


def builds() -> Iterator[Build]:
    """Both pairings, whole and partial rotary."""
    sizes = ("heads", "seq", "dim", "half", "angles", "x_batch", "x_head", "x_seq", "out_batch", "out_head", "out_seq")
    for name, interleaved, rest, half in (("bf16", False, False, 64), ("fp32", True, True, 128)):
        signature = {"x": f"*{name}", "out": f"*{name}", "cos": "*fp32", "sin": "*fp32"} | dict.fromkeys(sizes, "i32")
        constants = {"INTERLEAVED": interleaved, "REST": rest, "HEADS": HEADS, "BLOCK": half}
        yield Build(_rotate, signature, constants)
