"""Measured costs: complete, the same on all ranks, and without a trace."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from pipe_models import WIDTH, loss_fn, nested, tanh, tied
from torch import nn

from ds_comm.testing import run_ranks
from ds_pipe import Costs, LayerSpec, PartitionError, profile_layers

ROWS = 4
ACTIVATION = ROWS * WIDTH * 4  # bytes


class Slow(nn.Linear):
    """Sleeps in forward and in backward."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        outputs = super().forward(inputs)
        if outputs.requires_grad:
            outputs.register_hook(lambda gradient: time.sleep(0.03))
        return outputs


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)


def slow(layers: int) -> tuple[Costs, list[float]]:
    found = profile_layers([LayerSpec(Slow, WIDTH, WIDTH), *[tanh] * layers], sample(), repeats=2)
    return found, list(found.totals)


def test_times_and_agreement() -> None:
    (one, totals), (other, _) = run_ranks(slow, 2, 3)
    assert one == other
    assert len(totals) == 4
    assert one.forward[0] >= 0.02
    assert one.backward[0] >= 0.03
    assert one.input_gradient[0] == 0  # nothing before it wants a gradient
    assert one.weight_gradient[0] == one.backward[0]


def test_bytes_kept_for_backward() -> None:
    layers = [nn.Linear(WIDTH, WIDTH), tanh, nn.Linear(WIDTH, WIDTH, bias=False), torch.exp, nn.Identity()]
    assert profile_layers(layers, sample(), repeats=1).activation == (ACTIVATION,) * 4 + (0,)
    frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    found = profile_layers([frozen, nn.Linear(WIDTH, WIDTH)], sample(), repeats=1)
    assert found.activation == (0, ACTIVATION)
    assert found.backward[0] == 0


def test_nested_payloads_and_ties() -> None:
    assert len(profile_layers(nested(), sample(), loss_fn, repeats=1).forward) == 4
    tokens = torch.randint(16, (2, 6))
    labels = torch.zeros(2, 6, 16)
    assert len(profile_layers(tied(), (tokens, labels), nn.functional.mse_loss, repeats=1).forward) == 6


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return nn.functional.dropout(inputs * self.scale)


def test_layers_that_work_in_place() -> None:
    """Every layer is given a leaf, to which autograd lets nobody write."""
    inputs, labels = sample()
    before = inputs.clone()
    layers = [nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)]
    assert len(profile_layers(layers, (inputs, labels), loss_fn, repeats=1).forward) == 4
    assert torch.equal(inputs, before)


def test_nothing_is_changed() -> None:
    module = Counting()
    module.scale.grad = torch.full((WIDTH,), 3.0)
    given = sample()
    before = torch.get_rng_state()
    layers: list[Any] = [module, LayerSpec(nn.Linear, WIDTH, WIDTH)]
    with torch.no_grad():
        profile_layers(layers, given, loss_fn)
    assert torch.equal(torch.get_rng_state(), before)
    assert module.calls == 0
    assert torch.equal(module.scale.grad, torch.full((WIDTH,), 3.0))
    assert given[0].grad is None


def test_refusals() -> None:
    with pytest.raises(PartitionError, match="0 layers measured 5 times"):
        profile_layers([], sample())
    with pytest.raises(PartitionError, match="1 layers measured 0 times"):
        profile_layers([tanh], sample(), repeats=0)
