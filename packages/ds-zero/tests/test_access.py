"""safe_get_*/safe_set_*, leaf modules, and what parameters and optimizers tell about themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zero_helpers as z
from torch import nn

import ds_comm
import ds_zero
from ds_comm.testing import run_ranks


def start(stage: int, **config: Any) -> tuple[nn.Module, ds_zero.ZeroOptimizer]:
    model = z.build("Frozen")
    trained = [p for p in model.parameters() if p.requires_grad]
    model, zero = ds_zero.shard(model, z.OPTIMIZERS["adamw"](trained), config=z.zero_config(stage, **config))
    assert zero is not None
    return model, zero


def full(stage: int, dtype: str | None) -> dict[str, Any]:
    model, zero = start(stage, dtype=dtype)
    parameter, rank = model.blocks[0].up.weight, ds_comm.get_rank()
    assert ds_zero.safe_get_full_grad(parameter) is None
    assert ds_zero.safe_get_full_optimizer_state(parameter, "exp_avg") is None
    ordinary = nn.Parameter(torch.ones(2))
    assert ds_zero.safe_get_full_fp32_param(ordinary) is None
    assert ds_zero.safe_get_full_grad(ordinary) is None
    ds_zero.safe_set_full_fp32_param(ordinary, torch.zeros(2))
    model(z.batch(rank)).backward() if dtype != "fp16" else zero.backward(model(z.batch(rank)))
    grads = {n: ds_zero.safe_get_full_grad(p) for n, p in model.named_parameters()}
    assert all((g is None) != p.requires_grad for g, p in zip(grads.values(), model.parameters(), strict=True))
    assert all(g is None or g.dtype == torch.float32 for g in grads.values())
    if stage == 3:
        parts = torch.zeros(parameter.ds_numel)
        local = ds_zero.safe_get_local_grad(parameter)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        ds_comm.all_gather(sizes, torch.tensor([local.numel()]))
        offset = 0 if rank == 0 else int(sizes[0])
        parts[offset : offset + local.numel()] = local
        ds_comm.all_reduce(parts)
        assert torch.equal(parts.view(parameter.ds_shape), grads["blocks.0.up.weight"])
        assert sum(int(s) for s in sizes) == parameter.ds_numel
    else:
        with pytest.raises(AssertionError, match="safe_"):
            ds_zero.safe_get_local_grad(parameter)
    ds_zero.safe_update_full_grad_vectorized(model.parameters(), lambda grad, p: grad * 0.5)
    halved = ds_zero.safe_get_full_grad(parameter)
    assert torch.allclose(halved, grads["blocks.0.up.weight"] * 0.5, rtol=1e-2)
    zero.step()
    moment = ds_zero.safe_get_full_optimizer_state(parameter, "exp_avg")
    assert torch.allclose(moment, halved * 0.1, rtol=1e-5)
    assert ds_zero.safe_get_full_optimizer_state(parameter, "nothing") is None
    with pytest.raises(ds_zero.ZeroStateError, match="one number per parameter"):
        ds_zero.safe_get_full_optimizer_state(model.blocks[0].norm.weight, "step")  # on every rank
    ds_zero.safe_set_full_optimizer_state(parameter, torch.full_like(moment, 0.25), "exp_avg")
    assert bool((ds_zero.safe_get_full_optimizer_state(parameter, "exp_avg") == 0.25).all())
    value = torch.arange(parameter_numel(parameter)).view(moment.shape) / 64
    ds_zero.safe_set_full_fp32_param(parameter, value)
    assert torch.equal(ds_zero.safe_get_full_fp32_param(parameter), value)
    assert torch.equal(z.values_of(model)["blocks.0.up.weight"].float(), value.to(zero_dtype(dtype)).float())
    with pytest.raises(ds_zero.ZeroStateError, match=r"shape \(23, 11\), got \(2,\)"):
        ds_zero.safe_set_full_fp32_param(parameter, torch.ones(2))
    if stage == 3:
        local = ds_zero.safe_get_local_fp32_param(parameter)
        ds_zero.safe_set_local_fp32_param(parameter, local + 1.0)
        assert torch.equal(ds_zero.safe_get_full_fp32_param(parameter), value + 1.0)
        state = ds_zero.safe_get_local_optimizer_state(parameter, "exp_avg_sq")
        ds_zero.safe_set_local_optimizer_state(parameter, torch.ones_like(state), "exp_avg_sq")
        assert bool((ds_zero.safe_get_full_optimizer_state(parameter, "exp_avg_sq") == 1.0).all())
        zero.backward(model(z.batch(rank)))
        grad = ds_zero.safe_get_local_grad(parameter)
        ds_zero.safe_set_local_grad(parameter, torch.full_like(grad, 0.5))
        assert bool((ds_zero.safe_get_full_grad(parameter) == 0.5).all())
        zero.zero_grad()
    frozen = ds_zero.safe_get_full_fp32_param(model.blocks[1].up.bias)
    assert torch.equal(frozen, z.values_of(model)["blocks.1.up.bias"].float())
    return {"values": {n: g for n, g in grads.items() if g is not None}}


def parameter_numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def zero_dtype(name: str | None) -> torch.dtype:
    return {None: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


@pytest.mark.parametrize("dtype", [None, "bf16", "fp16"])
def test_full_and_local_access(dtype: str | None) -> None:
    first = run_ranks(full, 2, 0, dtype)[0]
    for stage in (1, 3):
        assert not z.differences(first, run_ranks(full, 2, stage, dtype)[0], ("values",))


class Leafy(z.Net):
    """A container inside one block: only a leaf mark makes the pair one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.ModuleDict({"left": z.Block(), "right": nn.Linear(z.DIM, z.DIM)})

    def body(self, x: torch.Tensor, step: int) -> torch.Tensor:
        return self.pair["right"](self.pair["left"](super().body(x, step)))


