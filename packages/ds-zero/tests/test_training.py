"""The training loop beyond the plain one: buckets, transports, accumulation, no_sync, several models, edits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zero_helpers as z
from torch import nn

import ds_comm
import ds_zero
from ds_comm.testing import run_ranks

LAYOUTS: list[dict[str, Any]] = [
    {"reduce_bucket_size": 100},
    {"allgather_bucket_size": 70},
    {"sub_group_size": 50},
    {"sub_group_size": 50, "optimizer": "sgd"},
    {"reduce_scatter": False},
    {"overlap_comm": False},
    {"overlap_comm": True},
    {"param_persistence_threshold": 30},
    {"param_persistence_threshold": 1000, "model_persistence_threshold": 200},
    {"max_reuse_distance": 10_000},
    {"by_hand": True},
    {"check_nonfinite": False},
]


def compare_layouts(stage: int, dtype: str | None) -> list[str]:
    found = []
    plain = {name: z.train("Tied", stage, steps=3, dtype=dtype, optimizer=name) for name in ("adamw", "sgd")}
    for options in LAYOUTS:
        other = z.train("Tied", stage, steps=3, dtype=dtype, **options)
        found += [f"{options}: {d}" for d in z.differences(plain[options.get("optimizer", "adamw")], other)]
    return found


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (1, "bf16"), (2, None), (3, "bf16")])
def test_no_layout_option_changes_a_bit(stage: int, dtype: str | None) -> None:
    assert run_ranks(compare_layouts, 2, stage, dtype) == [[], []]


GLOO_OPTIONS: list[dict[str, Any]] = [
    {"prefetch_bucket_size": 0},
    {"prefetch_bucket_size": 400},
    {"max_live_parameters": 500},
    {"max_reuse_distance": 10_000},
]


def gloo_stage_3(name: str) -> list[Any]:
    assert ds_comm.communicator().kind == "gloo"
    results = [z.train(name, 3, steps=3, **options) for options in GLOO_OPTIONS]
    return [z.differences(results[0], other) for other in results[1:]] + [results[0]]


@pytest.mark.parametrize(
    "name",
    ["Net", "RootParameters", "Attention", "ReturnsParameter", "External", "CheckpointedReentrant", "Checkpointed"],
)
def test_copying_transport_with_prefetch_and_reuse(name: str) -> None:
    """Released memory is really gone there: a parameter used outside its gathered time would show."""
    for *gaps, result in run_ranks(gloo_stage_3, 2, name, transport="gloo"):
        assert not any(gaps)
        shm = run_ranks(z.train, 2, name, 3, steps=3)[0]
        assert not z.differences(shm, result)


def test_unannounced_accumulation_sums_as_torch_does() -> None:
    """Without gradient_accumulation_steps the micro-batches are added up; with `accumulation=` they are divided."""
    plain = run_ranks(z.train, 2, "Net", 0, total=4, announce=True, optimizer="sgd")[0]
    for stage in range(4):
        divided = run_ranks(divide_by_two, 2, stage)[0]
        for name, value in plain["values"].items():
            torch.testing.assert_close(divided["values"][name], value, rtol=1e-5, atol=1e-6)
        assert not z.differences(divided, run_ranks(divide_by_two, 2, 0)[0], ("values",))


def divide_by_two(stage: int) -> dict[str, Any]:
    model, zero = ds_zero.shard(m := z.build("Net"), z.OPTIMIZERS["sgd"](m.parameters()), config=z.zero_config(stage))
    for step in range(4):
        for micro in range(2):
            index = step * 4 + ds_comm.get_rank() * 2 + micro
            if stage % 2:
                (model(z.batch(index), step) / 2).backward()
            else:
                zero.backward(model(z.batch(index), step), accumulation=2)
        zero.step()
    return {"values": z.values_of(model)}


def start(stage: int, name: str = "Net", **config: Any) -> tuple[nn.Module, ds_zero.ZeroOptimizer]:
    model = z.build(name)
    model, zero = ds_zero.shard(model, z.OPTIMIZERS["adamw"](model.parameters()), config=z.zero_config(stage, **config))
    assert zero is not None
    return model, zero


def one_step(model: nn.Module, zero: ds_zero.ZeroOptimizer, index: int) -> None:
    zero.backward(model(z.batch(2 * index + ds_comm.get_rank())))
    zero.step()


def use_no_sync(stage: int) -> list[Any]:
    """Two kept micro-batches and one reduced; then two kept ones reduced without a further backward."""
    rank, results = ds_comm.get_rank(), []
    model, zero = start(stage, gradient_accumulation_steps=3)
    before = ds_comm.communicator().ledger.wire_elements_of("reduce_scatter")
    with zero.no_sync():
        zero.backward(model(z.batch(rank)))
        model(z.batch(2 + rank)).backward()
    kept = ds_comm.communicator().ledger.wire_elements_of("reduce_scatter") == before
    zero.backward(model(z.batch(4 + rank)))
    zero.step()
    results.append(z.values_of(model))
    with zero.no_sync():
        zero.backward(model(z.batch(6 + rank)))
        zero.backward(model(z.batch(8 + rank)))
    zero.reduce_kept()
    zero.step()
    results.append(z.values_of(model))
    with zero.no_sync():
        zero.backward(model(z.batch(6 + rank)))
    zero.zero_grad()
    assert not zero.has_gradients()
    with pytest.raises(ds_zero.ZeroStateError, match="without a backward"):
        zero.step()
    return [kept, *results]


def test_no_sync_at_every_stage() -> None:
    first = run_ranks(use_no_sync, 2, 0)[0]
    for stage in (1, 2, 3):
        other = run_ranks(use_no_sync, 2, stage)[0]
        assert other[0]
        for a, b in zip(first[1:], other[1:], strict=True):
            assert all(torch.equal(a[n], b[n]) for n in a)
    synced = run_ranks(three_synced, 2)[0]
    for name, value in synced.items():
        torch.testing.assert_close(first[1][name], value, rtol=1e-5, atol=1e-6)


def three_synced() -> dict[str, Any]:
    model, zero = start(2, gradient_accumulation_steps=3)
    for micro in range(3):
        zero.backward(model(z.batch(2 * micro + ds_comm.get_rank())))
    zero.step()
    return z.values_of(model)


def interleave() -> list[str]:
    """Two models at different stages in one process, with an evaluation of each between the steps."""
    one, zero_one = start(3)
    two, zero_two = start(1)
    for step in range(3):
        index = 2 * step + ds_comm.get_rank()
        loss_one, loss_two = one(z.batch(index)), two(z.batch(index))
        zero_two.backward(loss_two)
        with torch.no_grad():
            two.eval()(z.batch(index))
        two.train()
        zero_one.backward(loss_one)
        with torch.inference_mode():
            one.eval()(z.batch(index))
        one.train()
        zero_one.step()
        zero_two.step()
    a, b, alone = z.values_of(one), z.values_of(two), z.train("Net", 2, steps=3)["values"]
    return [n for n in a if not torch.equal(a[n], b[n]) or not torch.equal(a[n], alone[n])]


def test_two_models_at_different_stages_interleaved_with_evaluation() -> None:
    assert run_ranks(interleave, 2) == [[], []]


def unusual_backwards(stage: int) -> dict[str, Any]:
    rank = ds_comm.get_rank()
    model, zero = start(stage)
    two = model(z.batch(rank)) + model(z.batch(2 + rank))  # two forwards, one backward
    zero.backward(two)
    zero.step()
    loss = model(z.batch(4 + rank))
    zero.backward(loss, retain_graph=True)  # one forward, two backwards
    zero.backward(loss)
    zero.step()
    first, second = model(z.batch(6 + rank)), model(z.batch(8 + rank))
    with torch.no_grad():
        model(z.batch(1))
    zero.scale(second).backward()
    zero.scale(first).backward()
    zero.step()
    return {"values": z.values_of(model), "norms": zero.grad_norm}


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_forwards_and_backwards_need_not_alternate(transport: Any) -> None:
    first = run_ranks(unusual_backwards, 2, 0, transport=transport)[0]
    for stage in (1, 2, 3):
        assert not z.differences(
            first, run_ranks(unusual_backwards, 2, stage, transport=transport)[0], ("values", "norms")
        )


def edit_weights(stage: int, dtype: str | None) -> dict[str, Any]:
    """Values written by the user count: into the 16-bit parameters, through GatheredParameters, through `.data`."""
    model, zero = start(stage, dtype=dtype)
    one_step(model, zero, 0)
    with ds_zero.GatheredParameters(list(model.parameters()), modifier_rank=0), torch.no_grad():
        if ds_comm.get_rank() == 0 or stage < 3:
            model.head.weight.mul_(0.5)
    if stage < 3:
        state = {n: v.clone() for n, v in model.state_dict().items()}
        state["head.weight"] += 1.0
        model.load_state_dict(state)
    else:
        with ds_zero.GatheredParameters(model.head.weight, modifier_rank=0), torch.no_grad():
            model.head.weight += 1.0
    with ds_zero.GatheredParameters(model.blocks[1].up.bias, modifier_rank=1):
        model.blocks[1].up.bias.data.fill_(0.25)
    if stage < 3:
        zero.refresh_master()
    before = z.values_of(model)
    assert float(before["blocks.1.up.bias"].min()) == 0.25
    for group in zero.param_groups:
        group["lr"] = 0.0
    one_step(model, zero, 1)  # nothing but the edits may show: with lr 0 the weights stay
    after = z.values_of(model)
    assert all(torch.equal(before[n], after[n]) for n in before), [
        n for n in before if not torch.equal(before[n], after[n])
    ]
    return {"values": after}


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_values_written_by_the_user_are_kept(dtype: str | None) -> None:
    first = run_ranks(edit_weights, 2, 0, dtype)[0]
    for stage in (1, 2, 3):
        assert not z.differences(first, run_ranks(edit_weights, 2, stage, dtype)[0], ("values",))


def forget_gradients(stage: int) -> list[str]:
    """Gradients that zero_grad forgot leave no trace, even where ranks used different parameters in that backward."""
    model, zero = start(stage, "Unused")
    reference, plain = start(stage, "Unused")
    rank = ds_comm.get_rank()
    step = 0 if stage == 3 else rank  # stages 0-2: rank 1 skips a block
    model(z.batch(rank), step).backward()
    zero.zero_grad()
    for m, o in ((model, zero), (reference, plain)):
        one_step(m, o, 0)
        o.zero_grad(set_to_none=False)
    a, b = z.values_of(model), z.values_of(reference)
    return [n for n in a if not torch.equal(a[n], b[n])]


@pytest.mark.parametrize("stage", range(4))
def test_zero_grad_after_a_backward(stage: int) -> None:
    assert run_ranks(forget_gradients, 2, stage) == [[], []]


def skip_on_one_rank(stage: int) -> dict[str, Any]:
    model, zero = start(stage, "Unused")
    rank = ds_comm.get_rank()
    for step in range(3):
        zero.backward(model(z.batch(2 * step + rank), 0 if rank == 0 else 1))
        zero.step()
    return {"values": z.values_of(model)}


def test_a_block_that_one_rank_skips_contributes_zeros() -> None:
    first = run_ranks(skip_on_one_rank, 2, 0)[0]
    for stage in (1, 2):
        assert not z.differences(first, run_ranks(skip_on_one_rank, 2, stage)[0], ("values",))


def resume_in_memory(stage: int, dtype: str | None) -> list[str]:
    model, zero = start(stage, dtype=dtype)
    one_step(model, zero, 0)
    state = zero.state_dict()
    state = torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, state)
    other, again = start(stage, dtype=dtype)
    again.load_state_dict(state)
    scheduler = torch.optim.lr_scheduler.StepLR(again.optimizer, 1)
    for m, o in ((model, zero), (other, again)):
        one_step(m, o, 1)
    a, b = z.values_of(model), z.values_of(other)
    scheduler.step()
    assert again.param_groups[0]["lr"] == pytest.approx(1e-3)  # still the wrapped optimizer's own groups
    return [n for n in a if not torch.equal(a[n], b[n])]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_state_dict_of_the_same_layout(stage: int) -> None:
    assert run_ranks(resume_in_memory, 2, stage, "bf16") == [[], []]


def close_and_shard_again(stage: int) -> list[str]:
    model, zero = start(stage)
    one_step(model, zero, 0)
    values = z.values_of(model)
    zero.close()
    ds_zero.sharded_of(model).close()
    assert all(type(p) is nn.Parameter and p.numel() for p in model.parameters())
    lost = [n for n, p in model.named_parameters() if not torch.equal(p, values[n])]
    loss = model(z.batch(0))
    loss.backward()
    model.zero_grad()
    _, again = ds_zero.shard(model, z.OPTIMIZERS["sgd"](model.parameters()), config=z.zero_config(3 - stage))
    one_step(model, again, 1)
    return lost


@pytest.mark.parametrize("stage", range(4))
def test_close_gives_an_ordinary_model_back(stage: int) -> None:
    assert run_ranks(close_and_shard_again, 2, stage) == [[], []]


def without_optimizer() -> list[float]:
    losses = []
    for stage in range(4):
        model, none = ds_zero.shard(z.build("Attention"), config=z.zero_config(stage))
        assert none is None
        with torch.no_grad():
            losses.append(float(model(z.batch(3))))
    return losses


def test_inference_only() -> None:
    for losses in run_ranks(without_optimizer, 2):
        assert len(set(losses)) == 1


def differing_seeds() -> dict[str, Any]:
    model = z.build("Net", seed=ds_comm.get_rank())
    model, _ = ds_zero.shard(model, config={"stage": 2})
    return z.values_of(model)


def test_rank_zero_gives_the_initial_values() -> None:
    expected = dict(z.build("Net", seed=0).named_parameters())
    for values in run_ranks(differing_seeds, 2):
        assert all(torch.equal(values[n], p) for n, p in expected.items())


def train_alone(name: str, dtype: str | None, look: bool, clip: float) -> dict[str, torch.Tensor]:
    """Four steps of one rank; with `look`, the gradients are put into flat memory before each step."""
    model, zero = start(2, name, dtype=dtype, gradient_clipping=clip)
    norms = []
    for step in range(4):
        zero.backward(model(z.batch(step), step))
        gradients = [ds_zero.safe_get_full_grad(p) for p in model.parameters()] if look else []
        zero.step()
        if gradients:
            norms.append(torch.stack([g.double().square().sum() for g in gradients if g is not None]).sum().sqrt())
            assert zero.grad_norm == pytest.approx(float(norms[-1]), rel=1e-6)
    return z.values_of(model)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("Tied", None), ("Unused", None), ("Mixed", None), ("Sparse", None), ("Frozen", "bf16"), ("Unused", "bf16")],
)
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_a_rank_alone_updates_from_gradients_as_they_lie(name: str, dtype: str | None, clip: float) -> None:
    """Reading a gradient puts the unit's into flat memory; the update gives the same bits from both."""
    loose, flat = (run_ranks(train_alone, 1, name, dtype, look, clip)[0] for look in (False, True))
    assert all(torch.equal(loose[key], flat[key]) for key in flat)
