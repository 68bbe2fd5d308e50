"""Parallel layers against the whole ones, on real ranks: values, gradients, random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ds_comm
from ds_comm.testing import run_ranks
from ds_inference.tp.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    SharedInput,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from ds_inference.tp.random import SplitRandom, align_random
from ds_inference.tp.split import split_features

WIDTH, HIDDEN, WORDS = 12, 20, 23


def piece(whole: Tensor, dim: int, grain: int = 1) -> nn.Parameter:
    comm = ds_comm.communicator()
    low, high = split_features(whole.shape[dim], comm.size, grain)[comm.rank]
    return nn.Parameter(whole.detach().narrow(dim, low, high - low).clone())


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def own_gradient(whole: Tensor, dim: int) -> Tensor:
    assert whole.grad is not None
    return piece(whole.grad, dim).detach()


def mlp(transposed: bool) -> None:
    torch.manual_seed(0)
    comm = ds_comm.communicator()
    gate, up = (nn.Linear(WIDTH, HIDDEN) for _ in range(2))
    down = nn.Linear(HIDDEN, WIDTH)
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    x_local = x.detach().clone().requires_grad_(True)
    shared = SharedInput(comm, 2, "mlp")

    def column(layer: nn.Linear) -> ColumnParallelLinear:
        weight, bias = piece(layer.weight, 0), piece(layer.bias, 0)
        if transposed:
            weight = nn.Parameter(weight.detach().t().contiguous())
        return ColumnParallelLinear(weight, bias, comm, label="up", transposed=transposed, shared=shared)

    parts = column(gate), column(up)
    row = RowParallelLinear(piece(down.weight, 1), nn.Parameter(down.bias.detach().clone()), comm, label="down")
    expected = down(F.silu(gate(x)) * up(x))
    got = row(F.silu(parts[0](x_local)) * parts[1](x_local))
    close(got, expected)
    weights = torch.randn(expected.shape)
    (expected * weights).sum().backward()
    before = comm.ledger.summary()
    (got * weights).sum().backward()
    assert sum(1 for _ in before) <= len(comm.ledger.summary())
    close(x_local.grad, x.grad)  # type: ignore[arg-type]
    close(row.weight.grad, own_gradient(down.weight, 1))  # type: ignore[arg-type]
    close(row.bias.grad, down.bias.grad)  # type: ignore[arg-type,union-attr]
    up_gradient = parts[1].weight.grad.t() if transposed else parts[1].weight.grad  # type: ignore[union-attr]
    close(up_gradient, own_gradient(up.weight, 0))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_mlp_and_its_gradients_are_those_of_one_rank(num_ranks: int, transposed: bool) -> None:
    run_ranks(mlp, num_ranks, transposed)


def shared_sums() -> int:
    comm = ds_comm.communicator()
    shared = SharedInput(comm, 2, "qkv")
    layers = [ColumnParallelLinear(nn.Parameter(torch.ones(3, 4)), None, comm, label="q", shared=shared) for _ in "qk"]
    for _ in range(2):
        x = torch.ones(2, 4, requires_grad=True)
        (layers[0](x).sum() + layers[1](x).sum()).backward()
    return sum(count for (op, label), count in comm.ledger.counts.items() if op == "all_reduce" and "gradient" in label)


def test_layers_that_read_the_same_input_sum_its_gradient_once() -> None:
    assert run_ranks(shared_sums, 2) == [2, 2]  # two backwards, two layers each


def vocabulary(padding: int | None) -> None:
    torch.manual_seed(1)
    comm = ds_comm.communicator()
    embedding = nn.Embedding(WORDS, WIDTH, padding_idx=padding)
    head = nn.Linear(WIDTH, WORDS, bias=True)
    tokens = torch.tensor([[0, 22, 7, 8], [3, 3, 15, 16]])
    ranges = split_features(WORDS, comm.size)
    weight = piece(embedding.weight, 0)
    first = ranges[comm.rank][0]
    local = VocabParallelEmbedding(weight, first, WORDS, comm, label="embed", padding_idx=padding)
    sizes = [high - low for low, high in ranges]
    logits = VocabParallelHead(piece(head.weight, 0), piece(head.bias, 0), sizes, comm, label="head")
    expected, got = head(embedding(tokens)), logits(local(tokens))
    close(got, expected)
    for value in (expected, got):
        F.cross_entropy(value.flatten(0, 1), tokens.flatten()).backward()
    close(local.weight.grad, own_gradient(embedding.weight, 0))  # type: ignore[arg-type]
    close(logits.weight.grad, own_gradient(head.weight, 0))  # type: ignore[arg-type]
    close(logits.bias.grad, own_gradient(head.bias, 0))  # type: ignore[arg-type,union-attr]


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("padding", [None, 3])
def test_vocabulary_layers_with_uneven_parts(num_ranks: int, padding: int | None) -> None:
    run_ranks(vocabulary, num_ranks, padding)


def drawn(uneven: bool) -> dict[str, Any]:
    """A region in which each rank draws another number of random numbers, between two draws of all."""
    comm = ds_comm.communicator()
    torch.manual_seed(comm.rank)
    align_random(comm)
    region = SplitRandom(comm.rank)
    before = torch.rand(3)
    region.enter()
    inside = torch.rand(3 + (comm.rank if uneven else 0))
    region.leave()
    return {"before": before, "inside": inside, "after": torch.rand(3)}


def test_ranks_draw_alike_outside_of_regions_and_each_its_own_inside() -> None:
    one, two = run_ranks(drawn, 2, True)
    assert torch.equal(one["before"], two["before"])
    assert torch.equal(one["after"], two["after"])
    assert not torch.equal(one["inside"], two["inside"][:3])
    assert not torch.equal(one["before"], one["after"])


def test_a_layer_says_what_it_holds() -> None:
    comm = ds_comm.communicator() if ds_comm.is_initialized() else None
    if comm is None:
        ds_comm.init_distributed()
        comm = ds_comm.communicator()
    layer = RowParallelLinear(nn.Parameter(torch.ones(3, 4)), None, comm, label="x")
    assert repr(layer) == "RowParallelLinear(in_features=4, out_features=3, bias=False, rank 0 of 1)"
    assert list(layer.state_dict()) == ["weight"]
