"""Computation in tiles: the values and gradients of the untiled computation, in less memory, at every ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import deepspeed
import ds_comm
from deepspeed.runtime.sequence_parallel.ulysses_sp import (
    SequenceTiledCompute,
    TiledFusedLogitsLoss,
    TiledMLP,
    sequence_tiled_compute,
)
from ds_comm.testing import run_ranks

TOKENS, SIZE, VOCABULARY = 7, 8, 11


def wide(logits: Tensor) -> Tensor:
    """At least fp32, as losses are computed."""
    return logits if logits.dtype == torch.float64 else logits.float()


class MLP(nn.Module):
    def __init__(self, shards: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(SIZE, 4 * SIZE), nn.Linear(4 * SIZE, SIZE)
        self.scale = nn.Parameter(torch.ones(SIZE))
        self.dropout = nn.Dropout(dropout)
        self.shards = shards

    def whole(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(functional.gelu(self.up(x)))) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return TiledMLP.apply(MLP.whole, self, x, self.shards) if self.shards else self.whole(x)


class Net(nn.Module):
    """Two blocks and a head, tiled with `shards` above 0; `forward` returns the mean loss of labels that count."""

    def __init__(self, shards: int, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(MLP(shards, dropout) for _ in range(2))
        self.head = nn.Linear(SIZE, VOCABULARY)
        self.shards = shards

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        count = (labels != -100).sum()
        if not self.shards:
            return functional.cross_entropy(wide(self.head(x)).flatten(0, 1), labels.flatten(), reduction="sum") / count
        total = TiledFusedLogitsLoss.apply(
            lambda head, x, y: functional.cross_entropy(wide(head(x)), y, reduction="sum"),
            self.head,
            x,
            labels,
            None,
            self.shards,
            list(self.head.parameters()),
            "sum",
        )
        return total / count


def batch(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, VOCABULARY, (2, TOKENS), generator=generator)
    labels[0, :3] = -100
    return torch.randn(2, TOKENS, SIZE, generator=generator).to(dtype), labels


def gradients(net: Net, dtype: torch.dtype, repeat: bool = False) -> list[Tensor]:
    net = net.to(dtype)
    x, labels = batch(3, dtype)
    x.requires_grad_()
    torch.manual_seed(5)
    loss = net(x, labels)
    (3 * loss).backward(retain_graph=repeat)
    if repeat:
        (3 * loss).backward()
    found = [loss.detach(), x.grad, *(p.grad for p in net.parameters())]
    assert all(value is not None for value in found)
    return [value for value in found if value is not None]


@pytest.mark.parametrize("shards", [1, 3, 50])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.bfloat16, 0.02), (torch.float16, 0.002)]
)
def test_values_and_gradients(dtype: torch.dtype, tolerance: float, shards: int) -> None:
    for tiled, whole in zip(gradients(Net(shards), dtype), gradients(Net(0), dtype), strict=True):
        assert (tiled - whole).abs().max().item() <= tolerance


def test_dropout_is_the_same_when_a_tile_is_computed_again() -> None:
    # One tile draws what the untiled computation draws; several draw the same numbers in the order of the tiles.
    for tiled, whole in zip(gradients(Net(1, 0.4), torch.float64), gradients(Net(0, 0.4), torch.float64), strict=True):
        assert torch.allclose(tiled, whole, atol=1e-13)


def test_backward_twice() -> None:
    once, twice = gradients(Net(3), torch.float64), gradients(Net(3), torch.float64, repeat=True)
    assert all(torch.allclose(2 * one, two) for one, two in zip(once[1:], twice[1:], strict=True))


def test_autocast_is_on_again_in_backward() -> None:
    net, seen = Net(3), []
    net.blocks[0].down.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = net(*batch(3))
    loss.backward()
    assert seen == [torch.bfloat16] * 6


def test_any_function_and_parameters_that_nobody_named() -> None:
    linear, seen = nn.Linear(SIZE, SIZE), []

    def compute(x: Tensor, factor: Tensor | None, power: float) -> Tensor:
        seen.append(x.shape[1])
        return (linear(x) ** 2 if factor is None else linear(x) * factor) * power

    x, factor = torch.randn(2, TOKENS, SIZE, requires_grad=True), torch.randn(2, TOKENS, 1)
    for extra in (factor, None):
        expected = torch.autograd.grad(compute(x, extra, 2.0).square().sum(), [x, linear.weight])
        seen.clear()
        x.grad = linear.weight.grad = None
        out = sequence_tiled_compute(compute, TOKENS, 3, {"x": x, "factor": extra}, {"power": 2.0}, "x", None, 1, None)
        out.square().sum().backward()
        assert x.grad is not None and torch.allclose(x.grad, expected[0], atol=1e-5)
        assert linear.weight.grad is not None and torch.allclose(linear.weight.grad, expected[1], atol=1e-4)
        assert seen == [3, 2, 2] * 2
    args = (x.detach().requires_grad_(), 3.0)
    total = SequenceTiledCompute.apply(
        lambda x, factor: (x * factor).sum(), TOKENS, 2, ["x"], ["factor"], "x", None, 0, "sum", *args
    )
    total.backward()
    assert total.item() == pytest.approx(3 * x.sum().item(), abs=1e-3) and bool((args[0].grad == 3).all())


def test_what_cannot_be_tiled_is_said() -> None:
    x = torch.randn(2, TOKENS, SIZE, requires_grad=True)
    with pytest.raises(ValueError, match=r"x of shape .*expected \[batch, 9"):
        sequence_tiled_compute(torch.relu, 9, 2, {"x": x}, {}, "x")
    with pytest.raises(ValueError, match="other needs a gradient"):
        sequence_tiled_compute(lambda x, other: x, TOKENS, 2, {"x": x, "other": x * 2}, {}, "x")
    with pytest.raises(ValueError, match="expected a scalar for each tile"):
        TiledFusedLogitsLoss.apply(lambda self, x, y: x, None, x, torch.zeros(2, TOKENS), None, 2)
    with pytest.raises(ValueError, match="shards is 0"):
        TiledMLP.apply(lambda self, x: x, None, x, 0)


def train(stage: int, shards: int) -> list[tuple[float, float]]:
    net = Net(shards)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    engine = deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]
    found = []
    for step in range(3):
        loss = engine(*batch(10 * step + ds_comm.get_rank()))
        engine.backward(loss)
        engine.step()
        found.append((loss.item(), engine.get_global_grad_norm()))
    engine.destroy()
    return found


def train_both(stage: int) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    return train(stage, 0), train(stage, 3)


@pytest.mark.parametrize("stage", [2, 3])
def test_training_in_tiles_under_zero(stage: int) -> None:
    for whole, tiled in run_ranks(train_both, 2, stage):
        for one, two in zip(whole, tiled, strict=True):
            assert one == pytest.approx(two, abs=1e-6)


def _peak(shards: int) -> int:
    """Most bytes that a loss with a large vocabulary, forward and backward, holds at a time."""
    from torch.profiler import ProfilerActivity, profile

    head = nn.Linear(16, 4096, bias=False)
    x = torch.randn(1, 2048, 16, requires_grad=True)
    labels = torch.zeros(1, 2048, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        if shards:
            loss = TiledFusedLogitsLoss.apply(
                lambda head, x, y: functional.cross_entropy(head(x), y), head, x, labels, None, shards
            )
        else:
            loss = functional.cross_entropy(head(x).flatten(0, 1), labels.flatten())
        loss.backward()
    held = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_logits_are_never_whole() -> None:
    logits = 2048 * 4096 * 4
    assert _peak(0) > 2 * logits
    assert _peak(16) < logits / 2
