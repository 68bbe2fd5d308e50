"""zero.Init and GatheredParameters: the contract of clients that build and edit sharded models."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import zero_helpers as z
from torch import nn

import ds_comm
import ds_zero
from ds_comm.testing import run_ranks
from ds_zero import GatheredParameters, Init, ZeroParamStatus


class Initialised(z.Net):
    """A parent that initialises its children's parameters, by torch.nn.init, in place, through .data, and by apply."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.kaiming_normal_(self.blocks[1].up.weight)
        nn.init.xavier_uniform_(self.blocks[2].up.weight, gain=0.5)
        nn.init.trunc_normal_(self.embed.weight, std=0.3)
        for block in self.blocks:
            nn.init.zeros_(block.up.bias)
            block.down.weight.data.normal_(0.0, 0.1)
            with torch.no_grad():
                block.norm.weight.fill_(0.5)
                block.norm.bias += 0.25
        self.apply(self.weights)

    def weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.uniform_(-1, 1)
        if isinstance(module, nn.Embedding):
            module.weight.data[0].zero_()


def is_sharded(model: nn.Module) -> bool:
    return all(p.shape == (0,) and p.ds_status is ZeroParamStatus.NOT_AVAILABLE for p in model.parameters())


def built_equal(cls: type[nn.Module], dtype: torch.dtype | None, way: str) -> list[str]:
    torch.manual_seed(3)
    plain = cls()
    if dtype is not None:
        plain.to(dtype)
    torch.manual_seed(3 if way != "seeds" else 3 + ds_comm.get_rank())
    if way == "module":
        model = cls()
        Init(module=model, dtype=dtype)
    elif way == "nested":
        with Init(dtype=dtype), Init(dtype=dtype, enabled=False), Init(dtype=dtype):
            model = cls()
    else:
        with Init(dtype=dtype):
            model = cls()
    assert is_sharded(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(
        p.ds_shape == q.shape and p.ds_numel == q.numel()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True)
    )
    values = z.values_of(model)
    assert is_sharded(model)
    return [n for n, p in plain.named_parameters() if values[n].dtype != p.dtype or not torch.equal(values[n], p)]


BUILDS = [(z.Tied, dtype, way) for dtype in (None, torch.bfloat16) for way in ("context", "module", "nested", "seeds")]
BUILDS += [(Initialised, None, way) for way in ("context", "nested", "seeds")]
"""Random numbers that are drawn in place in another dtype are other numbers: Initialised is compared in fp32 only."""


@pytest.mark.parametrize(("cls", "dtype", "way"), BUILDS)
def test_equals_a_model_built_plainly(cls: type[nn.Module], dtype: Any, way: str) -> None:
    assert run_ranks(built_equal, 3, cls, dtype, way) == [[], [], []]


def leave_no_trace() -> None:
    before = (nn.Linear.__init__, nn.Module.apply, nn.Module.__dict__.get("__init_subclass__"))
    with contextlib.suppress(KeyError), Init():
        assert nn.Linear.__init__ is not before[0]
        raise KeyError
    assert (nn.Linear.__init__, nn.Module.apply, nn.Module.__dict__.get("__init_subclass__")) == before
    with Init(enabled=False):
        assert nn.Linear(3, 3).weight.shape == (3, 3)
    with Init():

        class Late(nn.Linear):
            def __init__(self) -> None:
                super().__init__(5, 3)
                self.own = nn.Parameter(torch.ones(7))

        late = Late()
        meta = nn.Linear(4, 4, device="meta")
    assert is_sharded(late)
    assert meta.weight.shape == (4, 4)
    late.weight._is_hf_initialized = True  # clients mark parameters
    assert late.state_dict(keep_vars=True)["weight"] is late.weight


def test_the_context_patches_and_restores() -> None:
    run_ranks(leave_no_trace, 2)


