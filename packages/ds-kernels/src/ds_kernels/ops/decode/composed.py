"""The pass over the layers, out of this package's operations: GPUs, prompts, and CPUs where no program can be bound.

    h = norm(x);  a = output(attention(qkv(h)));  x = x + a;  x = x + down(act(up(norm(x))))

`Composition` is the only such pass beside the specification (`reference`) and the one launch of `cpu_numba`. It takes
any batch: prompts, chunks of them, one token each, or all together. Whoever computes a part of a model (a
tensor-parallel rank) overrides `tokens_embedded`, `project` and `head`. Activations are of the model's dtype between
operations. On a GPU nothing waits for the device when every sequence has one token, so it can be captured in a CUDA
graph.

Invariant: a token's result depends on its own sequence only, whatever else is in the batch (but for the order in which
a matrix product of another size adds up).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_kernels.ops.decode.eager import EagerSteps, takes_eager
from ds_kernels.ops.decode.model import DecodeLayer, DecodeModel, Projection
from ds_kernels.ops.decode.reference import scale_of
from ds_kernels.ops.decode.steps import NewTokens, Steps
from ds_kernels.ops.linear import linear
from ds_kernels.ops.linear.cpu import by_vectors, takes_vectors
from ds_kernels.ops.linear.weight import QuantizedWeight

__all__ = ["Composition", "OneEach", "decode"]

WIDE_ROWS = 16
"""Rows whose logits are computed in fp32 from 16-bit weights on a CPU."""
WIDE_OUTPUTS = 2048
"""Rows of the head that are widened at a time, small enough for the cache."""
REFINED = 256
"""Logits of a row that are computed again in fp32: far more than could be the greatest one but for its rounding."""


class OneEach(NamedTuple):
    """`NewTokens` of `decode`."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    context_lens: Tensor
    cu_seqlens: Tensor | None = None
    logits_at: Tensor | None = None
    max_seqlen: int = 1


