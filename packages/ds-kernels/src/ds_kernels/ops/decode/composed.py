"""decode as a composition of this package's other operations: GPUs, and CPUs where no program can be bound.

Activations are of the model's dtype between operations. Nothing waits for the device, so it can be captured in a CUDA
graph; layers with a softcap of scores, which `paged_attention` has not, attend over their whole block table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_kernels.ops.decode.model import DecodeLayer, DecodeModel, Norm, Projection
from ds_kernels.ops.decode.reference import ACTIVATIONS, scale_of
from ds_kernels.ops.glu import swiglu
from ds_kernels.ops.layer_norm import layer_norm
from ds_kernels.ops.linear import linear
from ds_kernels.ops.linear.weight import QuantizedWeight
from ds_kernels.ops.paged_attention import paged_attention, write_kv
from ds_kernels.ops.rms_norm import rms_norm
from ds_kernels.ops.rope import rope

__all__ = ["decode"]


def decode(
    model: DecodeModel, tokens: Tensor, positions: Tensor, slots: Tensor, block_tables: Tensor, context_lens: Tensor,
    k_caches: Sequence[Tensor], v_caches: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """As the reference, rounded to the model's dtype between operations."""
    x = _embed(model, tokens, positions)
    for layer, k_cache, v_cache in zip(model.layers, k_caches, v_caches, strict=True):
        h = _norm(x, layer.attention_norm)
        a = _attention(model, layer, h, positions, slots, block_tables, context_lens, k_cache, v_cache)
        a = _project(a, layer.output)
        if layer.attention_out_norm is not None:
            a = _norm(a, layer.attention_out_norm)
        x = x + a
        m = _mlp(model, layer, h if layer.mlp_norm is None else _norm(x, layer.mlp_norm))
        x = x + (m if layer.mlp_out_norm is None else _norm(m, layer.mlp_out_norm))
    logits = _project(_norm(x, model.final_norm), model.head).float()
    if model.logit_softcap is not None:
        logits = model.logit_softcap * torch.tanh(logits / model.logit_softcap)
    return logits


def _embed(model: DecodeModel, tokens: Tensor, positions: Tensor) -> Tensor:
    table = model.embedding
    if isinstance(table, QuantizedWeight):
        x = _quantised_rows(table, tokens).to(model.final_norm.weight.dtype)
    else:
        x = table[tokens.long()]
    if model.embedding_scale != 1.0:
        x = x * scale_of(model)
    if model.positions is not None:
        x = x + model.positions[positions.long() + model.position_offset].to(x.dtype)
    return x


def _quantised_rows(table: QuantizedWeight, tokens: Tensor) -> Tensor:
    """Rows of a quantised matrix by number, as fp32, without the rest of it."""
    panel, lane = tokens.long() // 16, tokens.long() % 16
    packed = table.codes[panel, :, lane]  # [B, quads (or pairs of them), 4]
    if table.bits == 4:
        packed = torch.stack([packed & 15, packed >> 4], 2)
    codes = packed.reshape(len(tokens), -1).float() - (1 << (table.bits - 1))
    group = torch.arange(codes.shape[1], device=codes.device) // table.group_size
    rows = codes * table.scale[panel, :, lane].float()[:, group]
    if table.centre is not None:
        rows = rows + table.centre[panel, :, lane].float()[:, group]
    return rows[:, : table.columns]


def _norm(x: Tensor, norm: Norm) -> Tensor:
    weight = norm.weight if norm.offset == 0.0 else norm.weight.float() + norm.offset
    if norm.kind == "rms":
        return rms_norm(x, weight, eps=norm.eps)
    return layer_norm(x, weight, norm.bias, eps=norm.eps)


def _project(x: Tensor, projection: Projection) -> Tensor:
    return linear(x, projection.weight, projection.bias)


def _attention(
    model: DecodeModel, layer: DecodeLayer, h: Tensor, positions: Tensor, slots: Tensor, block_tables: Tensor,
    context_lens: Tensor, k_cache: Tensor, v_cache: Tensor,
) -> Tensor:  # fmt: skip
    heads, kv_heads, dim = model.heads, model.kv_heads, model.head_dim
    fused = _project(h, layer.qkv).view(len(h), heads + 2 * kv_heads, dim)
    q, k, v = fused.split([heads, kv_heads, kv_heads], 1)
    if layer.query_norm is not None:
        q = _norm(q.contiguous(), layer.query_norm)
    if layer.key_norm is not None:
        k = _norm(k.contiguous(), layer.key_norm)
    if layer.rope is not None:
        cos, sin = (part[positions.long()].unsqueeze(1) for part in (layer.rope.cos, layer.rope.sin))
        q, k = (part.squeeze(2) for part in rope(q.unsqueeze(2), k.unsqueeze(2), cos, sin))
    write_kv(k.to(k_cache.dtype), v.to(v_cache.dtype), k_cache, v_cache, slots)
    if model.attention_softcap is None:
        found = paged_attention(
            q.to(k_cache.dtype), k_cache, v_cache, block_tables, context_lens, max_seqlen_q=1,
            scale=model.attention_scale, window=layer.window,
        )  # fmt: skip
    else:
        found = _capped(model, layer.window, q, k_cache, v_cache, block_tables, context_lens)
    return found.flatten(1).to(h.dtype)


def _capped(
    model: DecodeModel, window: int | None, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor,
    context_lens: Tensor,
) -> Tensor:  # fmt: skip
    """Attention with a softcap, over every block of the table."""
    assert model.attention_softcap is not None
    pages = block_tables.long().clamp(0, k_cache.shape[0] - 1)
    keys, values = (cache[pages].transpose(1, 2).flatten(2, 3).float() for cache in (k_cache, v_cache))
    place = torch.arange(keys.shape[2], device=q.device)
    lengths = context_lens.long().unsqueeze(1)
    seen = place < lengths if window is None else (place < lengths) & (place >= lengths - window)
    keys, values = (part.masked_fill(~seen[:, None, :, None], 0.0) for part in (keys, values))
    grouped = q.float().unflatten(1, (model.kv_heads, -1))
    scale = q.shape[-1] ** -0.5 if model.attention_scale is None else model.attention_scale
    scores = model.attention_softcap * torch.tanh(grouped @ keys.mT * (scale / model.attention_softcap))
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    return (weights @ values).flatten(1, 2)


def _mlp(model: DecodeModel, layer: DecodeLayer, h: Tensor) -> Tensor:
    up = _project(h, layer.up)
    if not model.gated:
        return _project(ACTIVATIONS[model.activation](up), layer.down)
    gate, plain = up.chunk(2, -1)
    if model.activation == "silu":
        return _project(swiglu(gate.contiguous(), plain.contiguous()), layer.down)
    return _project(ACTIVATIONS[model.activation](gate) * plain, layer.down)
