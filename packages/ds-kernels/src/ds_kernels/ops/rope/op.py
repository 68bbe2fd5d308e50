"""rope: rotary position embedding of queries and keys.

Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv:2104.09864).
Limit: memory. Reads and writes q and k once, forward and backward (which is the rotation by the opposite angles): 2
passes of `(heads + kv_heads) * batch * seq * dim * itemsize` bytes. Nothing but cos and sin is kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_kernels._checks import check_device, check_dtype, require
from ds_kernels._dispatch import implementation
from ds_kernels._op import Op

__all__ = ["rope"]


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, *, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate pair i of each head's row at position p by the angle whose cosine and sine are cos[p, i] and sin[p, i].

    Args:
        q: [batch, heads, seq, dim], fp32, bf16, fp16 or fp64; any strides (no copy where the last one is 1).
        k: [batch, kv_heads, seq, dim], dtype as q.
        cos: [seq, half] or [1 or batch, seq, half], any float dtype, one angle per *pair*: of Hugging Face's tables,
            which hold every angle twice, pass `cos[..., : cos.shape[-1] // 2]`. With positions: [max_positions, half].
        sin: as cos. Both are constants: they get no gradient.
        interleaved: pair i is (x[2i], x[2i + 1]) (GPT-J), otherwise (x[i], x[half + i]) (Llama, GPT-NeoX).
        positions: [seq] or [batch, seq] integers, rows of the tables.

    Returns:
        `(q, k)` rotated, in the strides of dense inputs. Elements from 2 * half on (partial rotary) pass through.
        Computed in fp32 (fp64 for fp64), rounded once.

    Raises:
        KernelArgumentError: shapes, dtypes or devices do not fit, 2 * half is above dim, cos or sin require grad.
        IndexError: a position outside the tables (a device-side assertion on CUDA).
    """
    require(
        q.dim() == 4 and k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:],
        f"rope: q is {tuple(q.shape)}, k is {tuple(k.shape)}; expected [batch, heads, seq, dim], equal but for heads",
    )
    check_dtype("rope", "q", q)
    require(q.dtype == k.dtype, f"rope: k is of dtype {k.dtype}; expected {q.dtype}, as q")
    check_device("rope", q, k=k, cos=cos, sin=sin, positions=positions)
    require(not (cos.requires_grad or sin.requires_grad), "rope: cos and sin are constants; detach them first")
    require(cos.shape == sin.shape, f"rope: sin has shape {tuple(sin.shape)}; expected {tuple(cos.shape)}, as cos")
    if positions is not None:
        _check_positions(q, cos, positions)
        cos, sin = cos[positions], sin[positions]
    if cos.dim() == 2:
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
    batch, _, seq, dim = q.shape
    require(
        cos.dim() == 3 and cos.shape[0] in (1, batch) and cos.shape[1] == seq and 0 < 2 * cos.shape[2] <= dim,
        f"rope: cos is {tuple(cos.shape)}; expected [seq, half] or [1 or batch, seq, half] with seq {seq}, "
        f"batch {batch} and 2 * half of at most dim {dim} (one angle per pair)",
    )
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(exact).contiguous(), sin.to(exact).contiguous()
    rotated: tuple[Tensor, Tensor] = _ROPE(_rows(q), _rows(k), cos, sin, interleaved)
    return rotated


def _check_positions(q: Tensor, cos: Tensor, positions: Tensor) -> None:
    batch, _, seq, _ = q.shape
    require(
        cos.dim() == 2,
        f"rope: cos is {tuple(cos.shape)}; expected a table [max_positions, half] when positions are given",
    )
    require(
        positions.dtype in (torch.int64, torch.int32) and tuple(positions.shape) in ((seq,), (1, seq), (batch, seq)),
        f"rope: positions are {tuple(positions.shape)} of {positions.dtype}; expected int64 or int32 of [seq] or "
        f"[batch, seq], here ({seq},) or ({batch}, {seq})",
    )


def _rows(x: Tensor) -> Tensor:
    """x with rows that are contiguous each."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    rotated: tuple[Tensor, Tensor] = implementation("rope", q).rope(q, k, cos, sin, interleaved)
    return rotated


def _fake(q: Tensor, k: Tensor, _cos: Tensor, _sin: Tensor, _interleaved: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, cos, sin, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    grad_q, grad_k = _BACKWARD(_rows(grad_q), _rows(grad_k), cos, -sin, ctx.interleaved)
    return grad_q, grad_k, None, None, None


_BACKWARD = Op(
    "rope_backward(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    _rope,
    fake=_fake,
)
_ROPE = Op(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    _rope,
    fake=_fake,
    setup_context=_save,
    backward=_gradients,
)
