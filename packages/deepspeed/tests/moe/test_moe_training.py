"""Experts under `deepspeed.initialize`: one process's losses, norms and weights at every stage, whatever `ep_size`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import expert_models
import pytest
import torch

import deepspeed
import ds_comm
from deepspeed.moe.utils import is_moe_param_group, split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups
from ds_comm.testing import RankFailure, run_ranks

CLIP = 0.5
VARIANTS: dict[str, dict[str, Any]] = {
    "top-1 that drops": {"k": 1, "capacity_factor": 0.7},
    "top-2, residual": {"k": 2, "use_residual": True},
    "top-3, no drops": {"k": 3, "drop_tokens": False},
    "experts as units": {"k": 1, "flat": True, "drop_tokens": False},
}


def config(stage: int, **changes: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **changes,
    }


def engine_of(net: torch.nn.Module, stage: int, grouped: bool = False) -> Any:
    parameters: Any = list(net.parameters())
    if grouped:
        parameters = split_params_into_different_moe_groups_for_optimizer({"params": parameters, "name": "all"})
    return deepspeed.initialize(model=net, config=config(stage), model_parameters=parameters)[0]


def train(engine: Any, steps: range) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in steps:
        loss = engine(*expert_models.batch(step, ds_comm.get_rank()))
        engine.backward(loss)
        engine.step()
        mean = loss.detach().reshape(1).clone()
        ds_comm.all_reduce(mean)
        losses.append(float(mean) / ds_comm.get_world_size())
        norms.append(float(engine.get_global_grad_norm()))
    return losses, norms


def run(ep_size: int) -> dict[tuple[str, int], dict[str, Any]]:
    found = {}
    for name, options in VARIANTS.items():
        for stage in range(4):
            net = expert_models.make(**options, ep_size=ep_size)
            engine = engine_of(net, stage, grouped=stage % 2 == 1)
            losses, norms = train(engine, range(4))
            state = engine._consolidated_16bit_state_dict()
            moe_groups = [is_moe_param_group(group) for group in engine.optimizer.param_groups]
            found[name, stage] = {"losses": losses, "norms": norms, "weights": state, "moe": moe_groups}
            engine.destroy()
    return found


@pytest.mark.parametrize(("world", "ep_size"), [(2, 2), (3, 1)])
def test_every_stage_is_one_process(world: int, ep_size: int) -> None:
    ranks = run_ranks(run, world, ep_size, timeout=240)
    for name, options in VARIANTS.items():
        expected = expert_models.train_plainly(expert_models.make(**options), range(4), world, CLIP)
        for stage in range(4):
            got = ranks[0][name, stage]
            assert [other[name, stage]["losses"] for other in ranks] == [got["losses"]] * world
            torch.testing.assert_close(got["losses"], expected["losses"], rtol=2e-5, atol=1e-6)
            torch.testing.assert_close(got["norms"], expected["norms"], rtol=2e-5, atol=1e-6)
            for key, value in expected["weights"].items():
                torch.testing.assert_close(
                    got["weights"][key], value, rtol=1e-4, atol=1e-5, msg=f"{name} {stage} {key}"
                )
            assert got["moe"] == ([False, True] if stage % 2 else [False])
            assert got["losses"] == ranks[0][name, 0]["losses"] and got["norms"] == ranks[0][name, 0]["norms"]


def over_copies() -> list[float]:
    """Experts as units at stage 3, on a transport where each gather is a collective; ranks route differently."""
    engine = engine_of(expert_models.make(k=1, flat=True, drop_tokens=False, num_experts=8), 3)
    return train(engine, range(3))[0]


def test_experts_without_tokens_do_not_part_the_ranks() -> None:
    first, second = run_ranks(over_copies, 2, transport="gloo")
    expected = expert_models.train_plainly(
        expert_models.make(k=1, flat=True, drop_tokens=False, num_experts=8), range(3), 2, CLIP
    )
    assert first == second
    torch.testing.assert_close(first, expected["losses"], rtol=2e-5, atol=1e-6)


def save(folder: str) -> tuple[list[float], list[float]]:
    engine = engine_of(expert_models.make(k=2), 3)
    train(engine, range(2))
    engine.save_checkpoint(folder)
    return train(engine, range(2, 4))


def resume(folder: str, stage: int) -> tuple[list[float], list[float]]:
    net = expert_models.make(k=2)
    torch.nn.init.zeros_(net.head.weight)
    engine = engine_of(net, stage, grouped=False)
    path, _ = engine.load_checkpoint(folder)
    assert path is not None and os.path.isdir(folder)
    return train(engine, range(2, 4))


def test_experts_are_saved_and_loaded(tmp_path: Path) -> None:
    expected = run_ranks(save, 2, str(tmp_path))[0]
    assert run_ranks(resume, 2, str(tmp_path), 3)[0] == expected
    assert run_ranks(resume, 2, str(tmp_path), 1)[0] == expected


def under_init() -> tuple[list[float], dict[str, Any]]:
    torch.manual_seed(3)
    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        net = expert_models.Net(num_experts=4, use_rts=False, min_capacity=1)
    engine = engine_of(net, 3)
    return train(engine, range(2))[0], engine._consolidated_16bit_state_dict()


def test_experts_under_zero_init() -> None:
    (first, state), (second, _) = run_ranks(under_init, 2)
    assert first == second and len(state) == len(expert_models.make().state_dict())


def expert_groups() -> dict[str, Any]:
    net = expert_models.make(k=1, ep_size=2)
    engine = engine_of(net, 0)
    name = net.blocks[0].moe.expert_group_name
    total = torch.full((1,), float(ds_comm.get_rank()))
    ds_comm.all_reduce(total, group=groups._get_expert_data_parallel_group(name))
    found = {
        "expert": groups._get_expert_parallel_group_ranks(name),
        "data": groups._get_expert_data_parallel_group_ranks(name),
        "sizes": (groups._get_expert_parallel_world_size(name), groups._get_expert_data_parallel_world_size(name)),
        "ranks": (groups._get_expert_parallel_rank(name), groups._get_expert_data_parallel_rank(name)),
        "sources": (groups._get_expert_parallel_src_rank(name), groups._get_expert_broadcast_src_rank(name)),
        "largest": (groups._get_max_expert_size(), groups._get_max_expert_size_name()),
        "alone": groups._get_expert_parallel_world_size("ep_size_1"),
        "names": sorted(groups._get_expert_data_parallel_group_dict()),
        "sum": float(total),
        "layers": engine.has_moe_layers,
    }
    groups._create_expert_and_data_parallel(2, use_data_before_expert_parallel_=True)
    found["data first"] = (
        groups._get_expert_parallel_group_ranks(name),
        groups._get_expert_data_parallel_group_ranks(name),
    )
    return found


def test_groups_of_experts() -> None:
    for rank, found in enumerate(run_ranks(expert_groups, 4)):
        pair, place = rank // 2 * 2, rank % 2
        assert found == {
            "expert": [pair, pair + 1],
            "data": [place, place + 2],
            "sizes": (2, 2),
            "ranks": (place, rank // 2),
            "sources": (pair, place),
            "largest": (2, "ep_size_2"),
            "alone": 1,
            "names": ["ep_size_1", "ep_size_2"],
            "sum": 2.0 + 2 * place,
            "layers": True,
            "data first": ([place, place + 2], [pair, pair + 1]),
        }


def too_many() -> None:
    engine_of(expert_models.make(ep_size=4), 0)


def test_an_ep_size_that_does_not_divide_the_ranks() -> None:
    with pytest.raises(RankFailure, match=r"ep_size 4 does not divide the 2 data-parallel ranks"):
        run_ranks(too_many, 2)
    with pytest.raises(KeyError, match=r"no expert-parallel groups named 'ep_size_7'"):
        groups._get_expert_parallel_group("ep_size_7")
