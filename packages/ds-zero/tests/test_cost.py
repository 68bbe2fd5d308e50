"""The laws of memory and traffic: equal to the live tensors, the ledger and the formulas, at 1 to 1,024 ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zero_helpers as z
from torch import Tensor, nn

import ds_comm
import ds_zero
from ds_comm.testing import fake_world, run_ranks
from ds_zero.cost import memory_per_rank, traffic_per_step


def start(stage: int, freeze: bool = False, **config: Any) -> tuple[nn.Module, ds_zero.ZeroOptimizer]:
    """The plain model; `freeze` its middle block, which gradients pass through."""
    model = z.build("Net")
    model.blocks[1].requires_grad_(not freeze)
    trained = [p for p in model.parameters() if p.requires_grad]
    model, zero = ds_zero.shard(model, z.OPTIMIZERS["adamw"](trained), config=z.zero_config(stage, **config))
    assert zero is not None
    return model, zero


def nbytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def live(zero: ds_zero.ZeroOptimizer) -> dict[str, int]:
    """Bytes of the runtime's own tensors."""
    units = zero.sharded.units
    states = [v for state in zero.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()]
    return {
        "parameters": nbytes([u.storage.shard if u.sharded else u.storage.full for u in units]),
        "masters": nbytes([u.master for u in units if u.master is not None and u.master is not u.storage.own]),
        "optimizer": nbytes(states),
        "gradients": nbytes([u.grad for u in units if u.grad is not None]),
    }


def costs(stage: int, dtype: str | None, micro: int, config: dict[str, Any]) -> None:
    model, zero = start(stage, freeze=True, dtype=dtype, gradient_accumulation_steps=micro, **config)
    ledger, shard_map, rank = ds_comm.communicator().ledger, zero.shard_map, ds_comm.get_rank()
    for step in range(2):  # the first step also makes windows and agrees on an order
        ledger.reset()
        for _ in range(micro):
            zero.backward(model(z.batch(0)))
        expected = memory_per_rank(shard_map, stage, rank=rank, accumulates=micro > 1)
        actual = live(zero)
        if not step:
            actual["optimizer"] = expected.optimizer  # made by the first step
        assert actual == {key: getattr(expected, key) for key in actual}
        zero.step()
    traffic = traffic_per_step(shard_map, stage, micro_batches=micro)
    counts: dict[str, int] = {}
    for (op, _), count in ledger.counts.items():
        counts[op] = counts.get(op, 0) + count
    assert {op: counts.get(op, 0) for op in ("all_gather", "reduce_scatter", "all_reduce")} == {
        op: traffic.calls.get(op, 0) for op in ("all_gather", "reduce_scatter", "all_reduce")
    }
    assert ledger.wire_elements == pytest.approx(traffic.wire_elements + traffic.scalar_wire_elements, rel=1e-15)


@pytest.mark.parametrize(("dtype", "micro"), [("bf16", 1), (None, 1), ("bf16", 3)])
@pytest.mark.parametrize("stage", range(4))
def test_equal_to_what_runs(stage: int, dtype: str | None, micro: int) -> None:
    run_ranks(costs, 3, stage, dtype, micro, {})
    if stage == 3:
        run_ranks(costs, 2, stage, dtype, micro, {"param_persistence_threshold": 40})


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64, 1000, 1024])
@pytest.mark.parametrize("stage", range(4))
def test_laws_in_a_fake_world(stage: int, ranks: int) -> None:
    """Stages 0-2 move 2P(N-1)/N elements per step, stage 3 moves 3P(N-1)/N; bytes per rank follow the memory law."""
    with fake_world(rank=ranks - 1, world_size=ranks):
        model, zero = start(stage, dtype="bf16", check_nonfinite=False)
        shard_map, ledger = zero.shard_map, ds_comm.communicator().ledger
        padded = shard_map.numel + shard_map.padding_numel
        assert padded % ranks == 0
        assert shard_map.padding_numel < len(shard_map.units) * 32 * ranks + 32 * sum(
            len(u.slots) for u in shard_map.units
        )
        for _ in range(2):
            ledger.reset()
            zero.backward(model(z.batch(0)))
            expected = memory_per_rank(shard_map, stage, rank=ranks - 1)
            found = live(zero)
            zero.step()
        assert {key: getattr(expected, key) for key in found} == found
        share = padded // ranks
        kept = padded if stage < 3 else share
        state = padded if stage == 0 else share
        assert expected.parameters == 2 * kept
        assert expected.masters == 4 * state
        assert expected.gradients == 2 * state
        assert expected.optimizer <= 8 * state  # padding behind the last parameter has no moments
        traffic = traffic_per_step(shard_map, stage)
        assert traffic.wire_elements == (3 if stage == 3 else 2) * share * (ranks - 1)
        if ranks == 1:
            assert ledger.wire_elements == 0
            return
        assert ledger.wire_elements == pytest.approx(traffic.wire_elements + traffic.scalar_wire_elements, rel=1e-15)
        data = {op: row for op, row in ledger.summary().items() if op in ("all_gather", "reduce_scatter", "all_reduce")}
        assert {op: row["count"] for op, row in data.items()} == traffic.calls
        assert sum(row["nbytes"] for row in data.values()) == traffic.nbytes


def test_padding_moments_and_states() -> None:
    with fake_world(rank=0, world_size=4):
        _, zero = start(2)
    whole = sum(unit.padded_numel for unit in zero.shard_map.units)
    per_rank = [memory_per_rank(zero.shard_map, 2, rank=rank, num_states=1) for rank in range(4)]
    covered = sum(cost.optimizer for cost in per_rank) // 4
    assert zero.shard_map.numel <= covered <= whole
    assert per_rank[0].masters == 0  # fp32 parameters are their own master
    assert per_rank[0].total == per_rank[0].parameters + per_rank[0].optimizer + per_rank[0].gradients
    three = memory_per_rank(zero.shard_map, 3)
    assert three.largest_unit == 4 * max(unit.padded_numel for unit in zero.shard_map.units)
    assert per_rank[0].largest_unit == 0


def test_the_paper_numbers_without_padding() -> None:
    """16 bytes per parameter at one rank, for bf16 and Adam, when nothing needs padding."""
    with fake_world(rank=0, world_size=1):
        model = nn.Linear(32, 32, bias=False)
        _, zero = ds_zero.shard(model, torch.optim.AdamW(model.parameters()), config={"stage": 0, "dtype": "bf16"})
    assert zero is not None
    assert memory_per_rank(zero.shard_map, 0).total == 16 * 32 * 32
