"""The specification of decode: plain torch over `DecodeModel`, in at least fp32 between weights and caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ds_kernels._reference import wide
from ds_kernels.ops.decode.model import DecodeLayer, DecodeModel, Norm, Projection, RopeTable
from ds_kernels.ops.linear.weight import QuantizedWeight
from ds_kernels.ops.paged_attention.reference import gather_pages, write_kv

__all__ = ["ACTIVATIONS", "attend", "decode", "embed", "scale_of"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def decode(
    model: DecodeModel, tokens: Tensor, positions: Tensor, slots: Tensor, block_tables: Tensor, context_lens: Tensor,
    k_caches: Sequence[Tensor], v_caches: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """Logits [B, vocabulary] of one new token for each of B sequences, whose keys and values go into the caches."""
    x = embed(model, tokens, positions)
    for layer, k_cache, v_cache in zip(model.layers, k_caches, v_caches, strict=True):
        h = _norm(x, layer.attention_norm)
        a = _attention(model, layer, h, positions, slots, block_tables, context_lens, k_cache, v_cache)
        a = _project(a, layer.output)
        if layer.attention_out_norm is not None:
            a = _norm(a, layer.attention_out_norm)
        x = x + a
        m = _mlp(model, layer, h if layer.mlp_norm is None else _norm(x, layer.mlp_norm))
        x = x + (m if layer.mlp_out_norm is None else _norm(m, layer.mlp_out_norm))
    logits = _project(_norm(x, model.final_norm), model.head)
    if model.logit_softcap is not None:
        logits = model.logit_softcap * torch.tanh(logits / model.logit_softcap)
    return logits.float()


def scale_of(model: DecodeModel) -> float:
    """The embedding's factor, as the embedding's dtype holds it."""
    dtype = torch.float32 if isinstance(model.embedding, QuantizedWeight) else model.embedding.dtype
    return float(torch.tensor(model.embedding_scale, dtype=dtype))


def embed(model: DecodeModel, tokens: Tensor, positions: Tensor) -> Tensor:
    """[B, hidden]: what the first layer reads."""
    table = model.embedding
    rows = table.dequantize() if isinstance(table, QuantizedWeight) else table
    x = wide(rows[tokens.long()]) * scale_of(model)
    if model.positions is not None:
        x = x + wide(model.positions[positions.long() + model.position_offset])
    return x


def _norm(x: Tensor, norm: Norm) -> Tensor:
    weight = wide(norm.weight) + norm.offset
    if norm.kind == "rms":
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * weight
    bias = None if norm.bias is None else norm.bias.to(x.dtype)
    return functional.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias, norm.eps)


def _project(x: Tensor, projection: Projection) -> Tensor:
    weight = projection.weight
    matrix = weight.dequantize(x.dtype) if isinstance(weight, QuantizedWeight) else weight.to(x.dtype)
    return functional.linear(x, matrix, None if projection.bias is None else projection.bias.to(x.dtype))


def _rope(x: Tensor, table: RopeTable, positions: Tensor) -> Tensor:
    """x [B, heads, dim]."""
    cos, sin = (part[positions.long()].to(x.dtype).unsqueeze(1) for part in (table.cos, table.sin))
    half = cos.shape[-1]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], -1)


def _attention(
    model: DecodeModel, layer: DecodeLayer, h: Tensor, positions: Tensor, slots: Tensor, block_tables: Tensor,
    context_lens: Tensor, k_cache: Tensor, v_cache: Tensor,
) -> Tensor:  # fmt: skip
    heads, kv_heads, dim = model.heads, model.kv_heads, model.head_dim
    parts = _project(h, layer.qkv).view(len(h), heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], 1)
    q, k, v = parts
    if layer.query_norm is not None:
        q = _norm(q, layer.query_norm)
    if layer.key_norm is not None:
        k = _norm(k, layer.key_norm)
    if layer.rope is not None:
        q, k = _rope(q, layer.rope, positions), _rope(k, layer.rope, positions)
    write_kv(k, v, k_cache, v_cache, slots)
    out = torch.zeros_like(q)
    for i, length in enumerate(context_lens.tolist()):
        if length:
            keys, values = (gather_pages(cache, block_tables[i], length)[0] for cache in (k_cache, v_cache))
            out[i] = attend(model, layer.window, q[i], keys, values)
    return out.flatten(1)


def attend(model: DecodeModel, window: int | None, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[heads, dim]: one sequence's query [heads, dim] over keys and values [kv_heads, length, dim]."""
    if window is not None:
        keys, values = keys[:, -window:], values[:, -window:]
    grouped = q.view(model.kv_heads, -1, q.shape[-1])
    scale = q.shape[-1] ** -0.5 if model.attention_scale is None else model.attention_scale
    scores = grouped @ keys.to(q.dtype).mT * scale
    if model.attention_softcap is not None:
        scores = model.attention_softcap * torch.tanh(scores / model.attention_softcap)
    return (scores.softmax(-1) @ values.to(q.dtype)).view(q.shape)


def _mlp(model: DecodeModel, layer: DecodeLayer, h: Tensor) -> Tensor:
    act = ACTIVATIONS[model.activation]
    up = _project(h, layer.up)
    if not model.gated:
        return _project(act(up), layer.down)
    gate, up = up.chunk(2, -1)
    return _project(act(gate) * up, layer.down)
