"""From logits to tokens, a whole batch at a time, each request by its own sampling values.

The order is that of transformers: repetition penalty, (OpenAI's bias, presence and frequency penalties, end tokens
banned by `min_tokens`), temperature, top-k, top-p, min-p. A filter keeps a token by its value, so that equally likely
tokens stay or go together: at top_k = 1 a tie of two is drawn from, never cut by chance. What is left is drawn by one
uniform number and the cumulative probabilities, in fp64. Log-probabilities that are reported are the model's own:
before any of this.

Invariant: a row's token depends on its logits, its sampling values, its seed and the number of tokens it has so far,
and on nothing else in the batch. The uniform number of draw n is a counter-based hash (SplitMix64) of (seed, n):
no generator has a state, so a request that was preempted, or joined another batch, draws what it would have drawn.
Sources: Keskar et al. 2019 (repetition penalty); Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p); Steele et
al. 2014 (SplitMix64).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_inference.errors import LogitsError
from ds_inference.serve.request import Request, SamplingParams

__all__ = ["SampleRow", "Sampled", "sample", "score", "uniform"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_HEAD = 1024
_SCORED = 64
"""Rows that are scored at a time: a copy of their logits is made."""


@dataclass(frozen=True)
class SampleRow:
    """What one row of logits is sampled by."""

    params: SamplingParams
    seed: int
    index: int
    """Tokens generated so far: the number of this draw."""
    seen: Sequence[int] = ()
    """Tokens of prompt and answer, for the repetition penalty; repeats do not matter."""
    banned: Sequence[int] = ()
    """Tokens that must not be drawn."""
    name: str = ""
    """For errors."""
    num_prompt: int = 0
    """So many of `seen` are the prompt, which presence and frequency penalties do not count."""

    @classmethod
    def of(cls, request: Request) -> SampleRow:
        """The row of a request's next token."""
        return cls(
            request.params,
            request.seed,
            request.num_output,
            request.tokens,
            request.banned,
            request.request_id,
            request.num_prompt,
        )


@dataclass(frozen=True)
class Sampled:
    """A token; with `SamplingParams.logprobs` its log-probability and the most likely tokens with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, index: int) -> float:
    """Draw `index` of stream `seed` (64 bits): uniform in [0, 1), a multiple of 2**-52."""
    return (_mix(_mix(seed + _GOLDEN) + (index + 1) * _GOLDEN) >> 12) * 2.0**-52


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """One token per row. `logits`: [len(rows), vocabulary], any floating dtype and device; it is not changed.

    LogitsError when a row's greatest logit is not finite (NaN, infinite, or every token banned). ValueError for a
    shape that does not fit.
    """
    if logits.dim() != 2 or logits.shape[0] != len(rows) or logits.shape[1] == 0:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; expected [{len(rows)}, vocabulary], one per row")
    if not rows:
        return []
    scores = _banned(_shifted(_penalised(logits.float(), rows), rows), rows)
    greatest, best = scores.max(dim=-1)
    _check(greatest, rows)
    tokens: list[int] = best.tolist()
    drawn = [at for at, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        chosen = _draw(scores, greatest, drawn, [rows[at] for at in drawn])
        for at, token in zip(drawn, chosen, strict=True):
            tokens[at] = token
    return _with_logprobs(logits, rows, tokens)


def _penalised(scores: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Tokens seen made less likely: positive logits divided by the penalty, negative ones multiplied."""
    places: list[int] = []
    tokens: list[int] = []
    penalties: list[float] = []
    for at, row in enumerate(rows):
        if row.params.repetition_penalty != 1:
            seen = [token for token in set(row.seen) if token < scores.shape[1]]
            places += [at] * len(seen)
            tokens += seen
            penalties += [row.params.repetition_penalty] * len(seen)
    if not places:
        return scores
    where = (torch.tensor(places, device=scores.device), torch.tensor(tokens, device=scores.device))
    penalty = torch.tensor(penalties, device=scores.device)
    old = scores[where]
    return scores.index_put(where, torch.where(old > 0, old / penalty, old * penalty))


