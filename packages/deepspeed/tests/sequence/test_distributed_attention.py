"""Attention over sequences that ranks share: outputs and gradients of one process, whatever divides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ds_comm
from deepspeed.sequence.cross_entropy import vocab_sequence_parallel_cross_entropy
from deepspeed.sequence.exchange import HeadPlan, balanced, spans
from deepspeed.sequence.layer import DistributedAttention, _SeqAllToAll, apply_rotary_pos_emb, single_all_to_all
from ds_comm.testing import RankFailure, run_ranks

HEADS = [(4, 4), (8, 2), (6, 3), (5, 1), (12, 4)]
"""(query heads, key-value heads): even; fewer key-value heads than ranks; groups cut by a rank; uneven."""


def attend(query: Tensor, key: Tensor, value: Tensor, batch_dim_idx: int = 0) -> Tensor:
    """Causal attention of one process: [batch, sequence, heads, size] or [sequence, batch, heads, size]."""
    order = (0, 2, 1, 3) if batch_dim_idx == 0 else (1, 2, 0, 3)
    group = query.shape[2] // key.shape[2]
    heads = [t.permute(order) for t in (query, key.repeat_interleave(group, 2), value.repeat_interleave(group, 2))]
    out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
    return out.permute(0, 2, 1, 3) if batch_dim_idx == 0 else out.permute(2, 0, 1, 3)


def merged(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Megatron's kind: heads and their size come back as one dimension."""
    return attend(query, key, value, 1).flatten(2)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def differences(heads: int, kv_heads: int, length: int, first: bool) -> float:
    """Largest difference of output and gradients from one process; `first`: the batch comes first."""
    rank, ranks = ds_comm.get_rank(), ds_comm.get_world_size()
    at = 1 if first else 0
    size = (2, length) if first else (length, 2)
    whole = [random(*size, count, 4, seed=seed) for seed, count in enumerate((heads, kv_heads, kv_heads))]
    table = random(length, 1, 1, 2, seed=7)
    for tensor in whole:
        tensor.requires_grad_()
    query, key, value = whole
    beside = table.permute(1, 0, 2, 3) if first else table
    turned = [apply_rotary_pos_emb(tensor, beside.cos(), beside.sin()) for tensor in (query, key)]
    expected = attend(*turned, value) if first else merged(*turned, value)
    weight = random(*expected.shape, seed=9)
    (expected * weight).sum().backward()

    start, stop = spans(balanced(length, ranks))[rank]
    mine = [tensor.detach().narrow(at, start, stop - start).clone().requires_grad_() for tensor in whole]
    attention = DistributedAttention(
        attend if first else merged, ds_comm.get_world_group(), even_lengths=length % ranks == 0
    )
    found = attention(*mine, 0 if first else 1, (table.cos(), table.sin()))
    (found * weight.narrow(at, start, stop - start)).sum().backward()
    pairs = [(found, expected), *((one.grad, two.grad) for one, two in zip(mine, whole, strict=True))]
    return max((one - two.narrow(at, start, stop - start)).abs().max().item() for one, two in pairs)


def all_differences() -> list[float]:
    return [
        differences(heads, kv_heads, length, first)
        for heads, kv_heads in HEADS
        for length, first in ((12, True), (13, True), (12, False))
    ]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_outputs_and_gradients_are_those_of_one_process(ranks: int) -> None:
    for found in run_ranks(all_differences, ranks):
        assert max(found) < 1e-13


def labels() -> dict[str, int]:
    part = random(1, 3, 4, 2, seed=1).requires_grad_()
    comm = ds_comm.communicator(ds_comm.get_world_group())
    comm.ledger.reset()
    DistributedAttention(attend, ds_comm.get_world_group())(part, part, part, 0).sum().backward()
    return {label: count for (_, label), count in comm.ledger.counts.items()}


def test_an_attention_is_two_messages_each_way() -> None:
    names = ("ulysses qkv", "ulysses output")
    assert run_ranks(labels, 2)[0] == {f"{name}{way}": 1 for name in names for way in ("", ", backward")}


def there_and_back() -> tuple[bool, list[int], bool]:
    part = random(2, 3, 5, 4, seed=ds_comm.get_rank()).requires_grad_()
    group = ds_comm.get_world_group()
    heads = _SeqAllToAll.apply(group, part, 2, 1, 0)
    back = _SeqAllToAll.apply(group, heads, 1, 2, 0)
    (back * 3).sum().backward()
    assert part.grad is not None
    plain = single_all_to_all(part, 2, 1, 0, group)
    return torch.equal(back, part), list(heads.shape), bool((part.grad == 3).all()) and torch.equal(plain, heads)


def test_the_exchange_and_its_inverse() -> None:
    assert run_ranks(there_and_back, 2) == [(True, [2, 6, 3, 4], True), (True, [2, 6, 2, 4], True)]


def test_plans_of_heads() -> None:
    plan = HeadPlan.of(8, 2, 4)  # key-value heads are repeated
    assert plan.keys == ((0, 1), (0, 1), (1, 2), (1, 2)) and plan.key_of_query(3) is None
    plan = HeadPlan.of(6, 3, 2)  # the second group is cut: rank 0 has query heads 0 1 | 2
    assert plan.keys == ((0, 2), (1, 3)) and plan.key_of_query(0) == [0, 0, 1] and plan.key_of_query(1) == [0, 1, 1]
    assert HeadPlan.of(7, 7, 3).num_queries() == (3, 2, 2)
    with pytest.raises(ValueError, match="4 ranks share a sequence, but the attention has 3 heads"):
        HeadPlan.of(3, 1, 4)
    with pytest.raises(ValueError, match="5 query heads for 2 key-value heads"):
        HeadPlan.of(5, 2, 2)


def too_many_ranks() -> None:
    part = torch.zeros(1, 2, 1, 4)
    DistributedAttention(attend, ds_comm.get_world_group())(part, part, part, 0)


def test_too_few_heads_are_an_error() -> None:
    with pytest.raises(RankFailure, match="sequence_parallel_size of at most 1"):
        run_ranks(too_many_ranks, 2)


def losses(reduction: str, length: int) -> tuple[float, float]:
    rank, ranks = ds_comm.get_rank(), ds_comm.get_world_size()
    whole = random(length, 2, 5, seed=1).float().requires_grad_()
    target = torch.randint(0, 5, (length, 2), generator=torch.Generator().manual_seed(2))
    target[0] = -100
    flat = torch.nn.functional.cross_entropy(whole.view(-1, 5), target.view(-1), reduction=reduction)
    expected = flat.view(length, 2) if reduction == "none" else flat
    expected.mean().backward()
    start, stop = spans(balanced(length, ranks))[rank]
    part = whole.detach()[start:stop].clone().requires_grad_()
    found = vocab_sequence_parallel_cross_entropy(
        part, target[start:stop], ds_comm.get_world_group(), reduction=reduction
    )
    found.mean().backward()
    assert part.grad is not None and whole.grad is not None and found.shape == expected.shape
    off = (part.grad / ranks - whole.grad[start:stop]).abs().max()  # every rank took the mean: the engine divides
    return (found - expected).abs().max().item(), off.item()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_loss_of_a_shared_sequence(reduction: str) -> None:
    for value, gradient in run_ranks(losses, 3, reduction, 7):
        assert value < 1e-5 and gradient < 1e-6
