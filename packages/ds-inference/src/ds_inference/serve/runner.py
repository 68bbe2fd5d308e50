"""Carries out a step: copies blocks, runs the model over the plan's tokens, samples.

Requests that compute one token each (nearly always: that decode) go to the model as a batch of their own, because a
decoder has its fastest kernels for it; everything else goes as one ragged batch, without padding.

Invariants: what a request gets does not depend on how a step was divided; the logits of a call are used up before the
next call, so a decoder may reuse their memory; block tables name no block beyond a request's own, padding is block 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_inference.decoder import Batch
from ds_inference.errors import LogitsError
from ds_inference.serve.sampler import Sampled, SampleRow, sample, score
from ds_inference.serve.scheduler import StepPlan, Work

__all__ = ["BlockCache", "CausalDecoder", "Runner", "make_batch"]


class BlockCache(Protocol):
    """The keys and values of all blocks."""

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, (from, to) one after the other."""


class CausalDecoder(Protocol):
    """What serving needs of a model; `ds_inference.decoder.Decoder` is one."""

    @property
    def device(self) -> torch.device: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_positions(self) -> int | None: ...

    def forward(self, batch: Batch, cache: Any) -> Tensor:
        """fp32 logits [tokens asked for, vocabulary]; keys and values of all tokens are written to the cache."""


def make_batch(works: Sequence[Work], device: torch.device) -> Batch:
    """The tensors of some of a step's work; logits are asked for at scored tokens, and at the last of what samples."""
    decoding = all(len(work.tokens) == 1 for work in works)
    width = max(len(work.block_table) for work in works)
    tables = [[*work.block_table, *(0,) * (width - len(work.block_table))] for work in works]
    ends: list[int] = [0]
    for work in works:
        ends.append(ends[-1] + len(work.tokens))
    wanted: list[int] = []
    for work, start, end in zip(works, ends, ends[1:], strict=False):
        wanted += range(start, start + work.scored)
        wanted += [end - 1] * work.samples

    def column(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Batch(
        tokens=column([token for work in works for token in work.tokens]),
        positions=column([at for work in works for at in range(work.start, work.context)]),
        slots=column([slot for work in works for slot in work.slots]),
        block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
        context_lens=column([work.context for work in works], torch.int32),
        cu_seqlens=None if decoding else column(ends, torch.int32),
        logits_at=None if len(wanted) == ends[-1] else column(wanted),
        max_seqlen=max(len(work.tokens) for work in works),
    )


class Runner:
    """A model and its cache, driven by plans. One thread at a time."""

    def __init__(self, decoder: CausalDecoder, cache: BlockCache) -> None:
        self.decoder = decoder
        self.cache = cache
        self.scored: list[tuple[Work, list[Sampled]]] = []
        """Of the last step: work with tokens that are scored, and what is known of those that follow them."""

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[Sampled | LogitsError]:
        """What each of `plan.sampling` gets, in its order: a token, or why none could be drawn."""
        if plan.copies:
            self.cache.copy(plan.copies)
        single = [work for work in plan.work if len(work.tokens) == 1]
        ragged = [work for work in plan.work if len(work.tokens) > 1]
        results: dict[str, Sampled | LogitsError] = {}
        self.scored = []
        for works in (single, ragged):
            if works:
                sampling = [work for work in works if work.samples]
                logits = self.decoder.forward(make_batch(works, self.decoder.device), self.cache)
                logits = self._without_scored(works, logits)
                rows = [SampleRow.of(work.request) for work in sampling]
                for work, result in zip(sampling, _sample_each(logits, rows), strict=True):
                    results[work.request.request_id] = result
        return [results[work.request.request_id] for work in plan.sampling]

    def _without_scored(self, works: list[Work], logits: Tensor) -> Tensor:
        """Score the prompts that ask for it; what is left are the rows to sample from."""
        if not any(work.scored for work in works):
            return logits
        left, row = [], 0
        for work in works:
            if count := work.scored:
                following = work.request.prompt[work.start + 1 : work.start + 1 + count]
                top = work.request.params.prompt_logprobs or 0
                self.scored.append((work, score(logits[row : row + count], following, top)))
            row += count
            if work.samples:
                left.append(row)
                row += 1
        return logits[torch.tensor(left, dtype=torch.int64, device=logits.device)]


def _sample_each(logits: Tensor, rows: list[SampleRow]) -> Sequence[Sampled | LogitsError]:
    """Sample all rows at once; if one cannot be sampled, one by one, so that the others get what is theirs."""
    try:
        return sample(logits, rows)
    except LogitsError:
        results: list[Sampled | LogitsError] = []
        for at, row in enumerate(rows):
            try:
                results += sample(logits[at : at + 1], [row])
            except LogitsError as error:
                results.append(error)
        return results
