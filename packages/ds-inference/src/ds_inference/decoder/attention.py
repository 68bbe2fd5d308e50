"""Attention with a soft cap of the scores (Gemma 2), which the fused kernels do not have: plain torch, in fp32.

    weights = softmax(cap * tanh(scale * q k^T / cap))

Source: Gemma Team 2024, "Gemma 2" (arXiv:2408.00118), section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_inference.decoder.batch import Batch
from ds_kernels import DecodeLayer, DecodeModel

__all__ = ["softcapped_attention"]


def softcapped_attention(
    model: DecodeModel, layer: DecodeLayer, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch
) -> Tensor:
    """[T, heads, head_dim], sequence by sequence; a query that sees no key gets zeros."""
    cap, scale = model.attention_softcap, model.attention_scale
    assert cap is not None
    scale = model.head_dim**-0.5 if scale is None else scale
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lengths = batch.context_lens.tolist()
    starts = list(range(len(lengths) + 1)) if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
    group, size = model.heads // model.kv_heads, k_cache.shape[2]
    for index, length in enumerate(lengths):
        rows = slice(starts[index], starts[index + 1])
        count = rows.stop - rows.start
        if not count or not length:
            continue
        blocks = batch.block_tables[index, : -(-length // size)].long()
        keys, values = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length].float().repeat_interleave(group, 0)
            for cache in (k_cache, v_cache)
        )
        scores = torch.matmul(q[rows].transpose(0, 1).float() * scale, keys.transpose(1, 2))
        scores = scores.div_(cap).tanh_().mul_(cap)
        ahead = torch.arange(length, device=q.device) - torch.arange(length - count, length, device=q.device)[:, None]
        hidden = ahead > 0
        if layer.window is not None:
            hidden |= ahead <= -layer.window
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
        out[rows] = torch.matmul(weights, values).transpose(0, 1).to(q.dtype)
    return out
