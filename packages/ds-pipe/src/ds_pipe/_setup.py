"""What a pipeline needs before it runs: micro-batches from an iterator, and how each chunk's backward is done.

A chunk's backward is whole, or split into I and W (`_split`). Split ones cost a few percent more, so where W follows
its I and nobody waits for I's result in between (there is none, or it stays on the rank), both are one whole backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from ds_pipe._split import SplitBackward
from ds_pipe.errors import PipelineError
from ds_pipe.module import PipelineModule, Tie
from ds_pipe.schedule.action import Action, Schedule
from ds_pipe.schedule.lower import Op, Recv

__all__ = ["fused", "in_place", "splits", "take"]


def take(data_iter: Iterator[Any] | None, num: int, stage: int, *, labelled: bool) -> list[tuple[Any, Any]]:
    """`num` micro-batches as (inputs, labels); what the iterator yields are such pairs, or inputs alone.

    PipelineError for no iterator, one that runs dry, or something else than pairs.
    """
    if not isinstance(data_iter, Iterator):
        raise PipelineError(
            f"stage {stage}: data_iter is {type(data_iter).__name__}; the first stage and the last need an iterator of "
            "(inputs, labels), such as iter(loader)"
        )
    taken: list[tuple[Any, Any]] = []
    while len(taken) < num:
        try:
            batch = next(data_iter)
        except StopIteration:
            raise PipelineError(
                f"stage {stage}: the data iterator ran dry after {len(taken)} of {num} micro-batches; give one with "
                "whole batches, or one that repeats"
            ) from None
        if not labelled:
            taken.append((batch, None))
            continue
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise PipelineError(f"a micro-batch is {type(batch).__name__}; expected a pair (inputs, labels)")
        taken.append((batch[0], batch[1]))
    return taken


def splits(
    model: nn.Module, schedule: Schedule, virtuals: Sequence[int], ties: Sequence[Tie]
) -> tuple[SplitBackward | None, ...]:
    """Per chunk how its gradients are found before they are accumulated; None where backward does both.

    A weight tied between two chunks of one rank needs that too, as its gradients are summed before they accumulate.
    """
    doubled = [tie for tie in ties if sum(virtual in virtuals for virtual in tie.virtuals) > 1]
    found: list[SplitBackward | None] = []
    for chunk, virtual in enumerate(virtuals):
        if not schedule.splits_backward and not any(virtual in tie.virtuals for tie in doubled):
            found.append(None)
            continue
        parameters = model.chunks[chunk].parameters() if isinstance(model, PipelineModule) else list(model.parameters())
        at_once = [tie.parameter for tie in ties if virtual in tie.virtuals]
        found.append(SplitBackward(parameters, at_once=at_once, defers=schedule.splits_backward))
    return tuple(found)


def fused(
    program: Sequence[Op], virtuals: Sequence[int], ties: Sequence[Tie], splits: Sequence[SplitBackward | None]
) -> frozenset[tuple[int, int]]:
    """The (micro-batch, chunk) whose W stands next to I, but for receives, and which need not be apart for a tie."""
    doubled = {
        virtual for tie in ties if len(uses := [v for v in tie.virtuals if v in virtuals]) > 1 for virtual in uses
    }
    apart = {chunk for chunk, virtual in enumerate(virtuals) if splits[chunk] is None or virtual in doubled}
    listed = [op for op in program if not isinstance(op, Recv)]
    found = set()
    for op, following in pairwise(listed):
        if isinstance(op, Action) and isinstance(following, Action) and (op.kind, following.kind) == ("I", "W"):
            _, _, i, chunk = op
            if (following.micro_batch, following.chunk) == (i, chunk) and chunk not in apart:
                found.add((i, chunk))
    return frozenset(found)


def in_place(model: nn.Module, num_chunks: int) -> frozenset[int]:
    """The chunks with modules that say that they work in place, such as ReLU(inplace=True)."""
    chunks = model.chunks if isinstance(model, PipelineModule) else None
    found = set()
    for chunk in range(num_chunks):
        modules = [model] if chunks is None else chunks[chunk].modules
        if any(getattr(part, "inplace", False) is True for module in modules for part in module.modules()):
            found.add(chunk)
    return frozenset(found)
