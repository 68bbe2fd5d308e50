"""Batches of a bounded number of tokens instead of a fixed number of sequences, and learning rates to match.

A *micro-batch* is cut greedily: sequences enter in order until the next one would exceed `max_tokens` or
`max_batch_size`. `effective_batch_size` micro-batches (ranks x accumulation steps) are one batch, so that every rank
does as many. A batch at the end that lacks micro-batches is dropped, as a loader's `drop_last` would; the last sequence
is not, unlike upstream.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from deepspeed._lazy import explain_absent
from deepspeed.utils.logging import log_dist

__all__ = ["batch_by_seqlens", "scale_lr"]

Batches = tuple[list[tuple[int, list[int]]], list[int], list[int]]


def batch_by_seqlens(
    seqlens: Sequence[int],
    max_tokens: int,
    sequence_ids_per_mb: Iterable[Sequence[int]] | None = None,
    min_batch_size: int = 1,
    max_batch_size: int | None = None,
    sequence_picking_order: str = "dataloader",
    effective_batch_size: int = 1,
    required_microbatches_of_same_size: bool = False,
    verbose: bool = False,
    seed: int | None = None,
) -> Batches:
    """Cut sequences into micro-batches of at most `max_tokens` tokens.

    Args:
        seqlens: tokens of each sequence.
        sequence_ids_per_mb: micro-batches that were cut elsewhere; only grouped and counted here.
        min_batch_size, max_batch_size: sequences of a micro-batch; smaller ones are dropped.
        sequence_picking_order: dataloader (as they come), random, or seqlen (shortest first).
        effective_batch_size: micro-batches of a batch.
        required_microbatches_of_same_size: all micro-batches of a batch have as many sequences.
        seed: of the random order.

    Returns:
        ([(number of the batch, sequence numbers of a micro-batch), ...], sequences of each batch, longest sequence of
        each batch).

    Raises:
        ValueError: an argument out of range, or not one whole batch.
    """
    if min_batch_size < 1 or effective_batch_size < 1 or (max_batch_size or min_batch_size) < min_batch_size:
        raise ValueError(
            f"min_batch_size {min_batch_size}, max_batch_size {max_batch_size}, effective_batch_size "
            f"{effective_batch_size}; expected 1 <= min <= max and at least 1 micro-batch"
        )
    lengths = [int(length) for length in seqlens]
    limit = max_batch_size or len(lengths)
    if sequence_ids_per_mb is not None:
        cut = [list(ids) for ids in sequence_ids_per_mb]
    else:
        order = _ordered(lengths, sequence_picking_order, seed)
        fitting = [number for number in order if lengths[number] <= max_tokens]
        if verbose and len(fitting) < len(order):
            log_dist(f"{len(order) - len(fitting)} sequences exceed {max_tokens} tokens and are left out", ranks=[0])
        if required_microbatches_of_same_size:
            cut = _even(fitting, lengths, max_tokens, limit, effective_batch_size)
        else:
            cut = _greedy(fitting, lengths, max_tokens, limit)
    cut = [ids for ids in cut if len(ids) >= min_batch_size]
    whole = len(cut) - len(cut) % effective_batch_size
    if not whole:
        raise ValueError(
            f"{len(lengths)} sequences give {len(cut)} micro-batches of at most {max_tokens} tokens and at least "
            f"{min_batch_size} sequences; expected at least {effective_batch_size} for one batch"
        )
    numbered = [(place // effective_batch_size, ids) for place, ids in enumerate(cut[:whole])]
    batches: list[list[int]] = [[] for _ in range(whole // effective_batch_size)]
    for batch, ids in numbered:
        batches[batch] += ids
    return numbered, [len(ids) for ids in batches], [max(lengths[number] for number in ids) for ids in batches]


def _ordered(lengths: list[int], order: str, seed: int | None) -> list[int]:
    numbers = list(range(len(lengths)))
    if order == "random":
        random.Random(seed).shuffle(numbers)
    elif order == "seqlen":
        numbers.sort(key=lambda number: lengths[number])
    elif order != "dataloader":
        raise ValueError(f"sequence_picking_order is {order!r}; expected dataloader, random or seqlen")
    return numbers


def _greedy(numbers: list[int], lengths: list[int], max_tokens: int, limit: int) -> list[list[int]]:
    cut: list[list[int]] = []
    tokens = 0
    for number in numbers:
        tokens += lengths[number]
        if not cut or tokens > max_tokens or len(cut[-1]) == limit:
            cut.append([])
            tokens = lengths[number]
        cut[-1].append(number)
    return cut


def _even(numbers: list[int], lengths: list[int], max_tokens: int, limit: int, count: int) -> list[list[int]]:
    """`count` micro-batches of one size at a time, of the largest size that fits all of them."""
    cut: list[list[int]] = []
    while len(numbers) >= count:
        size = 1
        while size < limit and _fit(numbers, lengths, max_tokens, size + 1, count):
            size += 1
        cut += [numbers[place * size : (place + 1) * size] for place in range(count)]
        numbers = numbers[count * size :]
    return cut


def _fit(numbers: list[int], lengths: list[int], max_tokens: int, size: int, count: int) -> bool:
    parts = [numbers[place * size : (place + 1) * size] for place in range(count)]
    return all(len(ids) == size and sum(lengths[number] for number in ids) <= max_tokens for ids in parts)


def scale_lr(base_batch_size: int, batch_size: int, base_lr: float = 1, method: str | None = "linear") -> float:
    """The learning rate of a batch of another size: linear (Goyal et al. 2017), sqrt (Krizhevsky 2014), or none.

    ValueError for another method.
    """
    if method == "linear":
        return base_lr * batch_size / base_batch_size
    if method == "sqrt":
        return float(base_lr * (batch_size / base_batch_size) ** 0.5)
    if method in (None, "none"):
        return base_lr
    raise ValueError(f"lr scaling method is {method!r}; expected linear, sqrt or none")


explain_absent(__name__)
