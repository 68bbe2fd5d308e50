"""What a user may do wrong or interrupt between backward and step, and what must not change the mathematics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ds_zero
from ds_comm.testing import run_ranks
from ds_zero.errors import ZeroStateError

STAGES = (0, 2, 3)


def make(stage: int, **config: object) -> tuple[nn.Module, ds_zero.ZeroOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    settings = {"stage": stage, "param_persistence_threshold": 0, **config}
    model, optimizer = ds_zero.shard(model, torch.optim.AdamW(model.parameters(), lr=0.1), config=settings)
    assert optimizer is not None
    return model, optimizer


def values(model: nn.Module) -> list[torch.Tensor]:
    return [ds_zero.safe_get_full_fp32_param(p).clone() for p in model.parameters()]


def read_between(read: bool, stage: int) -> list[torch.Tensor]:
    model, optimizer = make(stage, dtype="bf16", gradient_accumulation_steps=3)
    for seed in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).bfloat16()
        optimizer.backward(model(x).float().square().mean())
        if read:
            assert ds_zero.safe_get_full_grad(model[0].weight) is not None
    optimizer.step()
    return values(model)


@pytest.mark.parametrize("stage", STAGES)
def test_reading_a_gradient_while_accumulating_changes_nothing(stage: int) -> None:
    plain = run_ranks(read_between, 2, False, stage)[0]
    read = run_ranks(read_between, 2, True, stage)[0]
    assert all(torch.equal(a, b) for a, b in zip(plain, read, strict=True))


class Explodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        raise ValueError("out of something")


def failed_backward(stage: int) -> bool:
    model, optimizer = make(stage)
    x = torch.ones(4, 6)
    hidden = model[1](model[0](x))
    with pytest.raises(ValueError, match="out of something"):
        optimizer.backward(model[2](Explodes.apply(hidden)).square().mean())
    with pytest.raises(ZeroStateError, match="zero_grad"):
        optimizer.step()
    with pytest.raises(ZeroStateError, match="zero_grad"):
        model(x)
    optimizer.zero_grad()
    reference, plain = make(stage)
    for m, o in ((model, optimizer), (reference, plain)):
        o.backward(m(x).square().mean())
        o.step()
    return all(torch.equal(a, b) for a, b in zip(values(model), values(reference), strict=True))


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_a_failed_backward_are_never_trained_on(stage: int) -> None:
    assert all(run_ranks(failed_backward, 2, stage))


def one_rank_reaches_nothing(stage: int) -> list[torch.Tensor]:
    model, optimizer = make(stage)
    x = torch.ones(4, 6, requires_grad=True)
    rank = optimizer.comm.rank
    out = model(x)
    optimizer.backward(out.square().mean() if rank == 0 else x.sum())
    optimizer.step()
    return values(model)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_rank_whose_loss_reaches_no_parameter_contributes_zeros(stage: int) -> None:
    first, second = run_ranks(one_rank_reaches_nothing, 2, stage)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_parameter_unfrozen_after_sharding_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    model[0].bias.requires_grad_(False)
    model, optimizer = ds_zero.shard(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    model[0].bias.requires_grad_(True)
    optimizer.backward(model(torch.ones(2, 6)).square().mean())
    with pytest.raises(ZeroStateError, match=r"0\.bias"):
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.ASGD, torch.optim.RAdam, torch.optim.Adamax])
def test_resume_keeps_every_number_of_an_optimizer(kind: type[torch.optim.Optimizer], tmp_path) -> None:
    from ds_zero import checkpoint

    def build() -> tuple[nn.Module, ds_zero.ZeroOptimizer]:
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        return ds_zero.shard(model, kind(model.parameters(), lr=0.01), config={"stage": 2})  # type: ignore[return-value]

    def train(model: nn.Module, optimizer: ds_zero.ZeroOptimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.backward(model(torch.ones(2, 6)).square().mean())
            optimizer.step()

    straight, optimizer = build()
    train(straight, optimizer, 3)
    checkpoint.save(tmp_path, "t", optimizer.export_state(), shard_map=optimizer.shard_map).wait()
    train(straight, optimizer, 3)
    resumed, other = build()
    targets = other.import_targets(checkpoint.state_keys(tmp_path, "t"))
    checkpoint.load(tmp_path, targets, shard_map=other.shard_map)
    other.finish_import(targets)
    train(resumed, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(values(straight), values(resumed), strict=True))