def live_numel(model: nn.Module) -> int:
    return sum(p.untyped_storage().nbytes() // 4 + p.ds_tensor.numel() for p in model.parameters())


class Spy(nn.Module):
    """Notes how many parameter elements of the model under construction are live whenever a layer is built."""

    peak = 0
    parts: list[nn.Module] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        for _ in range(6):
            layer = nn.Linear(32, 32, bias=False)
            type(self).parts.append(layer)
            type(self).peak = max(type(self).peak, sum(live_numel(m) for m in type(self).parts))


def memory_of_init() -> tuple[int, int]:
    Spy.peak, Spy.parts = 0, []
    with Init():
        model = Spy()
        for index, part in enumerate(Spy.parts):
            setattr(model, f"part{index}", part)
    return Spy.peak, live_numel(model)


def test_memory_law_of_init() -> None:
    """Between constructors nothing but the own shards is live."""
    for peak, end in run_ranks(memory_of_init, 2):
        assert peak == end == 6 * 32 * 32 // 2


def contract() -> None:
    rank = ds_comm.get_rank()
    ledger = ds_comm.communicator().ledger
    with Init():
        old = nn.Embedding(7, 3)
        layer = nn.Linear(5, 3)
    new = nn.Embedding(9, 3)
    # full values inside, on every rank; attributes of clients
    with GatheredParameters([old.weight, new.weight, torch.ones(2), old.weight], modifier_rank=0):
        assert old.weight.shape == old.weight.size() == (7, 3)
        assert old.weight.ds_status is ZeroParamStatus.AVAILABLE
        if rank == 0:
            old.weight.data[:2] = 5.0
            new.weight.data[:7] = old.weight.data
    assert old.weight.shape == (0,)
    assert old.weight.partition_numel() == -(-21 // ds_comm.get_world_size())
    assert old.weight.aligned_size() - old.weight.padding_size() == 21
    assert {"id", "status", "numel", "shape"} == set(old.weight.ds_summary())
    with GatheredParameters(old.weight):
        assert bool((old.weight[:2] == 5.0).all())
    # no-ops
    before = ledger.wire_elements
    with GatheredParameters([]), GatheredParameters([new.weight, torch.ones(1)], modifier_rank=0):
        pass
    with GatheredParameters(list(layer.parameters()), enabled=False):
        assert layer.weight.numel() == 0
    assert ledger.wire_elements == before
    # nested over the same parameters: no collective, so one rank may do it alone
    with GatheredParameters(list(layer.parameters()), modifier_rank=0):
        inside = ledger.wire_elements
        if rank == 0:
            with GatheredParameters(layer.weight, modifier_rank=0):
                nn.init.constant_(layer.weight, 2.0)
            assert layer.weight.shape == (3, 5)
            layer._load_from_state_dict({"bias": torch.full((3,), 4.0)}, "", {}, True, ["weight"], [], [])
        assert ledger.wire_elements == inside
    values = z.values_of(layer)
    assert bool((values["weight"] == 2.0).all())
    assert bool((values["bias"] == 4.0).all())
    # another rank's values; replaced on the module; exceptions
    captured = layer.weight
    with GatheredParameters(layer.parameters(), modifier_rank=1):
        if rank == 1:
            captured.data.fill_(7.0)
        layer.weight = nn.Parameter(torch.zeros(2, 2))
    with GatheredParameters(captured):
        assert bool((captured == 7.0).all())
    with contextlib.suppress(KeyError), GatheredParameters(captured, modifier_rank=0):
        captured.data.fill_(9.0)
        raise KeyError
    with GatheredParameters(captured):
        assert bool((captured == 7.0).all())
    # what would be lost is refused
    with (
        pytest.raises(ds_zero.ZeroStateError, match="modifier_rank is None"),
        torch.no_grad(),
        GatheredParameters(captured),
    ):
        captured.add_(1.0)
    with pytest.raises(ds_zero.ZeroStateError, match="keep its shape"), GatheredParameters(captured, modifier_rank=0):
        captured.data = torch.zeros(4)
    assert captured.ds_status is ZeroParamStatus.NOT_AVAILABLE
    for write in (
        lambda: captured.data.normal_(),
        lambda: captured.detach().zero_(),
        lambda: captured.fill_(1.0),
        lambda: nn.init.ones_(captured),
        lambda: captured.__iadd__(1.0),
    ):
        with pytest.raises(ds_zero.ZeroStateError, match="GatheredParameters"), torch.no_grad():
            write()
    captured.all_gather()
    assert captured.shape == (3, 5)
    captured.data.fill_(1.5)
    captured.partition(has_been_updated=True)
    with GatheredParameters(captured):
        assert bool((captured == 1.5).all())


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_gathered_parameters_contract(transport: Any) -> None:
    run_ranks(contract, 2, transport=transport)


def gathered_in_a_sharded_model(stage: int) -> None:
    model, zero = ds_zero.shard(
        m := z.build("Tied"), z.OPTIMIZERS["adamw"](m.parameters()), config=z.zero_config(stage)
    )
    zero.backward(model(z.batch(0)))
    zero.step()
    before = z.values_of(model)
    with GatheredParameters(list(model.parameters()), modifier_rank=0):
        assert all(p.shape == before[n].shape for n, p in model.named_parameters())
        with torch.no_grad():
            loss = model(z.batch(1))  # a forward inside
    zero.backward(model(z.batch(1)))
    with GatheredParameters(list(model.parameters())):  # between backward and step
        pass
    assert torch.isfinite(loss)
    zero.step()
    after = z.values_of(model)
    assert any(not torch.equal(before[n], after[n]) for n in before)
    if stage == 3:
        with pytest.raises(ds_zero.ZeroStateError):
            model.head.weight.data.zero_()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_gathered_parameters_of_a_sharded_model(stage: int) -> None:
    run_ranks(gathered_in_a_sharded_model, 2, stage)


def init_and_train(stage: int, dtype: str | None) -> list[str]:
    config = z.zero_config(stage, dtype=dtype)
    with Init(config=config):
        torch.manual_seed(0)
        model = Initialised()
    torch.manual_seed(0)
    plain = Initialised()
    if dtype:
        plain.to(torch.bfloat16)
        plain.load_state_dict(z.values_of(model))
    results = []
    for m in (model, plain):
        m, zero = ds_zero.shard(m, z.OPTIMIZERS["adagrad"](m.parameters()), config=config)
        for step in range(2):
            zero.backward(m(z.batch(step)))
            zero.step()
        results.append(z.values_of(m))
    return [n for n in results[0] if not torch.equal(results[0][n], results[1][n])]


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (2, None), (3, "bf16")])
def test_training_after_init_equals_training_a_plain_model(stage: int, dtype: str | None) -> None:
    assert run_ranks(init_and_train, 2, stage, dtype) == [[], []]


def bad_arguments() -> None:
    with pytest.raises(ds_zero.LayoutError, match=r"torch\.int64"):
        Init(dtype=torch.int64)
    with pytest.raises(RuntimeError, match="Tensor"):
        ds_zero.register_external_parameter(nn.Linear(2, 2), torch.ones(2))
    layer = nn.Linear(2, 2)
    ds_zero.register_external_parameter(layer, layer.weight)
    ds_zero.unregister_external_parameter(layer, layer.weight)


def test_bad_arguments() -> None:
    run_ranks(bad_arguments, 1)


def fail_inside_constructor() -> None:
    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            raise ValueError("constructor")

    with Init(), pytest.raises(ValueError, match="constructor"):
        Bad()
    with Init():
        assert is_sharded(nn.Linear(2, 2))


def test_a_constructor_that_raises() -> None:
    run_ranks(fail_inside_constructor, 2)
