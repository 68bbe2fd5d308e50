"""The specification of flash_attention: plain torch with the whole matrix of scores, in at least fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels.ops.flash_attention.shapes import sequences, visible

__all__ = ["empty_output", "flash_attention", "flash_attention_backward"]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def empty_output(q: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised (out, lse) for q [batch, heads, len, dim]; in memory out is [batch, len, heads, dim].

    Gradients are laid out as out is.
    """
    batch, heads, length, dim = q.shape
    lse = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(batch, length, heads, dim).transpose(1, 2), q.new_empty(batch, heads, length, dtype=lse)


def _scores(q: Tensor, k: Tensor, causal: bool, window: int, scale: float) -> Tensor:
    """[batch, kv_heads, group, q_len, k_len], -inf where a query does not see a key."""
    grouped = _wide(q).unflatten(1, (k.shape[1], -1))
    scores = grouped @ _wide(k).unsqueeze(2).mT * scale
    hidden = ~visible(q.shape[2], k.shape[2], causal, window, q.device)
    masked: Tensor = scores.masked_fill(hidden, float("-inf"))
    return masked


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`: out = softmax(scale * q k^T over the visible keys) v, lse = log of the sum of exp of those scores.

    q [batch, heads, len, dim], k and v [batch, kv_heads, k_len, dim]; with cu_q and cu_k (batch 1) sequence i has the
    queries cu_q[i]:cu_q[i+1] and the keys cu_k[i]:cu_k[i+1]. lse is fp32 (fp64 for fp64) [batch, heads, len].
    """
    out, lse = empty_output(q)
    out.zero_()
    lse.fill_(float("-inf"))
    for a, b, c, d in sequences(q, k, cu_q, cu_k):
        scores = _scores(q[:, :, a:b], k[:, :, c:d], causal, window, scale)
        total = scores.logsumexp(-1)
        weights = (scores - total.unsqueeze(-1)).exp().nan_to_num(0.0)
        out[:, :, a:b] = (weights @ _wide(v[:, :, c:d]).unsqueeze(2)).flatten(1, 2).to(q.dtype)
        lse[:, :, a:b] = total.flatten(1, 2)
    return out, lse


def flash_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, causal: bool, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`(grad_q, grad_k, grad_v)` from the saved out and lse.

    With P = exp(scores - lse), D = sum(grad * out) per query: grad_v = P^T grad, S' = P * (grad v^T - D),
    grad_q = scale * S' k, grad_k = scale * S'^T q; keys and values sum over the query heads that share them.
    """
    grad_q, grad_k, grad_v = (empty_output(x)[0].zero_() for x in (q, k, v))
    for a, b, c, d in sequences(q, k, cu_q, cu_k):
        heads = (k.shape[1], -1)
        keys, values = (_wide(x[:, :, c:d]).unsqueeze(2) for x in (k, v))
        wide, outer = (_wide(x[:, :, a:b]).unflatten(1, heads) for x in (q, grad))
        scores = _scores(q[:, :, a:b], k[:, :, c:d], causal, window, scale)
        weights = (scores - lse[:, :, a:b].unflatten(1, heads).unsqueeze(-1)).exp().nan_to_num(0.0)
        delta = (outer * _wide(out[:, :, a:b]).unflatten(1, heads)).sum(-1, keepdim=True)
        pull = weights * (outer @ values.mT - delta) * scale
        grad_q[:, :, a:b] = (pull @ keys).flatten(1, 2).to(q.dtype)
        grad_k[:, :, c:d] = (pull.mT @ wide).sum(2).to(k.dtype)
        grad_v[:, :, c:d] = (weights.mT @ outer).sum(2).to(v.dtype)
    return grad_q, grad_k, grad_v
