"""moe_gate against its formulas in fp64 and a loop over tokens: ties, capacity, dropping, losses, gradients."""

from __future__ import annotations

import pytest
import torch
from numerics import DTYPES, assert_accurate
from torch import Tensor

from ds_kernels import KernelArgumentError, use_backend
from ds_kernels.ops.moe_gating import Routing, moe_capacity, moe_gate

SHAPES = [(7, 5, 2), (1, 8, 8), (129, 64, 6), (40, 1, 1), (33, 3, 1)]


def specification(logits: Tensor, experts: Tensor, renormalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`(weights, aux_loss, z_loss)` of the experts that were chosen."""
    probs = torch.softmax(logits, -1)
    weights = probs.gather(1, experts)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    num_experts, top_k = logits.shape[1], experts.shape[1]
    share = torch.nn.functional.one_hot(experts, num_experts).sum((0, 1)) / logits.shape[0]
    aux_loss = num_experts / top_k * (probs.mean(0) * share).sum()
    return weights, aux_loss, torch.logsumexp(logits, -1).square().mean()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_losses_and_gradients(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, renormalize: bool
) -> None:
    tokens, num_experts, top_k = shape
    logits = torch.randn(tokens, num_experts).to(dtype).requires_grad_()
    routing = moe_gate(logits, top_k, renormalize=renormalize)
    wide = logits.detach().double().requires_grad_()
    order = torch.sort(wide, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(routing.experts, order)
    actual = (routing.weights, routing.aux_loss, routing.z_loss)
    expected = specification(wide, order, renormalize)
    for name, mine, theirs in zip(("weights", "aux_loss", "z_loss"), actual, expected, strict=True):
        assert_accurate(mine.detach(), theirs.detach(), fp32_terms=32, what=name)
    pull = torch.randn(tokens, top_k)
    (mine,) = torch.autograd.grad((actual[0] * pull).sum() + 3 * actual[1] - 2 * actual[2], logits)
    (theirs,) = torch.autograd.grad((expected[0] * pull).sum() + 3 * expected[1] - 2 * expected[2], wide)
    assert mine.dtype == dtype
    assert_accurate(mine, theirs, fp32_terms=64, magnitude=4.0, what="gradient")


def test_equal_logits_choose_the_first_experts(backend: str) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0] * 5, [float("-inf")] * 4 + [0.0]])
    assert moe_gate(logits, 4).experts.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [4, 0, 1, 2]]


def test_extreme_logits(backend: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 3e38, 0.0], [-80.0, -90.0, -100.0]])
    routing = moe_gate(logits, 2)
    expected, _, _ = specification(logits.double(), routing.experts, True)
    assert_accurate(routing.weights, expected)


def check_rows(routing: Routing, order: list[tuple[int, int]], num_experts: int, capacity: int, padded: bool) -> None:
    """Hand out rows one choice (token, j) at a time, in the order given."""
    experts, top_k = routing.experts.tolist(), routing.experts.shape[1]
    lists: list[list[int]] = [[] for _ in range(num_experts)]
    for token, j in order:
        if len(lists[experts[token][j]]) < capacity:
            lists[experts[token][j]].append(token * top_k + j)
    if padded:
        rows = [choice for taken in lists for choice in taken + [-1] * (capacity - len(taken))]
    else:
        rows = [choice for taken in lists for choice in taken]
        rows += [-1] * (routing.experts.numel() - len(rows))
    assert routing.sources.tolist() == rows
    slots = [
        [rows.index(t * top_k + j) if t * top_k + j in rows else -1 for j in range(top_k)] for t in range(len(experts))
    ]
    assert routing.slots.tolist() == slots
    assert routing.ends.dtype == torch.int32
    assert routing.ends.tolist() == torch.tensor([len(taken) for taken in lists]).cumsum(0).tolist()
    assert routing.counts.tolist() == torch.bincount(routing.experts.flatten(), minlength=num_experts).tolist()
    assert routing.num_rows == len(rows)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("capacity", [1, 3, 100, None])
def test_rows_by_position(backend: str, capacity: int | None, padded: bool) -> None:
    if padded and capacity is None:
        pytest.skip("padded rows need a capacity")
    routing = moe_gate(torch.randn(19, 6), 2, capacity=capacity, padded=padded)
    order = [(token, j) for j in range(2) for token in range(19)]
    check_rows(routing, order, 6, capacity or 38, padded)


def test_drops_by_probability_not_by_logit(backend: str) -> None:
    """A token with large logits everywhere has no precedence over one that is sure of its expert."""
    logits = torch.tensor([[10.0, 9.9, 9.8], [3.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    routing = moe_gate(logits, 1, capacity=2, drop="probability")
    assert routing.slots.tolist() == [[-1], [0], [1]]
    logits = torch.randn(23, 5)
    routing = moe_gate(logits, 3, capacity=4, drop="probability")
    probs = torch.softmax(logits, -1)
    choices = [(token, j) for j in range(3) for token in range(23)]
    order = sorted(choices, key=lambda c: -float(probs[c[0], routing.experts[c[0], c[1]]]))
    check_rows(routing, order, 5, 4, padded=False)


def test_drops_at_random_from_the_generator(backend: str) -> None:
    logits = torch.zeros(64, 2)
    found = [
        moe_gate(logits, 1, capacity=8, drop="random", generator=torch.Generator().manual_seed(seed)).slots
        for seed in (1, 1, 2)
    ]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert all(int((slots >= 0).sum()) == 8 for slots in found)


def test_aux_loss_is_one_when_balanced(backend: str) -> None:
    logits = torch.eye(4).repeat(3, 1) * 1e-4
    assert moe_gate(logits, 1).aux_loss.item() == pytest.approx(1.0, abs=1e-6)


def test_no_tokens(backend: str) -> None:
    logits = torch.randn(0, 4, requires_grad=True)
    routing = moe_gate(logits, 2, capacity=3)
    (routing.aux_loss + routing.z_loss + routing.weights.sum()).backward()
    assert routing.num_rows == 0 and routing.ends.tolist() == [0] * 4 and routing.aux_loss == 0
    assert logits.grad is not None and logits.grad.shape == (0, 4)


def test_non_contiguous(backend: str) -> None:
    logits = torch.randn(6, 11).t()
    assert all(
        torch.equal(getattr(moe_gate(logits, 2), name), getattr(moe_gate(logits.contiguous(), 2), name))
        for name in ("weights", "slots", "sources")
    )


def test_capacity() -> None:
    assert [moe_capacity(100, 8, 2, 1.25), moe_capacity(3, 64, 1, 1.0), moe_capacity(3, 64, 1, 1.0, 0)] == [32, 4, 1]


def test_reference_agrees_to_the_row() -> None:
    logits = torch.randn(50, 7)
    found = []
    for name in ("cpu", "reference"):
        with use_backend(name):
            found.append(moe_gate(logits, 3, capacity=9))
    assert torch.equal(found[0].slots, found[1].slots) and torch.equal(found[0].sources, found[1].sources)


def test_threads_do_not_change_bits() -> None:
    logits = torch.randn(301, 24, requires_grad=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            routing = moe_gate(logits, 2)
            loss = routing.weights.square().sum() + routing.aux_loss + routing.z_loss
            found.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_compiles_without_graph_break(backend: str) -> None:
    def loss(logits: Tensor) -> Tensor:
        routing = moe_gate(logits, 2, capacity=4)
        return routing.weights.sin().sum() + routing.aux_loss + routing.z_loss + routing.slots.sum()

    logits = torch.randn(12, 4, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(logits), logits)
    (got,) = torch.autograd.grad(compiled(logits), logits)
    assert torch.equal(got, expected)


def test_bad_input() -> None:
    logits = torch.randn(4, 8)
    with pytest.raises(KernelArgumentError, match=r"top_k is 9; expected 1 to 8"):
        moe_gate(logits, 9)
    with pytest.raises(KernelArgumentError, match=r"capacity is 0; expected a positive number"):
        moe_gate(logits, 2, capacity=0)
    with pytest.raises(KernelArgumentError, match=r"drop is 'probs'; supported are position, probability, random"):
        moe_gate(logits, 2, drop="probs")
    with pytest.raises(KernelArgumentError, match=r"padded is True without a capacity"):
        moe_gate(logits, 2, padded=True)
    with pytest.raises(KernelArgumentError, match=r"shape \(2, 4, 8\); expected \[tokens, num_experts\]"):
        moe_gate(torch.randn(2, 4, 8), 2)
    with pytest.raises(KernelArgumentError, match=r"logits is of dtype torch.int64"):
        moe_gate(torch.ones(4, 8, dtype=torch.int64), 2)
