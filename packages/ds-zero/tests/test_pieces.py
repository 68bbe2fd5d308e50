"""Optimizers that need whole parameters: equal at every layout, resumed at another, and fairly shared out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zero_helpers as z
from zero_piecewise import Whole, plain_step

import ds_comm
import ds_zero
from ds_comm.testing import run_ranks
from ds_zero import checkpoint
from ds_zero._pieces import _owners, _parts
from ds_zero.layout import ParamSpec, plan_shard_map


@pytest.mark.parametrize("dtype", [None, "bf16", "fp16"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_stage_has_the_bits_of_one_rank(ranks: int, dtype: str | None) -> None:
    options: dict[str, Any] = {"optimizer": "whole", "grouped": True, "dtype": dtype, "gradient_clipping": 0.5}
    many = run_ranks(z.all_stages, ranks, "Tied", total=ranks, **options)
    for rank, (_, found) in enumerate(many):
        assert not found, (rank, found)
    (single, found) = run_ranks(z.all_stages, 1, "Tied", (0, 3), total=ranks, **options)[0]
    assert not found, found
    assert not z.differences(many[0][0], single)


def test_frozen_and_unused_parameters() -> None:
    for name in ("Frozen", "Unused"):
        for rank, (_, found) in enumerate(run_ranks(z.all_stages, 2, name, optimizer="whole")):
            assert not found, (name, rank, found)


def test_one_rank_is_plain_torch() -> None:
    result = run_ranks(z.train, 1, "Net", 2, optimizer="whole")[0]
    model = z.build("Net")
    parameters = list(model.parameters())
    momenta = [torch.zeros_like(p) for p in parameters]
    for step in range(4):
        torch.manual_seed(step)
        grads = torch.autograd.grad(model(z.batch(step), step), parameters)
        with torch.no_grad():
            plain_step(parameters, momenta, list(grads))
    for name, p in model.named_parameters():
        torch.testing.assert_close(result["values"][name], p.detach(), rtol=0, atol=1e-6)


def seen_and_state(stage: int) -> tuple[list[str], list[str], set[tuple[str, ...]]]:
    model = z.build("Net")
    inner = Whole(z.groups_of(model, True))
    model, zero = ds_zero.shard(model, inner, config=z.zero_config(stage))
    assert zero is not None
    zero.backward(model(z.batch(ds_comm.get_rank())))
    schedule = torch.optim.lr_scheduler.StepLR(inner, 1)
    zero.step()
    schedule.step()
    return inner.seen[0], sorted(n for n, _ in model.named_parameters()), {tuple(s) for s in inner.state.values()}


@pytest.mark.parametrize("stage", [0, 3])
def test_every_rank_sees_every_parameter_in_one_order(stage: int) -> None:
    results = run_ranks(seen_and_state, 3, stage)
    assert all(seen == results[0][0] and sorted(seen) == names for seen, names, _ in results)
    states = set.union(*(kinds for _, _, kinds in results))
    assert states == {("step", "momentum"), ("step", "momentum", "extra")}


def train_and_save(folder: str, stage: int, steps: int, load: bool) -> z.Result:
    """Train `steps` steps of 6 micro-batches each; from a checkpoint if `load`, else ending in one."""
    model = z.build("Tied")
    inner = Whole(z.groups_of(model, True))
    share = 6 // ds_comm.get_world_size()
    settings = z.zero_config(stage, dtype="bf16", gradient_accumulation_steps=share)
    model, zero = ds_zero.shard(model, inner, config=settings)
    assert zero is not None
    first = 0
    if load:
        first = 2
        keys = checkpoint.state_keys(folder)
        targets = zero.import_targets(keys)
        assert checkpoint.load(folder, targets, shard_map=zero.shard_map) is not None
        zero.finish_import(targets)
    for step in range(first, first + steps):
        for micro in range(share):
            zero.backward(model(z.batch(6 * step + ds_comm.get_rank() * share + micro), step))
        zero.step()
        zero.zero_grad()
    if not load:
        checkpoint.save(folder, "two", zero.export_state(), shard_map=zero.shard_map).wait()
    steps_done = {float(state["step"]) for state in inner.state.values()}
    masters = {n: ds_zero.safe_get_full_fp32_param(p) for n, p in model.named_parameters()}
    return {"values": z.values_of(model), "masters": masters, "steps": steps_done}


@pytest.mark.parametrize(("before", "after"), [((3, 2), (1, 0)), ((1, 0), (2, 3)), ((2, 3), (2, 1))])
def test_resume_at_another_layout(tmp_path: Path, before: tuple[int, int], after: tuple[int, int]) -> None:
    run_ranks(train_and_save, before[0], str(tmp_path), before[1], 2, False)
    here = run_ranks(train_and_save, before[0], str(tmp_path), before[1], 2, True)[0]
    there = run_ranks(train_and_save, after[0], str(tmp_path), after[1], 2, True)[0]
    assert here["steps"] == there["steps"] == {4.0}
    for name, value in here["masters"].items():  # ranks against accumulation: sums of gradients in another order
        torch.testing.assert_close(there["masters"][name], value, rtol=0, atol=2e-3 if before[0] != after[0] else 0)


def test_work_is_shared_out() -> None:
    shapes = [(4, 6), (6, 6), (2, 6), (6, 6), (6,)]
    specs = [ParamSpec(f"p{i}", shape, "float32", True, 0) for i, shape in enumerate(shapes)]
    (layout,) = plan_shard_map([("block", specs)], num_shards=3).units
    owners = _owners(layout, [0, 1, 2, 3], 3)
    assert owners == {1: 0, 3: 1, 0: 2, 2: 2}
    parts = [part for rank in range(3) for part in _parts(layout, rank, [0, 1, 2, 3])]
    for slot, shape in enumerate(shapes[:4]):
        pieces = [piece for index, piece in parts if index == slot]
        assert sum(piece.numel for piece in pieces) == shape[0] * shape[1]
        assert pieces[0].start == 0 and pieces[-1].stop == shape[0] * shape[1]
