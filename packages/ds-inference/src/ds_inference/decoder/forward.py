"""One pass over the layers, out of ds-kernels' operations: prompts, chunks of them, decoding, or all in one batch.

    h = norm(x);  a = output(attention(qkv(h)));  x = x + a;  x = x + down(act(up(norm(x))))

Invariant: a token's result depends on its own sequence only, whatever else is in the batch (but for the order in which
a matrix product of another size adds up).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_inference.decoder.attention import softcapped_attention
from ds_inference.decoder.batch import Batch
from ds_kernels import geglu, layer_norm, linear, paged_attention, rms_norm, rope, swiglu, write_kv
from ds_kernels.ops.decode.model import Activation, DecodeLayer, DecodeModel, Norm, RopeTable

__all__ = ["forward"]


def forward(model: DecodeModel, batch: Batch, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor]) -> Tensor:
    """fp32 logits [n, vocabulary]; as `Decoder.forward`."""
    x = _embed(model, batch)
    angles = {id(layer.rope): _angles(layer.rope, batch.positions) for layer in model.layers if layer.rope is not None}
    for layer, k_cache, v_cache in zip(model.layers, k_caches, v_caches, strict=True):
        turn = None if layer.rope is None else angles[id(layer.rope)]
        x = _layer(model, layer, x, batch, turn, k_cache, v_cache)
    if batch.logits_at is not None:
        x = x[batch.logits_at]
    logits = linear(_norm(model.final_norm, x), model.head.weight, model.head.bias).float()
    if model.logit_softcap is not None:
        logits = logits.div_(model.logit_softcap).tanh_().mul_(model.logit_softcap)
    return logits


def _embed(model: DecodeModel, batch: Batch) -> Tensor:
    assert isinstance(model.embedding, Tensor)
    x = torch.nn.functional.embedding(batch.tokens, model.embedding)
    if model.embedding_scale != 1.0:
        x = x * torch.tensor(model.embedding_scale, dtype=x.dtype, device=x.device)
    if model.positions is not None:
        x = x + torch.nn.functional.embedding(batch.positions + model.position_offset, model.positions)
    return x


def _angles(table: RopeTable, positions: Tensor) -> tuple[Tensor, Tensor]:
    return table.cos[positions], table.sin[positions]


def _layer(
    model: DecodeModel, layer: DecodeLayer, x: Tensor, batch: Batch, turn: tuple[Tensor, Tensor] | None,
    k_cache: Tensor, v_cache: Tensor,
) -> Tensor:  # fmt: skip
    h = _norm(layer.attention_norm, x)
    found = _attention(model, layer, h, batch, turn, k_cache, v_cache)
    a = linear(found, layer.output.weight, layer.output.bias)
    if layer.attention_out_norm is not None:
        a = _norm(layer.attention_out_norm, a)
    if layer.mlp_norm is None:
        x = x + a
    else:
        h, x = _add_norm(layer.mlp_norm, a, x)
    m = linear(_mlp(model, layer, h), layer.down.weight, layer.down.bias)
    if layer.mlp_out_norm is not None:
        m = _norm(layer.mlp_out_norm, m)
    return x + m


def _attention(
    model: DecodeModel, layer: DecodeLayer, h: Tensor, batch: Batch, turn: tuple[Tensor, Tensor] | None,
    k_cache: Tensor, v_cache: Tensor,
) -> Tensor:  # fmt: skip
    """[T, heads * head_dim]."""
    heads, kv_heads = model.heads, model.kv_heads
    fused = linear(h, layer.qkv.weight, layer.qkv.bias).view(len(h), heads + 2 * kv_heads, model.head_dim)
    q, k, v = fused.split((heads, kv_heads, kv_heads), 1)
    if layer.query_norm is not None and layer.key_norm is not None:
        q, k = _norm(layer.query_norm, q), _norm(layer.key_norm, k)
    if turn is not None:
        turned = rope(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *turn)
        q, k = (part[0].transpose(0, 1) for part in turned)
    write_kv(k, v, k_cache, v_cache, batch.slots)
    if model.attention_softcap is not None:
        return softcapped_attention(model, layer, q, k_cache, v_cache, batch).flatten(1)
    return paged_attention(
        q, k_cache, v_cache, batch.block_tables, batch.context_lens, cu_seqlens_q=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen, scale=model.attention_scale, window=layer.window,
    ).flatten(1)  # fmt: skip


def _mlp(model: DecodeModel, layer: DecodeLayer, h: Tensor) -> Tensor:
    """[T, intermediate]."""
    up = linear(h, layer.up.weight, layer.up.bias)
    if not model.gated:
        return _activate(model.activation, up)
    gate, up = up.chunk(2, -1)
    if model.activation == "silu":
        return swiglu(gate, up)
    if model.activation == "relu":
        return gate.relu() * up
    return geglu(gate, up, "tanh" if model.activation == "gelu_tanh" else "none")


def _activate(kind: Activation, x: Tensor) -> Tensor:
    if kind == "relu":
        return x.relu_()
    if kind == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def _norm(norm: Norm, x: Tensor) -> Tensor:
    if norm.kind == "layer":
        return layer_norm(x, norm.weight, norm.bias, norm.eps)
    return rms_norm(x, norm.weight, norm.eps, offset=norm.offset)


def _add_norm(norm: Norm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual)."""
    if norm.kind == "layer":
        return layer_norm(x, norm.weight, norm.bias, norm.eps, residual=residual)
    return rms_norm(x, norm.weight, norm.eps, offset=norm.offset, residual=residual)
