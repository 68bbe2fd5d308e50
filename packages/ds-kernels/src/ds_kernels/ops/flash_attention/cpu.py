"""flash_attention on CPU: numba tiles where they are faster (`numba_tiles`), else torch's CPU flash kernel by blocks.

torch's kernel does the plain cases whole (grouped queries included). Whatever it has no case for - a causal context in
front, a sliding window, packed sequences - is cut into blocks of queries, each with the range of keys that it sees and,
where the range's corners are not seen, an additive mask of that block alone. A block sees all its keys at once, so
nothing is merged afterwards; the backward pass adds the blocks' gradients of the keys in fp32, in order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ds_kernels.ops.flash_attention import cpu_tiles, reference
from ds_kernels.ops.flash_attention.cpu_tiles import SequencePlace
from ds_kernels.ops.flash_attention.shapes import first_query, key_range, sequences

__all__ = ["flash_attention", "flash_attention_backward"]

BLOCK = 512
"""Queries of a block: long enough for torch's kernel to be efficient, short enough for a narrow mask."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _is_plain(q: Tensor, k: Tensor, cu_q: Tensor | None, causal: bool, window: int) -> bool:
    return cu_q is None and not window and (not causal or q.shape[2] == k.shape[2])


def _places(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor | None, cu_k: Tensor | None
) -> list[SequencePlace]:
    """Where each sequence of each batch lies."""
    return [
        SequencePlace(
            i * q.stride(0) + a * q.stride(2), i * out.stride(0) + a * out.stride(2), i * lse.stride(0) + a,
            i * k.stride(0) + c * k.stride(2), i * v.stride(0) + c * v.stride(2), b - a, d - c,
        )
        for i in range(q.shape[0])
        for a, b, c, d in sequences(q, k, cu_q, cu_k)
    ]  # fmt: skip


def _empty(q: Tensor, k: Tensor) -> bool:
    return q.numel() == 0 or k.numel() == 0


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """As the reference, which takes fp64 and what is empty; the last dimension of q, k and v is contiguous."""
    if q.dtype == torch.float64 or _empty(q, k):
        return reference.flash_attention(q, k, v, cu_q, cu_k, causal, window, scale)
    out, lse = reference.empty_output(q)
    if cpu_tiles.takes(q):
        if cu_q is not None:  # sequences without queries or without keys are left out
            out.zero_()
            lse.fill_(float("-inf"))
        cpu_tiles.forward(q, k, v, out, lse, _places(q, k, v, out, lse, cu_q, cu_k), None, causal, window, scale)
        return out, lse
    if _is_plain(q, k, cu_q, causal, window):
        found, total = _flash(q, k, v, 0.0, causal, scale=scale)
        return found, lse.copy_(total)
    out.zero_()
    lse.fill_(float("-inf"))
    for rows, keys, mask, corner in _blocks(q, k, cu_q, cu_k, causal, window):
        found, total = _flash(q[:, :, rows], k[:, :, keys], v[:, :, keys], 0.0, corner, attn_mask=mask, scale=scale)
        out[:, :, rows] = found
        lse[:, :, rows] = total
    return out, lse


def flash_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, causal: bool, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the reference, which takes fp64 and what is empty."""
    if q.dtype == torch.float64 or _empty(q, k):
        return reference.flash_attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, causal, window, scale)
    if _is_plain(q, k, cu_q, causal, window):
        plain: tuple[Tensor, Tensor, Tensor] = _flash_backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
        return plain
    grad_q = reference.empty_output(q)[0].zero_()
    grad_k, grad_v = (reference.empty_output(x)[0].float().zero_() for x in (k, v))
    for rows, keys, mask, corner in _blocks(q, k, cu_q, cu_k, causal, window):
        block = (grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows])
        part = _flash_backward(*block, 0.0, corner, attn_mask=mask, scale=scale)
        grad_q[:, :, rows] = part[0]
        grad_k[:, :, keys] += part[1]
        grad_v[:, :, keys] += part[2]
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _blocks(
    q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool, window: int
) -> Iterator[tuple[slice, slice, Tensor | None, bool]]:
    """(queries, keys, additive mask or None, torch's `is_causal`): blocks; queries that see none are left out."""
    masks: dict[tuple[int, ...], Tensor] = {}
    for a, b, c, d in sequences(q, k, cu_q, cu_k):
        q_len, k_len = b - a, d - c
        offset = k_len - q_len
        whole = not window and (not causal or offset == 0)
        step = q_len if whole else BLOCK
        for start in range(first_query(q_len, k_len, causal, window), q_len, step):
            end = min(start + step, q_len)
            low, high = key_range(start + offset, end + offset, k_len, causal, window)
            mask = None if whole else _mask(masks, q, start + offset - low, end - start, high - low, causal, window)
            yield slice(a + start, a + end), slice(c + low, c + high), mask, whole and causal


def _mask(
    known: dict[tuple[int, ...], Tensor], q: Tensor, first: int, rows: int, keys: int, causal: bool, window: int
) -> Tensor:
    """[rows, keys] of 0 or -inf, in q's dtype, for queries at the positions `first`, first + 1, ... among the keys."""
    place = (first, rows, keys)
    if place not in known:
        ahead = torch.arange(keys)[None, :] - torch.arange(first, first + rows)[:, None]
        hidden = ahead > 0 if causal else ahead >= window
        if window:
            hidden |= ahead <= -window
        known[place] = torch.zeros(rows, keys, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
    return known[place]
