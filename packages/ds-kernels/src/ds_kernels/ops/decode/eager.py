"""`EagerSteps`: the steps of a pass of one token per sequence, for CPUs without numba.

There a token costs what torch's calls cost, so the calls are few: places, angles and masks are found once per pass,
and attention is one call for all sequences. A static cache is read where it lies, blocks in another order are gathered.
Rounding is that of `Steps`: fp32 inside of a step, the model's dtype between steps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ds_kernels._checks import require
from ds_kernels._cpu.launch import HAS_NUMBA
from ds_kernels._dispatch import backend_for
from ds_kernels._reference import wide
from ds_kernels.ops.decode.model import DecodeLayer, DecodeModel, Norm, RopeTable
from ds_kernels.ops.decode.reference import ACTIVATIONS
from ds_kernels.ops.decode.steps import NewTokens, Steps

__all__ = ["EagerSteps", "takes_eager"]


def takes_eager(model: DecodeModel, new: NewTokens) -> bool:
    """Whether these steps are for such a pass."""
    return (
        not HAS_NUMBA
        and new.tokens.device.type == "cpu"
        and new.cu_seqlens is None
        and model.attention_softcap is None
        and backend_for(new.tokens) == "cpu"
        and len(new.tokens) > 0
        and int(new.context_lens.min()) > 0  # padding attends to nothing
    )


class EagerSteps(Steps):
    """The steps of one pass over caches of `pages` blocks of `size` tokens."""

    def __init__(self, model: DecodeModel, new: NewTokens, cache: Tensor) -> None:
        self.model, self.new = model, new
        pages, size = cache.shape[0], cache.shape[2]
        lengths = new.context_lens.tolist()
        longest, self._shortest = max(lengths), min(lengths)
        width = new.block_tables.shape[1]
        require(
            longest <= width * size,
            f"decode: context_lens has {longest}; expected at most {width * size}, {width} pages of {size}",
        )
        self._longest, self._lengths = longest, new.context_lens
        self._masks: dict[int | None, Tensor | None] = {}
        self._find_pages(pages, size)
        slots = new.slots.long()
        self._written = None if int(slots.min()) >= 0 else (slots >= 0).nonzero().squeeze(1)
        slots = slots if self._written is None else slots[self._written]
        self._places = (slots // size, slots % size)
        highest = int(slots.max()) if len(slots) else 0
        require(highest < pages * size, f"decode: slots has {highest}; expected below {pages * size}, the cache's room")
        tables = {id(layer.rope): layer.rope for layer in model.layers if layer.rope is not None}
        self._turns = {key: _turn(table, new.positions, model.head_dim) for key, table in tables.items()}

    def _find_pages(self, pages: int, size: int) -> None:
        """Where the contexts lie: `_first`, a block for each in a row; or `_pages` to be gathered."""
        count = -(-self._longest // size)
        table = self.new.block_tables[:, :count].long()
        if self._shortest <= (count - 1) * size:  # what is behind a context's end may be anything
            needed = (self._lengths.long() + (size - 1)) // size
            table = table.masked_fill(torch.arange(count) >= needed[:, None], 0)
        low, high = (int(value) for value in table.aminmax())
        require(
            low >= 0 and high < pages, f"decode: block_tables names a page outside the cache's {pages}: {low} to {high}"
        )
        rows = len(table)
        in_order = count == 1 and (rows == 1 or bool((table[:, 0] == torch.arange(low, low + rows)).all()))
        self._first, self._count = (low if in_order else None), count
        self._pages = table.flatten()

    def norm(self, norm: Norm, x: Tensor) -> Tensor:
        """norm(x) over the last dimension."""
        if norm.kind == "layer":
            if (
                norm.offset == 0.0
                and norm.weight.dtype == x.dtype
                and (norm.bias is None or norm.bias.dtype == x.dtype)
            ):
                return functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
            return super().norm(norm, x)
        if norm.offset == 0.0 and norm.weight.dtype == x.dtype:
            return functional.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
        weight = wide(norm.weight) + norm.offset
        return functional.rms_norm(wide(x), x.shape[-1:], weight.to(wide(x).dtype), norm.eps).to(x.dtype)

    def add_norm(self, norm: Norm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        total = x + residual
        return self.norm(norm, total), total

    def attention(self, layer: DecodeLayer, fused: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """As `Steps.attention`."""
        model = self.model
        heads, kv_heads, dim, rows = model.heads, model.kv_heads, model.head_dim, len(fused)
        both, v = fused.view(rows, heads + 2 * kv_heads, dim).split_with_sizes((heads + kv_heads, kv_heads), 1)
        if layer.query_norm is not None or layer.key_norm is not None:
            q, k = both.split_with_sizes((heads, kv_heads), 1)
            q = q if layer.query_norm is None else self.norm(layer.query_norm, q)
            k = k if layer.key_norm is None else self.norm(layer.key_norm, k)
            both = torch.cat((q, k), 1)
        if layer.rope is not None:
            cos, sin, order = self._turns[id(layer.rope)]
            halves = wide(both)
            swapped = halves.roll(dim // 2, -1) if order is None else halves.index_select(-1, order)
            both = (halves * cos).addcmul_(swapped, sin).to(both.dtype)
        q, k = both.split_with_sizes((heads, kv_heads), 1)
        for new, cache in ((k, k_cache), (v, v_cache)):
            kept = new if self._written is None else new[self._written]
            cache.transpose(1, 2)[self._places] = kept.to(cache.dtype)
        keys, values = self._context(k_cache, layer.window), self._context(v_cache, layer.window)
        # Heads that share keys are queries beside one another.
        grouped = q.to(keys.dtype).reshape(rows, kv_heads, heads // kv_heads, dim)
        mask = self._mask(layer.window, keys.shape[2])
        found = functional.scaled_dot_product_attention(grouped, keys, values, mask, scale=model.attention_scale)
        return found.reshape(rows, heads * dim).to(fused.dtype)

    def features(self, up: Tensor) -> Tensor:
        """As `Steps.features`."""
        act = ACTIVATIONS[self.model.activation]
        if not self.model.gated:
            return act(up)
        gate, up = up.chunk(2, -1)
        return act(wide(gate)).mul_(up).to(up.dtype)

    def _context(self, cache: Tensor, window: int | None) -> Tensor:
        """[S, kv_heads, keys of the longest, head_dim]; of a single sequence only those that it sees."""
        rows = len(self._lengths)
        seen = 0 if window is None or rows > 1 else max(0, self._longest - window)
        if self._first is not None:
            return cache[self._first : self._first + rows, :, seen : self._longest]
        found = cache[self._pages]
        if self._count > 1:
            found = found.unflatten(0, (rows, self._count)).transpose(1, 2).flatten(2, 3)
        return found[:, :, seen : self._longest]

    def _mask(self, window: int | None, keys: int) -> Tensor | None:
        """[S, 1, 1, keys], True where a key is seen; None where all are."""
        if len(self._lengths) == 1 or (self._shortest == keys and (window is None or window >= keys)):
            return None
        if window not in self._masks:
            place, lengths = torch.arange(keys), self._lengths.long()[:, None]
            seen = place < lengths
            if window is not None:
                seen &= place >= lengths - window
            self._masks[window] = seen[:, None, None]
        return self._masks[window]


def _turn(table: RopeTable, positions: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """cos and sin [T, 1, dim] and an order, so that x turned is x * cos + x[order] * sin; None: halves swapped."""
    cos, sin = table.cos[positions].unsqueeze(1), table.sin[positions].unsqueeze(1)
    half = cos.shape[-1]
    rest = dim - 2 * half
    order = None
    if rest:
        order = torch.cat([torch.arange(half, 2 * half), torch.arange(half), torch.arange(2 * half, dim)])
    return (
        torch.cat([cos, cos, cos.new_ones(*cos.shape[:-1], rest)], -1),
        torch.cat([-sin, sin, sin.new_zeros(*sin.shape[:-1], rest)], -1),
        order,
    )
