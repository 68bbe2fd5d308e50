"""A deep copy of a sharded model is an ordinary model (for averages of weights, say), or an error that says why not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zero_helpers as z
from torch import nn

import ds_comm
import ds_zero
from ds_comm.testing import run_ranks


def start(stage: int) -> tuple[nn.Module, ds_zero.ZeroOptimizer]:
    model = z.build("Net")
    model, zero = ds_zero.shard(model, z.OPTIMIZERS["adamw"](model.parameters()), config=z.zero_config(stage))
    assert zero is not None
    return model, zero


def trained(stage: int, copies: bool) -> list[torch.Tensor]:
    model, zero = start(stage)
    for step in range(3):
        zero.backward(model(z.batch(2 * step + ds_comm.get_rank())))
        if copies:  # in the middle of a step, and used by one rank alone
            twin = copy.deepcopy(model)
            assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
            assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
            if ds_comm.get_rank() == 0:
                twin(z.batch(step)).backward()
                torch.optim.SGD(twin.parameters(), lr=1.0).step()
        zero.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def compare(stage: int) -> bool:
    return all(torch.equal(a, b) for a, b in zip(trained(stage, True), trained(stage, False), strict=True))


@pytest.mark.parametrize("stage", [0, 2])
def test_a_copy_is_an_ordinary_model_and_disturbs_nothing(stage: int) -> None:
    assert run_ranks(compare, 2, stage) == [True, True]


def test_a_copy_can_be_sharded() -> None:
    model, zero = start(1)
    twin = copy.deepcopy(model)
    assert ds_zero.sharded_of(twin) is None
    other: Any = ds_zero.shard(twin, z.OPTIMIZERS["adamw"](twin.parameters()), config=z.zero_config(2))[1]
    for each, optimizer in ((model, zero), (twin, other)):
        optimizer.backward(each(z.batch(0)))
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))


def test_a_copy_of_shards_is_refused() -> None:
    model, zero = start(3)
    with pytest.raises(ds_zero.ZeroStateError, match=r"stage 3.*copy it before it is sharded"):
        copy.deepcopy(model)
    zero.backward(model(z.batch(0)))
    zero.step()
