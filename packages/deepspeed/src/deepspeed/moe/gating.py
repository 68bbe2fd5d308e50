"""Which experts a token goes to, with which weight, and who is left out when an expert is full.

Owns the mathematics of gating and nothing else: plain torch on the tokens of one rank, no process groups.

Vocabulary
    choice    one of the k experts of a token; a choice is *kept* unless its expert was full.
    capacity  the most choices that one expert keeps: max(ceil(tokens / experts * factor * k), minimum).
    place     the row that a kept choice has among those of its expert, 0 <= place < capacity.

With p = softmax(logits) [tokens, E], m the mean of p over tokens and c the choices per token of each expert:
    auxiliary loss   top-1: E * sum(m * c);   top-2: E^2 * mean(m * c);   top-k: E^2 / k * mean(m * c)
    weights          top-1: p of the choice;   else p of the choice over the sum of p of the token's kept choices

Sources: Lepikhin et al. 2020, "GShard" (arXiv:2006.16668): capacity, auxiliary loss, top-2; Fedus et al. 2021, "Switch
Transformers" (arXiv:2101.03961): top-1; Kim et al. 2021 (arXiv:2109.10465): random token selection.
Integers never depend on gradients; losses and weights are differentiable.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Choices", "capacity_of", "choose_top1", "choose_top2", "choose_topk", "gumbel_noise"]


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a gate decided about `tokens` tokens; every tensor is contiguous, as kernels want it.

    Attributes:
        experts: [tokens, k], int64: the expert of each choice.
        kept: [tokens, k], bool.
        weights: [tokens, k], differentiable; 0 for choices that were not kept.
        places: [tokens, k], int64; of no meaning where not kept.
        counts: [num_experts], int64: choices of each expert, those that found it full included.
        aux_loss: scalar, differentiable.
        capacity: rows of each expert; where nothing is dropped, the largest of the counts.
        dropped: whether a full expert drops choices.
    """

    experts: Tensor
    kept: Tensor
    weights: Tensor
    places: Tensor
    counts: Tensor
    aux_loss: Tensor
    capacity: int
    dropped: bool


def capacity_of(logits: Tensor, factor: float, minimum: int) -> int:
    """Rows of one expert, for [tokens, num_experts] logits."""
    return max(math.ceil(len(logits) / logits.shape[1] * factor), int(minimum))


