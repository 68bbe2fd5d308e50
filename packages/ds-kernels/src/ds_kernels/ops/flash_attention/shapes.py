"""Which keys a query sees, and where sequences lie: what every backend of attention agrees on.

Vocabulary:
    position    a query's index among the keys: query i of q_len stands at i + k_len - q_len, the last query at the last
                key ("causal at the end", as in flash-attn since 2.1; torch's own `is_causal` aligns the first ones)
    window      keys that a query sees, itself among them: key j with position - window < j (and, where it is not
                causal, j < position + window). 0 stands for no limit
    sequence    (q_start, q_end, k_start, k_end): a range of queries and of keys; dense batches are one such range each

A query that sees no key has the output 0 and the log-sum-exp -inf, and no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["first_query", "key_range", "sequences", "visible"]


def sequences(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Iterator[tuple[int, int, int, int]]:
    """Every sequence that is not empty; without cu_q one with all queries and keys of [batch, heads, len, dim]."""
    if cu_q is None or cu_k is None:
        found = [(0, q.shape[2], 0, k.shape[2])]
    else:
        ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
        found = list(zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True))
    yield from (each for each in found if each[0] < each[1] and each[2] < each[3])


def visible(q_len: int, k_len: int, causal: bool, window: int, device: torch.device) -> Tensor:
    """[q_len, k_len] of bool: whether a query sees a key."""
    position = torch.arange(k_len - q_len, k_len, device=device)[:, None]
    key = torch.arange(k_len, device=device)
    seen = torch.ones(q_len, k_len, dtype=torch.bool, device=device)
    if causal:
        seen &= key <= position
    if window:
        seen &= key > position - window
        if not causal:
            seen &= key < position + window
    return seen


def first_query(q_len: int, k_len: int, causal: bool, window: int) -> int:
    """The first query that sees a key; all after it do as well."""
    if causal:
        return max(0, q_len - k_len)
    return max(0, q_len - k_len - window + 1) if window else 0


def key_range(start: int, end: int, k_len: int, causal: bool, window: int) -> tuple[int, int]:
    """The keys [low, high) that queries at the positions [start, end) see, at least one of them each."""
    low = max(0, start - window + 1) if window else 0
    if causal:
        return low, min(k_len, end)
    return low, min(k_len, end - 1 + window) if window else k_len