def decode(
    model: DecodeModel, tokens: Tensor, positions: Tensor, slots: Tensor, block_tables: Tensor, context_lens: Tensor,
    k_caches: Sequence[Tensor], v_caches: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """As the reference, rounded to the model's dtype between operations."""
    new = OneEach(tokens.long(), positions.long(), slots, block_tables, context_lens)
    return Composition(model)(new, k_caches, v_caches)


@dataclasses.dataclass(frozen=True)
class Composition:
    """The pass over one model; `activation_bits` of what goes into quantised layers, None: as it is."""

    model: DecodeModel
    activation_bits: int | None = None

    def __call__(self, new: NewTokens, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor]) -> Tensor:
        """fp32 logits [n, vocabulary]; keys and values of the new tokens go into the caches."""
        model = self.model
        x = self._embed(new)
        steps = EagerSteps(model, new, k_caches[0]) if takes_eager(model, new) else Steps(model, new)
        wanted = [None] * (len(model.layers) - 1) + [new.logits_at]  # after the last attention, only those rows
        for layer, k_cache, v_cache, rows in zip(model.layers, k_caches, v_caches, wanted, strict=True):
            x = self._layer(layer, x, steps, k_cache, v_cache, rows)
        logits = self.head(steps.norm(model.final_norm, x))
        if model.logit_softcap is not None:
            logits = logits.div_(model.logit_softcap).tanh_().mul_(model.logit_softcap)
        return logits

    # -- what a tensor-parallel rank does another way

    def tokens_embedded(self, tokens: Tensor) -> Tensor:
        """[T, hidden]: rows of the embedding."""
        table = self.model.embedding
        if isinstance(table, QuantizedWeight):
            return _quantised_rows(table, tokens).to(self.model.final_norm.weight.dtype)
        return torch.nn.functional.embedding(tokens, table)

    def project(self, projection: Projection, x: Tensor) -> Tensor:
        """[..., outputs]."""
        weight, bias = projection.weight, projection.bias
        if isinstance(weight, QuantizedWeight):
            return linear(x, weight, bias, activation_bits=self.activation_bits)
        if x.device.type == "cpu" and takes_vectors(x, weight, bias):  # at once: `linear` looks at its arguments again
            return by_vectors(x, weight, bias)
        return linear(x, weight, bias)

    def head(self, x: Tensor) -> Tensor:
        """fp32 logits of normed rows. Of a few rows they are not rounded to 16 bits on the way, as in a program's
        step: equal ones would be many, and which token is the greatest would depend on how it was computed."""
        head, weight = self.model.head, self.model.head.weight
        few = x.device.type == "cpu" and len(x) <= WIDE_ROWS and x.dtype in (torch.bfloat16, torch.float16)
        if few and isinstance(weight, Tensor):
            logits = _refined(x, weight) if takes_vectors(x, weight, None) else _widened(x, weight)
            return logits if head.bias is None else logits.add_(head.bias)
        return self.project(head, x).float()

    # -- the pass

    def _embed(self, new: NewTokens) -> Tensor:
        model = self.model
        x = self.tokens_embedded(new.tokens)
        if model.embedding_scale != 1.0:
            x = x * scale_of(model)
        if model.positions is not None:
            learned = torch.nn.functional.embedding(new.positions + model.position_offset, model.positions)
            x = x + learned.to(x.dtype)
        return x

    def _layer(
        self, layer: DecodeLayer, x: Tensor, steps: Steps, k_cache: Tensor, v_cache: Tensor, rows: Tensor | None
    ) -> Tensor:
        """What the next layer reads, of these rows (None: all)."""
        h = steps.norm(layer.attention_norm, x)
        found = steps.attention(layer, self.project(layer.qkv, h), k_cache, v_cache)
        if rows is not None:
            found, x, h = found[rows], x[rows], h[rows]
        a = self.project(layer.output, found)
        if layer.attention_out_norm is not None:
            a = steps.norm(layer.attention_out_norm, a)
        if layer.mlp_norm is None:
            x = x + a
        else:
            h, x = steps.add_norm(layer.mlp_norm, a, x)
        m = self.project(layer.down, steps.features(self.project(layer.up, h)))
        if layer.mlp_out_norm is not None:
            m = steps.norm(layer.mlp_out_norm, m)
        return x + m


def _widened(x: Tensor, weight: Tensor) -> Tensor:
    """fp32 logits from 16-bit weights, of which some rows are fp32 at a time."""
    wide, logits = x.float(), torch.empty(len(x), len(weight))
    room = torch.empty(min(WIDE_OUTPUTS, len(weight)), weight.shape[1])
    for first in range(0, len(weight), WIDE_OUTPUTS):
        part = weight[first : first + WIDE_OUTPUTS]
        torch.mm(wide, room[: len(part)].copy_(part).t(), out=logits[:, first : first + WIDE_OUTPUTS])
    return logits


def _refined(x: Tensor, weight: Tensor) -> Tensor:
    """The same where a product in 16 bits is several times as fast: only the greatest logits are computed again."""
    logits = by_vectors(x, weight).float()
    for row, own in zip(x.float(), logits, strict=True):
        greatest = own.topk(min(REFINED, len(own)), sorted=False).indices
        own[greatest] = torch.mv(weight[greatest].float(), row)
    return logits


def _quantised_rows(table: QuantizedWeight, tokens: Tensor) -> Tensor:
    """Rows of a quantised matrix by number, as fp32, without the rest of it."""
    panel, lane = tokens // 16, tokens % 16
    packed = table.codes[panel, :, lane]  # [B, quads (or pairs of them), 4]
    if table.bits == 4:
        packed = torch.stack([packed & 15, packed >> 4], 2)
    codes = packed.reshape(len(tokens), -1).float() - (1 << (table.bits - 1))
    group = torch.arange(codes.shape[1], device=codes.device) // table.group_size
    rows = codes * table.scale[panel, :, lane].float()[:, group]
    if table.centre is not None:
        rows = rows + table.centre[panel, :, lane].float()[:, group]
    return rows[:, : table.columns]
