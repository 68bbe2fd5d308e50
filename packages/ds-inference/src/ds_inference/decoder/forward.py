"""One pass over the layers, out of ds-kernels' operations: prompts, chunks of them, decoding, or all in one batch.

    h = norm(x);  a = output(attention(qkv(h)));  x = x + a;  x = x + down(act(up(norm(x))))

Invariant: a token's result depends on its own sequence only, whatever else is in the batch (but for the order in which
a matrix product of another size adds up).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_inference.decoder.attention import softcapped_attention
from ds_inference.decoder.batch import Batch
from ds_inference.decoder.parallel import Parallel
from ds_kernels import (
    DecodeLayer,
    DecodeModel,
    Norm,
    Projection,
    QuantizedWeight,
    geglu,
    layer_norm,
    linear,
    paged_attention,
    rms_norm,
    rope,
    swiglu,
    write_kv,
)
from ds_kernels.ops.decode.model import Activation

__all__ = ["Forward"]

WIDE_ROWS = 16
"""Rows whose logits are computed in fp32 from 16-bit weights on a CPU."""
WIDE_OUTPUTS = 4096
"""Rows of the head that are widened at a time, small enough for the cache."""

_Angles = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Forward:
    """The pass over one model; `parallel` on a tensor-parallel rank, `activation_bits` of quantised layers' inputs."""

    model: DecodeModel
    parallel: Parallel | None = None
    activation_bits: int | None = None

    def __call__(self, batch: Batch, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor]) -> Tensor:
        """fp32 logits [n, vocabulary]; as `Decoder.forward`."""
        model = self.model
        if batch.cu_seqlens is None:
            starts = torch.arange(len(batch.tokens) + 1, dtype=torch.int32, device=batch.tokens.device)
            batch = dataclasses.replace(batch, cu_seqlens=starts)
        x = self._embed(batch)
        tables = {id(layer.rope): layer.rope for layer in model.layers if layer.rope is not None}
        angles = {key: (table.cos[batch.positions], table.sin[batch.positions]) for key, table in tables.items()}
        wanted = [None] * (len(model.layers) - 1) + [batch.logits_at]  # after the last attention, only those rows
        for layer, k_cache, v_cache, rows in zip(model.layers, k_caches, v_caches, wanted, strict=True):
            x = self._layer(layer, x, batch, angles.get(id(layer.rope)), k_cache, v_cache, rows)
        logits = self._logits(_norm(model.final_norm, x))
        if model.logit_softcap is not None:
            logits = logits.div_(model.logit_softcap).tanh_().mul_(model.logit_softcap)
        return logits

    def _logits(self, x: Tensor) -> Tensor:
        """fp32 logits of normed rows. Of a few rows they are not rounded to 16 bits on the way, as in a program's
        step: equal ones would be many, and which token is the greatest would depend on how it was computed."""
        head, weight = self.model.head, self.model.head.weight
        few = x.device.type == "cpu" and len(x) <= WIDE_ROWS and x.dtype in (torch.bfloat16, torch.float16)
        if few and self.parallel is None and isinstance(weight, Tensor):
            wide = x.float()
            parts = [torch.nn.functional.linear(wide, part.float()) for part in weight.split(WIDE_OUTPUTS)]
            logits = torch.cat(parts, 1)
            return logits if head.bias is None else logits.add_(head.bias)
        logits = self._project(head, x)
        return (logits if self.parallel is None else self.parallel.logits(logits)).float()

    def _embed(self, batch: Batch) -> Tensor:
        model, table = self.model, self.model.embedding
        assert isinstance(table, Tensor)
        if self.parallel is None:
            x = torch.nn.functional.embedding(batch.tokens, table)
        else:
            x = self.parallel.embed(batch.tokens, table)
        if model.embedding_scale != 1.0:
            x = x * torch.tensor(model.embedding_scale, dtype=x.dtype, device=x.device)
        if model.positions is not None:
            x = x + torch.nn.functional.embedding(batch.positions + model.position_offset, model.positions)
        return x

    def _layer(
        self, layer: DecodeLayer, x: Tensor, batch: Batch, angles: _Angles | None, k_cache: Tensor, v_cache: Tensor,
        rows: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """What the next layer reads, of these rows (None: all)."""
        h = _norm(layer.attention_norm, x)
        found = self._attention(layer, h, batch, angles, k_cache, v_cache)
        if rows is not None:
            found, x, h = found[rows], x[rows], h[rows]
        a = self._project(layer.output, found)
        if layer.attention_out_norm is not None:
            a = _norm(layer.attention_out_norm, a)
        if layer.mlp_norm is None:
            x = x + a
        else:
            h, x = _add_norm(layer.mlp_norm, a, x)
        m = self._project(layer.down, self._features(layer, h))
        if layer.mlp_out_norm is not None:
            m = _norm(layer.mlp_out_norm, m)
        return x + m

    def _attention(
        self, layer: DecodeLayer, h: Tensor, batch: Batch, angles: _Angles | None, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        """[T, heads * head_dim]."""
        model = self.model
        heads, kv_heads = model.heads, model.kv_heads
        fused = self._project(layer.qkv, h).view(len(h), heads + 2 * kv_heads, model.head_dim)
        if layer.query_norm is not None and layer.key_norm is not None:
            q, k, v = fused.split((heads, kv_heads, kv_heads), 1)
            q, k = _norm(layer.query_norm, q), _norm(layer.key_norm, k)
            if angles is not None:
                q, k = (x.squeeze(0).transpose(0, 1) for x in rope(_by_head(q), _by_head(k), *angles))
        else:
            both, v = fused.split((heads + kv_heads, kv_heads), 1)
            if angles is not None:  # queries and keys are turned together, "keys" of no heads being nothing to do
                both = rope(_by_head(both), _by_head(both[:, :0]), *angles)[0].squeeze(0).transpose(0, 1)
            q, k = both.split((heads, kv_heads), 1)
        write_kv(k, v, k_cache, v_cache, batch.slots)
        if model.attention_softcap is not None:
            return softcapped_attention(model, layer, q, k_cache, v_cache, batch).flatten(1)
        return paged_attention(
            q, k_cache, v_cache, batch.block_tables, batch.context_lens, cu_seqlens_q=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen, scale=model.attention_scale, window=layer.window,
        ).flatten(1)  # fmt: skip

    def _features(self, layer: DecodeLayer, h: Tensor) -> Tensor:
        """[T, intermediate]: what the MLP's last projection reads."""
        kind = self.model.activation
        up = self._project(layer.up, h)
        if not self.model.gated:
            return _activate(kind, up)
        gate, up = up.chunk(2, -1)
        if kind == "silu":
            return swiglu(gate, up)
        if kind == "relu":
            return gate.relu() * up
        return geglu(gate, up, "tanh" if kind == "gelu_tanh" else "none")

    def _project(self, projection: Projection, x: Tensor) -> Tensor:
        weight, bias = projection.weight, projection.bias
        bits = self.activation_bits if isinstance(weight, QuantizedWeight) else None
        if self.parallel is None or id(projection) not in self.parallel.summed:
            return linear(x, weight, bias, activation_bits=bits)
        total = self.parallel.sum(linear(x, weight, activation_bits=bits), "projection")
        return total if bias is None else total + bias


def _by_head(x: Tensor) -> Tensor:
    """[1, heads, T, head_dim] of [T, heads, head_dim]."""
    return x.transpose(0, 1).unsqueeze(0)


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
