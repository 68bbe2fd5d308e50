"""Bad input, non-finite gradients and diverging ranks: an error that names the thing, nothing lost or hanging."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pydantic
import pytest
import torch
import zero_helpers as z
from torch import nn

import ds_comm
import ds_zero
from ds_comm.testing import RankFailure, run_ranks
from ds_zero import LayoutError, NonFiniteGradientError, ZeroConfig, ZeroStateError


def start(stage: int, name: str = "Net", **config: Any) -> tuple[nn.Module, ds_zero.ZeroOptimizer]:
    model = z.build(name)
    model, zero = ds_zero.shard(model, z.OPTIMIZERS["adamw"](model.parameters()), config=z.zero_config(stage, **config))
    assert zero is not None
    return model, zero


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"stage": 4}, "stage"),
        ({"overlap_com": True}, "overlap_com"),
        ({"dtype": "int8"}, "dtype"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"loss_scaling": {"loss_scale": float("inf")}}, "loss_scale"),
        ({"loss_scaling": {"window": 3}}, "window"),
    ],
)
def test_config_names_the_key(values: dict[str, Any], named: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=named):
        ZeroConfig(**values)


def refuse_to_shard() -> None:
    model = z.build("Net")
    other = z.build("Net")
    adamw = z.OPTIMIZERS["adamw"]
    with pytest.raises(LayoutError, match="not in the model"):
        ds_zero.shard(model, adamw(other.parameters()))
    with pytest.raises(LayoutError, match=r"'blocks\.7'"):
        ds_zero.shard(model, units=["blocks.7"])
    with pytest.raises(LayoutError, match="Conv2d"):
        ds_zero.shard(model, units=[nn.Conv2d])
    with pytest.raises(LayoutError, match="no parameter"):
        ds_zero.shard(nn.Identity())
    stepped = adamw(model.parameters())
    model(z.batch(0)).backward()
    stepped.step()
    with pytest.raises(LayoutError, match="before the first step"):
        ds_zero.shard(model, stepped)
    frozen = z.build("Net").requires_grad_(False)
    with pytest.raises(LayoutError, match="nothing would be trained"):
        ds_zero.shard(frozen, adamw(frozen.parameters()))
    double = z.build("Net").double()
    with pytest.raises(LayoutError, match="float64"):
        ds_zero.shard(double, adamw(double.parameters()))
    aliased = z.build("Net")
    aliased.head.weight = nn.Parameter(aliased.embed.weight.data)
    with pytest.raises(LayoutError, match=r"embed.weight.*head.weight"):
        ds_zero.shard(aliased)
    model, zero = start(1)
    with pytest.raises(LayoutError, match="sharded already"):
        ds_zero.shard(model)
    with pytest.raises(LayoutError, match="another sharded model"):
        ds_zero.shard(nn.Sequential(model.head, nn.Linear(2, 2)))
    with pytest.raises(ZeroStateError, match="add_param_group"):
        zero.add_param_group({"params": []})


def test_models_and_optimizers_that_cannot_be_sharded() -> None:
    run_ranks(refuse_to_shard, 1)


def refuse_to_step(stage: int) -> None:
    model, zero = start(stage)
    with pytest.raises(ZeroStateError, match="step without a backward"):
        zero.step()
    with pytest.raises(ZeroStateError, match=r"scalar loss.*shape \(2,\)"):
        zero.backward(torch.ones(2, requires_grad=True))
    with pytest.raises(ZeroStateError, match="scalar loss"):
        zero.backward(torch.ones(()))
    with pytest.raises(ZeroStateError, match="float"):
        zero.backward(1.0)  # type: ignore[arg-type]
    zero.backward(model(z.batch(0)), accumulation=2)
    with pytest.raises(ZeroStateError, match="divides by 3"):
        zero.backward(model(z.batch(0)), accumulation=3)
    with pytest.raises(ZeroStateError, match="inside no_sync"), zero.no_sync():
        zero.step()
    with pytest.raises(ZeroStateError, match="inside no_sync"), zero.no_sync(), zero.no_sync():
        pass
    zero.step()
    with pytest.raises(ZeroStateError, match="step without a backward"):
        zero.step()


@pytest.mark.parametrize("stage", [0, 3])
def test_calls_at_the_wrong_time(stage: int) -> None:
    run_ranks(refuse_to_step, 2, stage)


def unused_parameters(stage: int) -> None:
    model, zero = start(stage, "Unused", ignore_unused_parameters=False)
    with pytest.raises(ZeroStateError, match=r"spare\.weight"):
        zero.backward(model(z.batch(0)))


@pytest.mark.parametrize("stage", [1, 3])
def test_unused_parameters_are_named_when_not_ignored(stage: int) -> None:
    run_ranks(unused_parameters, 2, stage)


def unscaled_backward(stage: int) -> None:
    model, zero = start(stage, dtype="fp16")
    with pytest.raises(ZeroStateError, match="unscaled loss"):
        model(z.batch(0)).backward()
    zero.zero_grad()
    first = model(z.batch(0))
    loss = zero.scale(first)
    with torch.no_grad():
        model(z.batch(1))  # an evaluation in between changes nothing
    loss.backward()
    zero.step()
    assert zero.step_applied


@pytest.mark.parametrize("stage", [0, 3])
def test_fp16_backward_of_an_unscaled_loss(stage: int) -> None:
    run_ranks(unscaled_backward, 1, stage)


def poison(model: nn.Module, zero: ds_zero.ZeroOptimizer, index: int, value: float) -> None:
    """A backward that puts `value` into the gradient of blocks.1.up.bias on rank 1 only."""
    loss = model(z.batch(index))
    zero.backward(loss)
    bias = model.blocks[1].up.bias
    grad = ds_zero.safe_get_full_grad(bias)
    assert grad is not None
    grad[3] = value
    ds_zero.safe_set_full_grad(bias, grad)


def overflow(stage: int, dtype: str | None, value: float) -> list[Any]:
    model, zero = start(
        stage, dtype=dtype, loss_scaling={"initial_scale_power": 1, "hysteresis": 1, "min_loss_scale": 1}
    )
    before = z.values_of(model)
    poison(model, zero, 0, value)
    seen: list[Any] = []
    if dtype is None:
        with pytest.raises(NonFiniteGradientError, match=r"blocks\.1\.up\.bias.*weights are unchanged"):
            zero.step()
    else:
        zero.step()
        seen = [zero.overflow, zero.step_applied, zero.loss_scale]
    after = z.values_of(model)
    assert all(torch.equal(before[n], after[n]) for n in before)
    if dtype == "fp16":
        poison(model, zero, 1, value)
        with pytest.raises(NonFiniteGradientError, match=r"already at minimum.*blocks\.1\.up\.bias"):
            zero.step()
    zero.backward(model(z.batch(2)))
    zero.step()
    assert zero.step_applied
    assert not zero.overflow
    return seen


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [None, "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_nonfinite_gradients(stage: int, dtype: str | None, value: float) -> None:
    expected = {None: [], "bf16": [True, False, 1.0], "fp16": [True, False, 1.0]}[dtype]
    assert run_ranks(overflow, 2, stage, dtype, value) == [expected, expected]


def nonfinite_choices() -> None:
    model, zero = start(2, skip_nonfinite=True)
    poison(model, zero, 0, float("nan"))
    zero.step()
    assert zero.overflow
    model, zero = start(2, dtype="bf16", skip_nonfinite=False)
    poison(model, zero, 0, float("nan"))
    with pytest.raises(NonFiniteGradientError):
        zero.step()
    model, zero = start(2, check_nonfinite=False)
    poison(model, zero, 0, float("nan"))
    zero.step()
    assert zero.step_applied
    assert not torch.isfinite(z.values_of(model)["blocks.1.up.bias"]).all()


def test_skip_and_check_nonfinite() -> None:
    run_ranks(nonfinite_choices, 2)


def leftover_parameters(stage: int) -> list[str]:
    model = z.build("Net")
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ds_zero").addHandler(handler)
    _, zero = ds_zero.shard(model, z.OPTIMIZERS["sgd"](model.head.parameters()), config=z.zero_config(stage))
    logging.getLogger("ds_zero").removeHandler(handler)
    before = z.values_of(model)
    zero.backward(model(z.batch(0)))
    zero.step()
    after = z.values_of(model)
    assert all(p.grad is None for p in model.parameters())
    assert any("embed.weight" in m and "frozen" in m for m in messages)
    return [n for n in before if not torch.equal(before[n], after[n])]


@pytest.mark.parametrize("stage", [1, 3])
def test_parameters_outside_the_optimizer_are_frozen_and_said_to_be(stage: int) -> None:
    assert run_ranks(leftover_parameters, 2, stage) == [["head.weight"], ["head.weight"]]


def different_models() -> None:
    torch.manual_seed(0)
    ds_zero.shard(nn.Linear(3, 3 + ds_comm.get_rank()), config={"stage": 1})


def skip_a_layer(stage: int) -> None:
    model, zero = start(stage, "Unused")
    for step in range(3):
        zero.backward(model(z.batch(0), 0 if ds_comm.get_rank() == 0 else step))
        zero.step()


def fails_on_every_rank(function: Callable[..., Any], *args: Any, transport: Any = None) -> str:
    with pytest.raises(RankFailure) as caught:
        run_ranks(function, 2, *args, timeout=30, transport=transport)
    text = str(caught.value)
    assert "2 of 2 ranks failed" in text
    return text


def test_ranks_that_build_different_models() -> None:
    assert "every rank must build the same model" in fails_on_every_rank(different_models)


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_a_rank_that_skips_a_layer_at_stage_3(transport: Any) -> None:
    text = fails_on_every_rank(skip_a_layer, 3, transport=transport)
    assert "DivergenceError" in text
    assert "rank 0" in text and "rank 1" in text and "blocks." in text and "all_gather" in text


def test_a_rank_that_skips_a_layer_below_stage_3_contributes_zeros() -> None:
    for stage in (0, 1, 2):
        run_ranks(skip_a_layer, 2, stage)
