"""Gating against a loop over tokens, and the dense answer that scripts are given."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_comm
from deepspeed.moe import gating
from deepspeed.moe.sharded_moe import (
    TopKGate,
    _AllToAll,
    gumbel_rsample,
    multiplicative_jitter,
    top1gating,
    top2gating,
    topkgating,
)
from ds_comm.testing import run_ranks

SHAPES = ((12, 4), (7, 3), (16, 5), (5, 8))


def logits_of(tokens: int, experts: int, crowded: bool = False) -> Tensor:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens)) * 1.5
    logits[:, 1] += 3 * crowded
    return logits


def by_loop(logits: Tensor, k: int, capacity: int | None, order: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(auxiliary loss, [tokens, experts] weights, [tokens, experts] places or -1, counts), token by token."""
    tokens, experts = logits.shape
    probs = torch.softmax(logits, 1)
    chosen = [probs[t].argsort(descending=True, stable=True)[:k].tolist() for t in range(tokens)]
    queue = [(t, j) for j in range(k) for t in range(tokens)] if order == "first" else []
    queue = queue or [(t, j) for t in range(tokens) for j in range(k)]
    if order == "probs":
        queue.sort(key=lambda at: -float(probs[at[0], chosen[at[0]][at[1]]]))
    taken: list[list[int]] = [[] for _ in range(experts)]
    for t, j in queue:
        taken[chosen[t][j]].append(t)
    counts = torch.tensor([len(members) for members in taken])
    kept = [members if capacity is None else members[:capacity] for members in taken]
    places = torch.full((tokens, experts), -1)
    for expert, members in enumerate(kept):
        for place, t in enumerate(sorted(members) if order != "first" else members):
            places[t, expert] = place
    weights = probs * (places >= 0)
    load = counts.float() / tokens
    if k == 1 and order == "top1":
        aux = experts * (probs.mean(0) * load).sum()
    else:
        weights = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
        if order == "first":
            load = torch.bincount(probs.argmax(1), minlength=experts) / tokens
            aux = experts**2 * (probs.mean(0) * load).mean()
        else:
            aux = experts**2 / k * (probs.mean(0) * load).mean()
    return aux, weights, places, counts


def check(given: tuple[Tensor, ...], expected: tuple[Tensor, ...], capacity: int) -> None:
    l_aux, combine, mask, counts = given
    aux, weights, places, expected_counts = expected
    dense = torch.zeros_like(combine)
    for t, expert in torch.nonzero(places >= 0).tolist():
        dense[t, expert, places[t, expert]] = weights[t, expert]
    torch.testing.assert_close(l_aux, aux)
    torch.testing.assert_close(combine, dense)
    assert combine.shape[2] == capacity
    assert torch.equal(mask, dense > 0) and torch.equal(counts, expected_counts)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("factor", "minimum"), [(1.0, 1), (0.5, 2), (1.0, 4)])
@pytest.mark.parametrize("drop", [True, False])
def test_the_gating_functions(shape: tuple[int, int], factor: float, minimum: int, drop: bool) -> None:
    tokens, experts = shape
    logits = logits_of(*shape, crowded=tokens == 16)

    def capacity(k: int) -> int | None:
        return max(math.ceil(tokens / experts * factor * k), minimum) if drop else None

    def rows(k: int, counts: Tensor) -> int:
        return capacity(k) or int(counts.max())

    expected = by_loop(logits, 1, capacity(1), "top1")
    options: dict[str, Any] = {"capacity_factor": factor, "min_capacity": minimum, "drop_tokens": drop}
    check(top1gating(logits, use_rts=False, **options), expected, rows(1, expected[3]))
    expected = by_loop(logits, 2, capacity(2), "first")
    check(top2gating(logits, top2_2nd_expert_sampling=False, **options), expected, rows(2, expected[3]))
    for k in (1, 2, 3):
        for policy in ("probs", "position"):
            expected = by_loop(logits, k, capacity(k), policy)
            check(topkgating(logits, k, drop_policy=policy, **options), expected, rows(k, expected[3]))