def gumbel_noise(like: Tensor) -> Tensor:
    """Gumbel(0, 1) noise: argmax(logits + noise) samples from softmax(logits)."""
    uniform = torch.rand_like(like, dtype=torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
    exponential = (-uniform.log()).clamp_min(torch.finfo(torch.float32).tiny)
    return -exponential.log()


def choose_top1(
    logits: Tensor,
    capacity: int | None,
    *,
    used_token: Tensor | None = None,
    noisy: bool = False,
    random_selection: bool = True,
) -> Choices:
    """One expert per token.

    Args:
        logits: [tokens, num_experts].
        capacity: None drops nothing.
        used_token: [tokens], 0 for tokens that take no part (padding).
        noisy: choose by logits with Gumbel noise (policy "RSample").
        random_selection: a full expert keeps random tokens; else the earlier ones.
    """
    probs = torch.softmax(logits, 1)
    chosen = (logits + gumbel_noise(logits) if noisy else probs).argmax(1, keepdim=True)
    mask = F.one_hot(chosen[:, 0], logits.shape[1])
    if used_token is not None:
        mask = mask * used_token.reshape(-1, 1).to(mask.dtype)
    counts = mask.sum(0)
    aux_loss = (_mean(probs) * _mean(mask.to(probs.dtype))).sum() * logits.shape[1]
    taken = mask.gather(1, chosen).bool()
    priority = torch.rand(taken.shape, device=logits.device) if random_selection and capacity is not None else None
    kept = taken & _fits(chosen, taken, capacity, logits.shape[1], priority)
    weights = probs.gather(1, chosen) * kept
    return _choices(chosen, kept, weights, counts, aux_loss, capacity)


def choose_top2(logits: Tensor, capacity: int | None, *, sample_second: bool = True) -> Choices:
    """Two experts per token; the second one sampled (`sample_second`) or the next best. All first choices go before
    all second ones when an expert is full."""
    probs = torch.softmax(logits, 1)
    first = probs.argmax(1, keepdim=True)
    others = (logits + gumbel_noise(logits)) if sample_second else logits
    second = others.detach().scatter(1, first, -math.inf).argmax(1, keepdim=True)
    chosen = torch.cat([first, second], 1)
    num_experts = logits.shape[1]
    counts = torch.bincount(chosen.reshape(-1), minlength=num_experts)
    # Only first choices count as the load: GShard balances those, as upstream does.
    load = torch.bincount(first[:, 0], minlength=num_experts).to(probs.dtype) / max(1, len(logits))
    aux_loss = (_mean(probs) * load).mean() * num_experts**2
    kept = _fits(chosen, torch.ones_like(chosen, dtype=torch.bool), capacity, num_experts, None)
    return _choices(chosen, kept, _renormalised(probs, chosen, kept), counts, aux_loss, capacity)


def choose_topk(logits: Tensor, k: int, capacity: int | None, *, drop_policy: str = "probs") -> Choices:
    """k experts per token. A full expert keeps the choices of the largest probabilities ("probs") or those of the
    earlier tokens ("position")."""
    probs = torch.softmax(logits, 1)
    chosen = probs.topk(k, 1).indices
    num_experts = logits.shape[1]
    counts = torch.bincount(chosen.reshape(-1), minlength=num_experts)
    load = counts.to(probs.dtype) / max(1, len(logits))
    aux_loss = (_mean(probs) * load).mean() * num_experts**2 / k
    if drop_policy == "probs":
        priority = probs.detach().gather(1, chosen)
    else:
        priority = -torch.arange(len(logits), device=logits.device).unsqueeze(1).expand_as(chosen)
    kept = _fits(chosen, torch.ones_like(chosen, dtype=torch.bool), capacity, num_experts, priority)
    return _choices(chosen, kept, _renormalised(probs, chosen, kept), counts, aux_loss, capacity, by_token=True)


def _mean(values: Tensor) -> Tensor:
    """Over tokens; zeros where there are none."""
    return values.sum(0) / max(1, len(values))


def _renormalised(probs: Tensor, chosen: Tensor, kept: Tensor) -> Tensor:
    """Probabilities of the kept choices, over their sum for each token."""
    weights = probs.gather(1, chosen) * kept
    return weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(probs.dtype).eps)


def _fits(chosen: Tensor, taken: Tensor, capacity: int | None, num_experts: int, priority: Tensor | None) -> Tensor:
    """[tokens, k], bool: the choices that find a row. Those of higher `priority` first, or those that come first."""
    if capacity is None:
        return taken
    experts = torch.where(taken, chosen, num_experts).t().reshape(-1)  # all first choices, then all second ones
    if priority is None:
        order = torch.argsort(experts, stable=True)
    else:
        order = torch.argsort(priority.t().reshape(-1), descending=True, stable=True)
        order = order[torch.argsort(experts[order], stable=True)]
    rank = torch.empty_like(order).scatter_(0, order, _rank_in_runs(experts[order], num_experts + 1))
    return (rank < capacity).view(chosen.shape[1], -1).t().contiguous() & taken


def _rank_in_runs(ordered: Tensor, num_kinds: int) -> Tensor:
    """For sorted numbers, how many equal ones stand before each."""
    sizes = torch.bincount(ordered, minlength=num_kinds)
    starts = sizes.cumsum(0) - sizes
    return torch.arange(len(ordered), device=ordered.device) - starts[ordered]


def _choices(
    chosen: Tensor,
    kept: Tensor,
    weights: Tensor,
    counts: Tensor,
    aux_loss: Tensor,
    capacity: int | None,
    by_token: bool = False,
) -> Choices:
    """With the places of what was kept: all first choices, then all second ones; or token by token."""
    experts = torch.where(kept, chosen, len(counts))
    listed = experts if by_token else experts.t()
    flat = listed.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ranks = torch.empty_like(order).scatter_(0, order, _rank_in_runs(flat[order], len(counts) + 1))
    places = ranks.view(listed.shape) if by_token else ranks.view(listed.shape).t().contiguous()
    rows = int(counts.max()) if capacity is None else capacity
    return Choices(chosen, kept, weights, places, counts, aux_loss, rows, dropped=capacity is not None)
