"""A model that is gathered as a whole: forwards communicate nothing, ranks may differ, training keeps its bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ds_comm
import ds_zero
from ds_comm.testing import run_ranks


def make(stage: int = 3) -> tuple[nn.Module, ds_zero.ZeroOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    settings = {"stage": stage, "param_persistence_threshold": 0}
    model, optimizer = ds_zero.shard(model, torch.optim.AdamW(model.parameters(), lr=0.1), config=settings)
    assert optimizer is not None
    return model, optimizer


def x_of(step: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + ds_comm.get_rank()))


def steps(way: str) -> list[torch.Tensor]:
    model, optimizer = make()
    sharded, ledger = optimizer.sharded, ds_comm.communicator().ledger
    for step in range(3):
        if way == "hooks":
            for hook in optimizer.parameter_offload.forward_hooks:
                hook.remove()
        elif way != "plain":
            sharded.gather()
            sharded.gather()  # once more changes nothing
        if way != "plain":
            ledger.reset()
            with torch.no_grad():
                for _ in range(1 + ds_comm.get_rank()):
                    model(x_of(9))
            assert not ledger.counts and model[0].weight.shape == (8, 6)
            assert torch.equal(model[0].weight.detach().flatten(), whole(model[0].weight))
        if way == "hooks":
            optimizer.parameter_offload._register_deepspeed_module(model)
        elif way == "released":
            sharded.release()
            sharded.release()
        if way in ("hooks", "released"):
            assert model[0].weight.numel() == 0
        optimizer.backward(model(x_of(step)).square().mean())
        optimizer.step()  # "kept": the gathered weights become the new ones
        if way == "kept":
            assert torch.equal(model[2].weight.detach().flatten(), whole(model[2].weight))
    return [whole(p) for p in model.parameters()]


def whole(parameter: Any) -> torch.Tensor:
    return ds_zero.safe_get_full_fp32_param(parameter).flatten().clone()


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_training_around_a_gathered_model_keeps_its_bits(transport: Any) -> None:
    plain = run_ranks(steps, 2, "plain", transport=transport)
    for way in ("released", "kept", "hooks"):
        for expected, found in zip(plain, run_ranks(steps, 2, way, transport=transport), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def below_stage_3() -> bool:
    model, optimizer = make(2)
    optimizer.sharded.gather()
    optimizer.sharded.release()
    return hasattr(optimizer, "parameter_offload") or model[0].weight.shape != (8, 6)


def test_below_stage_3_there_is_nothing_to_gather() -> None:
    assert not any(run_ranks(below_stage_3, 2))
