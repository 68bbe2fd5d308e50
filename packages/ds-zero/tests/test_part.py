"""A model in parts: one norm, one decision to skip, one checkpoint; lanes of gradients; duplicates count once."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_comm
import ds_zero
from ds_comm.testing import run_ranks
from ds_zero import ModelPart, NonFiniteGradientError, ShardMap, ZeroStateError
from ds_zero.checkpoint import full_state_dict, save
from ds_zero.layout import ParamSpec, plan_shard_map

WIDTH = 6


def stage(index: int) -> nn.ModuleDict:
    """One of two parts; both have `shared`, equal on both."""
    torch.manual_seed(index)
    own = nn.Linear(WIDTH, WIDTH, bias=False)
    torch.manual_seed(9)
    return nn.ModuleDict({str(index): own, "shared": nn.Linear(WIDTH, 2, bias=False)})


def alone() -> Any:
    """A group of this rank only: the replicas of its part."""
    return [ds_comm.new_group([rank]) for rank in range(ds_comm.get_world_size())][ds_comm.get_rank()]


def in_parts(model: nn.Module, duplicates: list[nn.Parameter], lr: float = 0.1, **config: Any) -> Any:
    part = ModelPart(ds_comm.communicator(), duplicates)
    groups = [{"params": list(model.parameters())}]
    return ds_zero.shard(model, torch.optim.SGD(groups, lr=lr), config=config, group=alone(), part=part)[1]


def gradients(index: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(50 + index)
    return [torch.randn(WIDTH, WIDTH, generator=generator), torch.full((2, WIDTH), 0.5)]


def deliver(model: nn.Module, values: list[Tensor]) -> None:
    parameters = list(model.parameters())
    torch.autograd.backward(parameters, [value.to(p.dtype) for p, value in zip(parameters, values, strict=True)])


def clipped_step(zero_stage: int) -> tuple[float, dict[str, Tensor]]:
    index = ds_comm.get_rank()
    model = stage(index)
    duplicates = [] if index == 0 else [model["shared"].weight]
    optimizer = in_parts(model, duplicates, stage=zero_stage, gradient_clipping=0.3)
    with ds_zero.gathered_units(list(model.parameters())):
        deliver(model, gradients(index))
    optimizer.step()
    found = {}
    for name, parameter in model.named_parameters():
        master = ds_zero.safe_get_full_fp32_param(parameter)
        assert master is not None
        found[name] = master.clone()
    return optimizer.grad_norm, found


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_norm_is_the_whole_models(zero_stage: int) -> None:
    counted = [*gradients(0), gradients(1)[0]]
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in counted))
    for index, (found, weights) in enumerate(run_ranks(clipped_step, 2, zero_stage)):
        assert found == pytest.approx(norm, rel=1e-6)
        for name, gradient in zip((f"{index}.weight", "shared.weight"), gradients(index), strict=True):
            before = stage(index).get_parameter(name).detach()
            torch.testing.assert_close(weights[name], before - 0.1 * gradient * 0.3 / (norm + 1e-6))


def one_bad_part(dtype: str, skip: bool | None) -> tuple[bool, float, str]:
    index = ds_comm.get_rank()
    model = stage(index)
    optimizer = in_parts(model, [], dtype=dtype, skip_nonfinite=skip)
    before = copy.deepcopy([p.detach() for p in model.parameters()])
    values = gradients(index)
    if index == 1:
        values[0][2, 3] = float("inf")
    deliver(model, values)
    text, scale = "", optimizer.loss_scale
    try:
        optimizer.step()
    except NonFiniteGradientError as error:
        text = str(error)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return optimizer.overflow, optimizer.loss_scale / scale, text


def test_a_bad_gradient_of_one_part_skips_the_step_of_all() -> None:
    assert run_ranks(one_bad_part, 2, "bf16", None) == [(True, 1.0, "")] * 2
    for overflow, ratio, text in run_ranks(one_bad_part, 2, "fp16", None):
        assert (overflow, text) == (True, "") and ratio in (0.5, 1.0)  # hysteresis


def test_fp32_names_the_parameter_on_the_parts_that_lack_it() -> None:
    for overflow, _, text in run_ranks(one_bad_part, 2, "fp32", None):
        assert overflow and text.startswith("the gradient of 1.weight holds inf or NaN")


def one_empty_part() -> tuple[float, bool]:
    index = ds_comm.get_rank()
    model = stage(0) if index == 0 else nn.Tanh()
    optimizer = in_parts(model, [], dtype="bf16")
    for bad in (True, False):
        if index == 0:
            values = gradients(0)
            values[0][0, 0] = float("nan") if bad else 0.0
            deliver(model, values)
        optimizer.end_backward(force=True)
        optimizer.step()
        assert optimizer.overflow == bad
    assert optimizer.export_state() == [] or index == 0
    return optimizer.grad_norm, optimizer.step_applied


def test_a_part_without_parameters_takes_its_part() -> None:
    first, second = run_ranks(one_empty_part, 2)
    assert first == second and first[1] and first[0] > 0


# -- lanes --------------------------------------------------------------------------------------------------------


class Chunks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.chunks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))


NUM_BATCHES = 3


def chunk_gradients(micro_batch: int, chunk: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * ds_comm.get_rank() + 10 * micro_batch + chunk)
    return [torch.randn(WIDTH, WIDTH, generator=generator) * 3, torch.randn(WIDTH, generator=generator)]


def out_of_step(zero_stage: int, order: list[tuple[int, int]] | None) -> list[Tensor]:
    """Train on gradients that arrive in the order of (micro-batch, chunk); None: without lanes, chunk by chunk."""
    model = Chunks()
    lanes = [list(chunk.parameters()) for chunk in model.chunks]
    solo = [ds_comm.new_group([rank]) for rank in range(2)][ds_comm.get_rank()]
    part = ModelPart(ds_comm.communicator(solo), lanes=lanes) if order is not None else None
    config = {"stage": zero_stage, "dtype": "bf16", "gradient_accumulation_steps": NUM_BATCHES}
    optimizer = ds_zero.shard(model, torch.optim.AdamW(model.parameters(), lr=0.1), config=config, part=part)[1]
    assert optimizer is not None
    for _ in range(2):
        optimizer.reducer.announce(NUM_BATCHES)
        for micro_batch, chunk in order or [(i, chunk) for i in range(NUM_BATCHES) for chunk in (1, 0)]:
            with ds_zero.gathered_units(lanes[chunk]):
                torch.autograd.backward(lanes[chunk], [g.bfloat16() for g in chunk_gradients(micro_batch, chunk)])
            if order is not None:
                optimizer.reducer.end_lane(chunk)
            if chunk == 0:
                optimizer.end_backward(force=True)
        optimizer.step()
    found = [ds_zero.safe_get_full_fp32_param(p) for p in model.parameters()]
    return [value.clone() for value in found if value is not None]


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_chunks_that_are_ahead_change_no_bit(zero_stage: int) -> None:
    """Without lanes, gradients of a later micro-batch would be added in the model's dtype before they are reduced."""
    ahead = [(0, 1), (1, 1), (2, 1), (0, 0), (1, 0), (2, 0)]
    expected = run_ranks(out_of_step, 2, zero_stage, None)
    found = run_ranks(out_of_step, 2, zero_stage, ahead)
    for mine, theirs in zip(found, expected, strict=True):
        assert len(mine) == 4 and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_lanes_share_no_unit() -> None:
    specs = [ParamSpec(f"p{i}", (4,), "float32", True, 0, (), i % 2) for i in range(4)]
    for threshold in (0, 100):
        units = plan_shard_map([("block", specs)], num_shards=2, persistence_threshold=threshold).units
        assert [[slot.name for slot in unit.slots] for unit in units] == [["p0", "p2"], ["p1", "p3"]]
        assert len({unit.name for unit in units}) == 2