def _shifted(scores: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Bias added; presence and frequency penalties of what the answer has subtracted."""
    places: list[int] = []
    tokens: list[int] = []
    shifts: list[float] = []
    for at, row in enumerate(rows):
        params = row.params
        shift: dict[int, float] = dict(params.logit_bias)
        if params.presence_penalty or params.frequency_penalty:
            for token, count in Counter(row.seen[row.num_prompt :]).items():
                penalty = params.presence_penalty + params.frequency_penalty * count
                shift[token] = shift.get(token, 0.0) - penalty
        known = [token for token in shift if token < scores.shape[1]]
        places += [at] * len(known)
        tokens += known
        shifts += [shift[token] for token in known]
    if not places:
        return scores
    where = (torch.tensor(places, device=scores.device), torch.tensor(tokens, device=scores.device))
    return scores.index_put(where, scores[where] + torch.tensor(shifts, device=scores.device))


def _banned(scores: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    pairs = [(at, token) for at, row in enumerate(rows) for token in row.banned if token < scores.shape[1]]
    if not pairs:
        return scores
    places, tokens = torch.tensor(pairs, device=scores.device).unbind(1)
    return scores.index_put((places, tokens), scores.new_tensor(-torch.inf))


def _check(greatest: Tensor, rows: Sequence[SampleRow]) -> None:
    finite = greatest.isfinite()
    if not bool(finite.all()):
        at = int((~finite).nonzero()[0, 0])
        who = f" (request {rows[at].name!r})" if rows[at].name else ""
        raise LogitsError(
            f"the greatest logit of row {at}{who} is {greatest[at].item()}; expected a finite one: the model has "
            "overflowed (try a wider dtype), or every token is banned"
        )


def _draw(scores: Tensor, greatest: Tensor, places: list[int], rows: list[SampleRow]) -> list[int]:
    """Tokens of the rows that are drawn."""
    index = torch.tensor(places, device=scores.device)

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores.device)[:, None]

    # The greatest becomes 0 first, so that no temperature overflows.
    x = (scores[index].double() - greatest[index, None].double()) / column([row.params.temperature for row in rows])
    x = _top_k(x, [row.params.top_k for row in rows])
    x = _top_p(x, [row.params.top_p for row in rows])
    if any(row.params.min_p > 0 for row in rows):
        x = x.masked_fill(x < column([row.params.min_p for row in rows]).log(), -torch.inf)
    sums = x.exp().cumsum(-1)
    target = column([uniform(row.seed, row.index) for row in rows]) * sums[:, -1:]
    chosen: list[int] = torch.searchsorted(sums, target, right=True)[:, 0].tolist()
    return chosen


def _top_k(x: Tensor, ks: list[int]) -> Tensor:
    """Keep what is at least as likely as the k-th; 0 and -1 keep all."""
    places = [at for at, k in enumerate(ks) if 0 < k < x.shape[1]]
    if not places:
        return x
    wanted = [ks[at] for at in places]
    index = torch.tensor(places, device=x.device)
    last = torch.tensor(wanted, device=x.device)[:, None] - 1
    limit = x[index].topk(max(wanted)).values.gather(1, last)
    return x.index_copy(0, index, x[index].masked_fill(x[index] < limit, -torch.inf))


def _top_p(x: Tensor, ps: list[float]) -> Tensor:
    """Keep what is at least as likely as the token with which the most likely ones reach p."""
    places = [at for at, p in enumerate(ps) if p < 1]
    if not places:
        return x
    index = torch.tensor(places, device=x.device)
    rows = x[index]
    reach = torch.tensor([ps[at] for at in places], dtype=x.dtype, device=x.device)[:, None]
    reach = reach * rows.exp().cumsum(-1)[:, -1:]
    # The most likely tokens nearly always reach p; sorting a whole vocabulary takes several times as long.
    for size in (min(_HEAD, x.shape[1]), x.shape[1]):
        ordered = rows.topk(size).values
        weights = ordered.exp()
        sums = weights.cumsum(-1)
        if size == x.shape[1] or bool((sums[:, -1:] >= reach).all()):
            break
    needed = (sums - weights < reach).sum(-1, keepdim=True).clamp(min=1)
    return x.index_copy(0, index, rows.masked_fill(rows < ordered.gather(1, needed - 1), -torch.inf))


def score(logits: Tensor, tokens: Sequence[int], top: int) -> list[Sampled]:
    """What the rows of logits say of given tokens: their log-probabilities, and the `top` most likely ones."""
    found = []
    for first in range(0, len(tokens), _SCORED):
        chosen = list(tokens[first : first + _SCORED])
        found += _described(logits[first : first + _SCORED], chosen, [top] * len(chosen))
    return found


def _described(logits: Tensor, tokens: list[int], counts: list[int]) -> list[Sampled]:
    """One token per row with its log-probability and the most likely ones with theirs."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(max(counts), logits.shape[1]))
    values, places = best.values.tolist(), best.indices.tolist()
    return [
        Sampled(token, own[at], tuple(zip(places[at][:count], values[at][:count], strict=True)))
        for at, (token, count) in enumerate(zip(tokens, counts, strict=True))
    ]


def _with_logprobs(logits: Tensor, rows: Sequence[SampleRow], tokens: list[int]) -> list[Sampled]:
    sampled = [Sampled(token) for token in tokens]
    counts = {at: row.params.logprobs for at, row in enumerate(rows) if row.params.logprobs is not None}
    if not counts:
        return sampled
    index = torch.tensor(list(counts), device=logits.device)
    found = _described(logits[index], [tokens[at] for at in counts], list(counts.values()))
    for at, one in zip(counts, found, strict=True):
        sampled[at] = one
    return sampled


def _mix(value: int) -> int:
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)
