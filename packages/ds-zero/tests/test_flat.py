"""FlatMemory: separate tensors in one allocation, aligned; and that what stays is kept in few allocations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zero_helpers import Net

import ds_zero
from ds_comm.testing import run_ranks
from ds_zero._flat import FlatMemory, trim_heap
from ds_zero.layout import ALIGNMENT

CPU = torch.device("cpu")


def test_tensors_are_apart_and_aligned_in_one_allocation() -> None:
    sizes = [1, 33, 64, 7]
    memory = FlatMemory(sizes)
    tensors = [memory.take(numel, torch.float32, CPU).fill_(index) for index, numel in enumerate(sizes)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    for index, tensor in enumerate(tensors):
        assert tensor.storage_offset() % ALIGNMENT == 0
        assert tensor.eq(index).all()
        assert tensor._base is None
    version = tensors[1]._version
    tensors[0].add_(1)
    assert tensors[1]._version == version


def test_what_does_not_fit_gets_memory_of_its_own() -> None:
    memory = FlatMemory([32])
    first = memory.take(32, torch.bfloat16, CPU).zero_()
    more = memory.take(1, torch.bfloat16, CPU)
    assert more.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
    other = FlatMemory([32, 32])
    first = other.take(32, torch.bfloat16, CPU)
    wide = other.take(32, torch.float32, CPU)
    assert wide.dtype == torch.float32
    assert wide.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()


def _allocations(stage: int) -> tuple[int, int, int]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, zero = ds_zero.shard(model, optimizer, config={"stage": stage, "dtype": "bf16"})
    assert zero is not None
    zero.backward(model(torch.arange(12).view(3, 4) % 13))
    gradients = {unit.grad.untyped_storage().data_ptr() for unit in zero.sharded.trainable}
    zero.step()
    masters = {segment.parameter.untyped_storage().data_ptr() for segment in zero.inner.segments}
    moments = {v.untyped_storage().data_ptr() for s in zero.state.values() for v in s.values() if v.dim()}
    assert all(unit.grad is None for unit in zero.sharded.trainable)
    return len(masters), len(moments), len(gradients)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_masters_moments_and_gradients_are_one_allocation_each(stage: int) -> None:
    assert run_ranks(_allocations, 2, stage) == [(1, 2, 1)] * 2


def _heap_after_shard(stage: int) -> tuple[int, int]:
    """Growth of anonymous memory by `shard()` of a model of 20 M bf16 parameters, and what must stay of it."""
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(20))).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    trim_heap()
    before = _anonymous()
    model, zero = ds_zero.shard(model, optimizer, config={"stage": stage, "dtype": "bf16"})
    assert zero is not None
    kept = sum(unit.master.nbytes for unit in zero.sharded.trainable if unit.master is not None)
    parameters = 0 if stage == 3 else sum(unit.storage.full.nbytes for unit in zero.sharded.units)
    original = 20 * 1024 * 1024 * 2
    return _anonymous() - before, kept + parameters - original


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("stage", [2, 3])
def test_shard_leaves_no_second_copy_of_the_parameters(stage: int) -> None:
    for grown, kept in run_ranks(_heap_after_shard, 2, stage):
        assert grown < kept + 16 * 1024 * 1024  # a copy in 16 bits would be 40 MiB