def announce_twice() -> None:
    model = nn.Linear(WIDTH, 1)
    optimizer = ds_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1))[1]
    assert optimizer is not None
    optimizer.backward(model(torch.ones(1, WIDTH)).sum())
    with pytest.raises(ZeroStateError, match="a step of 4 micro-batches is announced, but 1 have been reduced"):
        optimizer.reducer.announce(4)


def test_announcing_inside_a_step_is_an_error() -> None:
    run_ranks(announce_twice, 1)


# -- duplicates ---------------------------------------------------------------------------------------------------


def share_a_gradient(zero_stage: int, dtype: str, num: int) -> tuple[Tensor, Tensor]:
    """Two replicas of one part; the total of one parameter goes to another of the same shape, unit and layout apart."""
    torch.manual_seed(1)
    model = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)])
    owner, duplicate = model[0].weight, model[1].weight
    config = {"stage": zero_stage, "dtype": dtype, "gradient_accumulation_steps": num}
    optimizer = ds_zero.shard(model, torch.optim.SGD(model.parameters(), lr=1.0), config=config)[1]
    assert optimizer is not None
    with pytest.raises(ZeroStateError, match=r"'0.weight' has no gradient since the last step"):
        ds_zero.accumulated_gradient(owner)
    for i in range(num):
        value = chunk_gradients(i, 0)[0].to(owner.dtype)
        with ds_zero.gathered_units([owner, duplicate]):
            torch.autograd.backward([owner, duplicate], [value, torch.full_like(value, 77.0)])
        optimizer.end_backward(force=True)
    total = ds_zero.accumulated_gradient(owner)
    assert total.dtype == torch.float32 and total.shape == (WIDTH, WIDTH)
    ds_zero.set_accumulated_gradient(duplicate, total)
    before = [ds_zero.safe_get_full_fp32_param(p).clone() for p in (owner, duplicate)]  # type: ignore[union-attr]
    optimizer.step()
    after = [ds_zero.safe_get_full_fp32_param(p) for p in (owner, duplicate)]
    return tuple(a - b for a, b in zip(after, before, strict=True))  # type: ignore[operator, return-value]


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_duplicate_takes_the_sum_over(zero_stage: int, dtype: str, num: int) -> None:
    for owner, duplicate in run_ranks(share_a_gradient, 2, zero_stage, dtype, num):
        torch.testing.assert_close(owner, duplicate, rtol=0, atol=1e-5)
        assert owner.abs().max() < 20  # not the 77 that arrived at the duplicate


def save_parts(folder: Path) -> None:
    index = ds_comm.get_rank()
    model = stage(index)
    optimizer = in_parts(model, [] if index == 0 else [model["shared"].weight])
    maps: list[Any] = [None] * 2
    ds_comm.all_gather_object(maps, optimizer.shard_map)
    save(
        folder,
        "t",
        optimizer.export_state(),
        shard_map=ShardMap.joined(maps),
        duplicates=optimizer.sharded.duplicate_names,
        buffers={f"{index}.seen": torch.tensor(index)},
        stores_buffers=True,
        asynchronous=False,
    )


def test_parts_save_one_checkpoint(tmp_path: Path) -> None:
    run_ranks(save_parts, 2, tmp_path)
    state = full_state_dict(tmp_path)
    assert set(state) == {"0.weight", "1.weight", "shared.weight", "0.seen", "1.seen"}
    for index in range(2):
        for name, value in stage(index).state_dict().items():
            assert torch.equal(state[name], value)
        assert int(state[f"{index}.seen"]) == index
