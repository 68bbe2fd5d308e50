"""What clients and scripts rely on without saying so, and upstream's bugs that are not copied."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from engines import make_config, make_net
from torch import nn

import deepspeed
import ds_comm
from deepspeed.accelerator import get_accelerator
from deepspeed.launcher.hostfile import parse_inclusion_exclusion
from ds_comm.testing import run_ranks


def test_the_cpus_devices_are_the_ranks_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_SIZE", "3")
    assert get_accelerator().device_count() == (3 if get_accelerator().device_name() == "cpu" else 1)
    monkeypatch.delenv("LOCAL_SIZE")
    assert get_accelerator().device_count() >= 1


class Scaled(nn.Module):
    """A model with a parameter of no dimensions, and other values on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(ds_comm.get_rank())
        self.layer = nn.Linear(3, 1)
        self.scale = nn.Parameter(torch.tensor(1.5 + ds_comm.get_rank()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) * self.scale).float().square().mean()


def scalar_parameter(stage: int) -> list[Any]:
    config = make_config(stage, "bf16", train_micro_batch_size_per_gpu=2)
    engine = deepspeed.initialize(model=Scaled(), config=config)[0]
    found = []
    for _ in range(2):
        with deepspeed.zero.GatheredParameters([engine.module.scale]):
            found.append((tuple(engine.module.scale.shape), float(engine.module.scale.detach())))
        engine.backward(engine(torch.ones(2, 3, dtype=torch.bfloat16)))
        engine.step()
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_a_parameter_without_dimensions_is_broadcast_and_trained_in_bf16(stage: int) -> None:
    one, other = run_ranks(scalar_parameter, 2, stage)
    assert one == other and one[0] == ((), 1.5) and one[1][1] != 1.5


def test_a_bare_include_of_a_host_takes_all_of_its_slots() -> None:
    """Upstream 0.19.6: none of them; and slots that do not exist passed."""
    assert parse_inclusion_exclusion({"a": 2, "b": 2}, "a", "") == {"a": [0, 1]}
    with pytest.raises(ValueError, match="7"):
        parse_inclusion_exclusion({"a": 2}, "a:7", "")


def test_a_dtype_that_is_given_counts() -> None:
    """Upstream ignores zero.Init(dtype=...) where the device does not support fp16."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with deepspeed.zero.Init(dtype=dtype):
            layer = nn.Linear(3, 2)
        assert layer.weight.dtype == dtype and layer.weight.ds_shape == (2, 3)


def test_batch_numbers_are_numbers_and_modes_return_the_engine() -> None:
    """Upstream's get_batch_info gives methods, train() and eval() nothing."""
    engine = deepspeed.initialize(model=make_net(), config=make_config(1))[0]
    assert engine.get_batch_info() == (2, 2, 1)
    assert engine.train() is engine and engine.eval() is engine
    assert engine.greet() == "plain net"  # the module's, reached through the engine
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = engine.no_such_thing


def test_aliases_can_be_imported() -> None:
    """`import deepspeed.zero` fails upstream."""
    import deepspeed.checkpointing
    import deepspeed.zero

    assert deepspeed.zero.Init and deepspeed.checkpointing.configure


def test_memory_is_reported_when_forced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="DeepSpeed"):
        deepspeed.runtime.utils.see_memory_usage("quiet")
        assert not caplog.records
        deepspeed.runtime.utils.see_memory_usage("after step 1", force=True)
    text = caplog.text
    assert "after step 1" in text and "MA " in text and "Max_MA " in text and "CPU Virtual Memory: used = " in text


def test_an_overflow_in_fp32_is_not_trained_on() -> None:
    """Upstream goes on with NaN weights."""
    engine = deepspeed.initialize(model=make_net(), config=make_config(1))[0]
    engine.backward(engine(torch.full((2, 8), float("inf")), torch.zeros(2, 1)))
    with pytest.raises(ArithmeticError):
        engine.step()
