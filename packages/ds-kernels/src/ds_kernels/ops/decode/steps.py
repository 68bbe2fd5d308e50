"""`Steps`: what a pass over the layers does between its matrix products, out of this package's operations.

Made anew for every pass: it holds what all layers share (rotary angles of the tokens, where their sequences begin).
Attention with a soft cap of the scores (Gemma 2), which the fused kernels do not have, is plain torch in fp32:

    weights = softmax(cap * tanh(scale * q k^T / cap))

Source of it: Gemma Team 2024, "Gemma 2" (arXiv:2408.00118), section 2.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ds_kernels.ops.decode.model import Activation, DecodeLayer, DecodeModel, Norm
from ds_kernels.ops.glu import geglu, swiglu
from ds_kernels.ops.layer_norm import layer_norm
from ds_kernels.ops.paged_attention import paged_attention, write_kv
from ds_kernels.ops.rms_norm import rms_norm
from ds_kernels.ops.rope import rope

__all__ = ["NewTokens", "Steps"]


class NewTokens(Protocol):
    """What a pass computes: tokens of S sequences, one sequence after the other, without padding.

    Attributes:
        tokens, positions, slots: [T], as for `decode`.
        block_tables, context_lens: [S, blocks] and [S], as for `decode`.
        cu_seqlens: [S + 1] int32, tokens cu_seqlens[i] to cu_seqlens[i + 1] are sequence i's; None: one each.
        logits_at: [n], the tokens whose logits are wanted; None: all.
        max_seqlen: the most new tokens of a sequence.
    """

    @property
    def tokens(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def slots(self) -> Tensor: ...
    @property
    def block_tables(self) -> Tensor: ...
    @property
    def context_lens(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor | None: ...
    @property
    def logits_at(self) -> Tensor | None: ...
    @property
    def max_seqlen(self) -> int: ...


class Steps:
    """The steps of one pass: `model` over the tokens `new`."""

    def __init__(self, model: DecodeModel, new: NewTokens) -> None:
        self.model, self.new = model, new
        self.starts = new.cu_seqlens
        if self.starts is None:
            self.starts = torch.arange(len(new.tokens) + 1, dtype=torch.int32, device=new.tokens.device)
        tables = {id(layer.rope): layer.rope for layer in model.layers if layer.rope is not None}
        self.angles = {key: (table.cos[new.positions], table.sin[new.positions]) for key, table in tables.items()}

    def norm(self, norm: Norm, x: Tensor) -> Tensor:
        """norm(x) over the last dimension."""
        if norm.kind == "layer":
            return layer_norm(x, _shifted(norm), norm.bias, norm.eps)
        return rms_norm(x, norm.weight, norm.eps, offset=norm.offset)

    def add_norm(self, norm: Norm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        if norm.kind == "layer":
            return layer_norm(x, _shifted(norm), norm.bias, norm.eps, residual=residual)
        return rms_norm(x, norm.weight, norm.eps, offset=norm.offset, residual=residual)

    def attention(self, layer: DecodeLayer, fused: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """[T, heads * head_dim] of [T, (heads + 2 * kv_heads) * head_dim]; keys and values go into the caches."""
        model, angles = self.model, self.angles.get(id(layer.rope))
        heads, kv_heads = model.heads, model.kv_heads
        fused = fused.view(len(fused), heads + 2 * kv_heads, model.head_dim)
        if layer.query_norm is not None or layer.key_norm is not None:
            q, k, v = fused.split((heads, kv_heads, kv_heads), 1)
            q = q if layer.query_norm is None else self.norm(layer.query_norm, q)
            k = k if layer.key_norm is None else self.norm(layer.key_norm, k)
            if angles is not None:
                q, k = (x.squeeze(0).transpose(0, 1) for x in rope(_by_head(q), _by_head(k), *angles))
        else:
            both, v = fused.split((heads + kv_heads, kv_heads), 1)
            if angles is not None:  # queries and keys are turned together, "keys" of no heads being nothing to do
                both = rope(_by_head(both), _by_head(both[:, :0]), *angles)[0].squeeze(0).transpose(0, 1)
            q, k = both.split((heads, kv_heads), 1)
        write_kv(k, v, k_cache, v_cache, self.new.slots)
        if model.attention_softcap is not None:
            return self._capped(layer.window, q, k_cache, v_cache).flatten(1)
        return paged_attention(
            q.to(k_cache.dtype), k_cache, v_cache, self.new.block_tables, self.new.context_lens,
            cu_seqlens_q=self.starts, max_seqlen_q=self.new.max_seqlen, scale=model.attention_scale,
            window=layer.window,
        ).flatten(1).to(q.dtype)  # fmt: skip

    def features(self, up: Tensor) -> Tensor:
        """[T, intermediate]: what the MLP's last projection reads, of what its first gave."""
        kind = self.model.activation
        if not self.model.gated:
            return _activate(kind, up)
        gate, up = up.chunk(2, -1)
        if kind == "silu":
            return swiglu(gate, up)
        if kind == "relu":
            return gate.relu() * up
        return geglu(gate, up, "tanh" if kind == "gelu_tanh" else "none")

    # -- attention with a soft cap

    def _capped(self, window: int | None, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """[T, heads, head_dim]; a query that sees no key gets zeros."""
        if self.new.cu_seqlens is None and q.device.type != "cpu":
            return self._capped_masked(window, q, k_cache, v_cache)
        return self._capped_each(window, q, k_cache, v_cache)

    def _scale(self) -> float:
        given = self.model.attention_scale
        return self.model.head_dim**-0.5 if given is None else given

    def _capped_masked(self, window: int | None, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """One query per sequence over every block of its table: nothing waits for the device."""
        cap, new = self.model.attention_softcap, self.new
        assert cap is not None
        pages = new.block_tables.long().clamp(0, k_cache.shape[0] - 1)
        keys, values = (cache[pages].transpose(1, 2).flatten(2, 3).float() for cache in (k_cache, v_cache))
        place = torch.arange(keys.shape[2], device=q.device)
        lengths = new.context_lens.long().unsqueeze(1)
        seen = place < lengths if window is None else (place < lengths) & (place >= lengths - window)
        keys, values = (part.masked_fill(~seen[:, None, :, None], 0.0) for part in (keys, values))
        grouped = q.float().unflatten(1, (self.model.kv_heads, -1))
        scores = cap * torch.tanh(grouped @ keys.mT * (self._scale() / cap))
        weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1).nan_to_num(0.0)
        return (weights @ values).flatten(1, 2).to(q.dtype)

    def _capped_each(self, window: int | None, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Sequence by sequence."""
        cap = self.model.attention_softcap
        assert cap is not None and self.starts is not None
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lengths, starts = self.new.context_lens.tolist(), self.starts.tolist()
        group, size = self.model.heads // self.model.kv_heads, k_cache.shape[2]
        for index, length in enumerate(lengths):
            rows = slice(starts[index], starts[index + 1])
            count = rows.stop - rows.start
            if not count or not length:
                continue
            blocks = self.new.block_tables[index, : -(-length // size)].long()
            keys, values = (
                cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length].float().repeat_interleave(group, 0)
                for cache in (k_cache, v_cache)
            )
            scores = torch.matmul(q[rows].transpose(0, 1).float() * self._scale(), keys.transpose(1, 2))
            scores = scores.div_(cap).tanh_().mul_(cap)
            own = torch.arange(length - count, length, device=q.device)[:, None]
            ahead = torch.arange(length, device=q.device) - own
            hidden = ahead > 0
            if window is not None:
                hidden |= ahead <= -window
            weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
            out[rows] = torch.matmul(weights, values).transpose(0, 1).to(q.dtype)
        return out


def _shifted(norm: Norm) -> Tensor:
    """A layer norm's weight."""
    return norm.weight if norm.offset == 0.0 else norm.weight.float() + norm.offset


def _by_head(x: Tensor) -> Tensor:
    """[1, heads, T, head_dim] of [T, heads, head_dim]."""
    return x.transpose(0, 1).unsqueeze(0)


def _activate(kind: Activation, x: Tensor) -> Tensor:
    if kind == "relu":
        return x.relu_()
    if kind == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