def leaves() -> list[str]:
    torch.manual_seed(0)
    model = Leafy()
    with pytest.raises(ValueError, match="Conv2d"):
        ds_zero.set_z3_leaf_modules(model, [nn.Conv2d])
    assert ds_zero.set_z3_leaf_modules(model, [nn.Conv2d], raise_if_not_found=False) == []
    assert ds_zero.set_z3_leaf_modules(model, ["torch.nn.modules.container.ModuleDict"]) == [model.pair]
    assert ds_zero.unset_z3_leaf_modules(model, [nn.ModuleDict]) == [model.pair]
    assert ds_zero.get_z3_leaf_modules(model) == []
    ds_zero.set_z3_leaf_modules(model, [z.Block])
    assert ds_zero.z3_leaf_module(model.pair["left"])
    model, _ = ds_zero.shard(model, config=z.zero_config(3))
    assert ds_zero.z3_leaf_parameter(model.pair["left"].up.weight)
    assert not ds_zero.z3_leaf_parameter(model.pair["right"].weight)
    assert not ds_zero.z3_leaf_parameter(nn.Parameter(torch.ones(1)))
    with torch.no_grad():
        model(z.batch(0))
    return [unit.name for unit in ds_zero.sharded_of(model).shard_map.units]


def test_leaf_modules() -> None:
    for names in run_ranks(leaves, 2):
        assert "pair.left" in names
        assert {"blocks.0", "blocks.1", "blocks.2"} <= set(names)


def named_units() -> list[list[str]]:
    chosen = []
    for units in (None, ["blocks.1", "head"], [z.Block]):
        model, _ = ds_zero.shard(z.build("Net"), config=z.zero_config(3), units=units)
        chosen.append([unit.name for unit in ds_zero.sharded_of(model).shard_map.units])
    return chosen


def test_units_named_by_the_user() -> None:
    automatic, named, classes = run_ranks(named_units, 1)[0]
    assert automatic == classes == ["embed", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert "blocks.1" in named and "head" in named and "blocks.0" not in named