def test_gradients_are_those_of_the_formulas() -> None:
    logits = logits_of(9, 4).double().requires_grad_()

    def weights(x: Tensor) -> tuple[Tensor, ...]:
        found = (gating.choose_top1(x, 2, random_selection=False), gating.choose_top2(x, 3, sample_second=False))
        found += (gating.choose_topk(x, 3, 4), gating.choose_topk(x, 2, None, drop_policy="position"))
        return tuple(part for one in found for part in (one.weights, one.aux_loss))

    assert torch.autograd.gradcheck(weights, (logits,))


def test_random_token_selection_keeps_capacity_and_reaches_late_tokens() -> None:
    logits = torch.zeros(20, 2)
    logits[:, 0] = 5
    torch.manual_seed(0)
    kept = torch.stack([gating.choose_top1(logits, 4).kept[:, 0] for _ in range(60)])
    assert (kept.sum(1) == 4).all()
    assert kept[:, 10:].any() and (kept.sum(0) < 40).all()
    earlier = gating.choose_top1(logits, 4, random_selection=False)
    assert earlier.kept[:, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 3]


def test_noise_samples_by_probability() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(6000, 3)
    torch.manual_seed(0)
    share = gating.choose_top1(logits, None, noisy=True).counts / 6000
    torch.testing.assert_close(share, torch.softmax(logits[0], 0), atol=0.03, rtol=0)
    chosen = gating.choose_top2(logits, None).experts
    assert (chosen[:, 0] == 2).all()
    second = torch.bincount(chosen[:, 1], minlength=3) / 6000
    torch.testing.assert_close(second[:2], torch.softmax(logits[0, :2], 0), atol=0.03, rtol=0)
    assert abs(float(gumbel_rsample((6000,), logits.device).mean()) - 0.5772) < 0.05
    jittered = multiplicative_jitter(torch.ones(100), torch.device("cpu"))
    assert 0.99 <= float(jittered.min()) < 1 < float(jittered.max()) <= 1.01


def test_tokens_that_take_no_part() -> None:
    logits = logits_of(9, 3)
    used = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0])
    _, combine, mask, counts = top1gating(logits, 1.0, 1, used_token=used, drop_tokens=False, use_rts=False)
    assert (mask.sum((1, 2)) == used).all() and int(counts.sum()) == 6
    torch.testing.assert_close(combine.sum((1, 2)), torch.softmax(logits, 1).max(1).values * used)
    nothing = gating.choose_top1(torch.zeros(0, 3), 4)
    assert nothing.counts.tolist() == [0, 0, 0] and float(nothing.aux_loss) == 0


def test_what_is_wrong_is_said() -> None:
    logits = logits_of(3, 4)
    with pytest.raises(ValueError, match=r"3 tokens are fewer than min_capacity 4"):
        top1gating(logits, 1.0, 4)
    with pytest.raises(ValueError, match=r"noisy_gate_policy is 'loud'"):
        top1gating(logits, 1.0, 1, noisy_gate_policy="loud")
    with pytest.raises(ValueError, match=r"k is 5; expected 1 to 4"):
        topkgating(logits, 5, 1.0, 1)
    with pytest.raises(ValueError, match=r"drop_policy is 'random'"):
        topkgating(logits, 2, 1.0, 1, drop_policy="random")
    with pytest.raises(ValueError, match=r"k is 0"):
        TopKGate(8, 4, k=0)


def exchange() -> tuple[list[int], list[float], tuple[int, ...]]:
    rank = ds_comm.get_rank()
    x = (torch.arange(4.0) + 10 * rank).requires_grad_()
    y = _AllToAll.apply(None, x)
    (y * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert x.grad is not None
    logits = torch.zeros(6, 3)
    logits[:, 0] = 1.0 if rank else 0.0
    logits[: 2 + 0 * rank, 1] = 3.0
    dense = topkgating(logits, 1, 1.0, 1, drop_tokens=False)[1]
    return y.tolist(), x.grad.tolist(), tuple(dense.shape)


def test_ranks_exchange_tokens_and_agree_on_a_capacity() -> None:
    first, second = run_ranks(exchange, 2)
    assert first[:2] == ([0.0, 1.0, 10.0, 11.0], [1.0, 2.0, 1.0, 2.0])
    assert second[:2] == ([2.0, 3.0, 12.0, 13.0], [3.0, 4.0, 3.0, 4.0])
    assert first[2] == second[2]
