"""Gather and reduce windows on every transport: the same bits everywhere, whatever the timing."""

from __future__ import annotations

import random
import time

import pytest
import torch
from torch import Tensor

import ds_comm
from ds_comm.testing import fake_world, run_ranks

TRANSPORTS = ["shm", "gloo"]


def contribution(rank: int, turn: int, numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * turn + rank)
    return torch.randn(numel, generator=generator).to(dtype)


def ordered_sum(size: int, turn: int, numel: int, dtype: torch.dtype) -> Tensor:
    total = contribution(0, turn, numel, dtype).to(torch.float32)
    for rank in range(1, size):
        total = total + contribution(rank, turn, numel, dtype).to(torch.float32)
    return total


def reduce_in_all_ways(dtype: torch.dtype, numel: int, bucket: int | None) -> str:
    comm = ds_comm.communicator()
    rank, size = comm.rank, comm.size
    window = comm.reduce_window(numel, dtype, label="grads")
    own = slice(rank * numel // size, (rank + 1) * numel // size)

    def fill(turn: int) -> None:
        window.wait_reusable()
        window.local.copy_(contribution(rank, turn, numel, dtype))

    shard = torch.empty(numel // size)
    fill(0)
    window.reduce_scatter(shard, bucket_numel=bucket).wait()
    assert torch.equal(shard, ordered_sum(size, 0, numel, dtype)[own])

    fill(1)
    work = window.reduce_scatter(shard, accumulate=True, scale=0.3, bucket_numel=bucket, label="again")
    work.wait()
    work.wait()
    assert work.is_completed()
    scaled = ordered_sum(size, 1, numel, dtype) * torch.tensor(0.3)
    assert torch.equal(shard, ordered_sum(size, 0, numel, dtype)[own] + scaled[own])

    fill(2)
    rounded = torch.empty(numel // size, dtype=dtype)
    window.reduce_scatter(rounded, bucket_numel=bucket).wait()
    assert torch.equal(rounded, ordered_sum(size, 2, numel, dtype).to(dtype)[own])

    whole = torch.ones(numel)
    fill(3)
    window.all_reduce(whole, accumulate=True, bucket_numel=bucket).wait()
    assert torch.equal(whole, 1 + ordered_sum(size, 3, numel, dtype))

    whole = torch.empty(numel, dtype=dtype)
    fill(4)
    window.all_reduce(whole, scale=0.5, bucket_numel=bucket).wait()
    assert torch.equal(whole, (ordered_sum(size, 4, numel, dtype) * 0.5).to(dtype))
    window.wait_reusable()
    window.close()
    return comm.kind


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reductions_are_the_ordered_fp32_sum(transport: str, world_size: int, dtype: torch.dtype) -> None:
    kinds = run_ranks(reduce_in_all_ways, world_size, dtype, 12 * 1009, None, transport=transport)
    assert kinds == ["local" if world_size == 1 else transport] * world_size


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("bucket", [5, 4096, 10**9])
def test_buckets_do_not_change_the_bits(transport: str, bucket: int) -> None:
    run_ranks(reduce_in_all_ways, 2, torch.bfloat16, 2 * 513, bucket, transport=transport)


def without_numba() -> str:
    from ds_comm import kernels

    kernels._numba.cache_clear()
    try:
        assert kernels.backend() == "torch"
        return reduce_in_all_ways(torch.bfloat16, 2 * 1009, None)
    finally:
        kernels._numba.cache_clear()


def test_without_numba() -> None:
    run_ranks(without_numba, 2, env={"DS_COMM_KERNELS": "torch"})


def gather_and_release(dtype: torch.dtype, shard_numel: int) -> None:
    comm = ds_comm.communicator()
    window = comm.gather_window(shard_numel * comm.size, dtype, label="params")
    storage = window.full.untyped_storage()
    assert window.shard.shape == (shard_numel,)
    for turn in range(3):
        window.shard.copy_(contribution(comm.rank, turn, shard_numel, dtype))
        window.publish()
        expected = torch.cat([contribution(r, turn, shard_numel, dtype) for r in range(comm.size)])
        work = window.gather(async_op=True)
        assert work is not None
        work.wait()
        assert torch.equal(window.full, expected)
        window.release()
        assert torch.equal(window.shard, contribution(comm.rank, turn, shard_numel, dtype))
        window.release()
        window.gather()
        window.gather()
        assert torch.equal(window.full, expected)
        comm.barrier()
    assert window.full.untyped_storage()._cdata == storage._cdata
    assert comm.ledger.counts[("all_gather", "params")] == 6
    assert comm.ledger.wire_elements_of("all_gather") == 6 * shard_numel * (comm.size - 1)
    kept = window.full
    window.close()
    assert window.full.numel() == 0 and kept.numel() == shard_numel * comm.size
    with pytest.raises(ValueError, match="closed"):
        window.gather()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "shard_numel"), [(torch.bfloat16, 5), (torch.float32, 5000), (torch.int64, 1)])
def test_gather(transport: str, world_size: int, dtype: torch.dtype, shard_numel: int) -> None:
    run_ranks(gather_and_release, world_size, dtype, shard_numel, transport=transport)


def change_of_mind_while_gathering() -> None:
    comm = ds_comm.communicator()
    window = comm.gather_window(1000 * comm.size, torch.float32, label="params")
    window.shard.fill_(comm.rank + 1.0)
    window.publish()
    expected = torch.arange(1.0, comm.size + 1).repeat_interleave(1000)
    if comm.rank == 1:
        time.sleep(0.3)  # the others' gather is under way for as long
    early = window.gather(async_op=True)
    assert window.gather(async_op=True) is early
    window.gather()
    assert torch.equal(window.full, expected)
    window.release()
    if comm.rank == 1:
        time.sleep(0.3)
    window.gather(async_op=True)
    window.release()
    window.gather()
    assert torch.equal(window.full, expected)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_gather_under_way_is_neither_trusted_nor_pulled_away(transport: str) -> None:
    run_ranks(change_of_mind_while_gathering, 2, transport=transport)


def saved_views_survive_release() -> None:
    comm = ds_comm.communicator()
    window = comm.gather_window(8 * comm.size, torch.float32, label="weights")
    window.shard.fill_(comm.rank + 1.0)
    window.publish()
    window.gather()
    weight = window.full[: 4 * comm.size].view(4, comm.size).requires_grad_()
    inputs = torch.ones(2, 4, requires_grad=True)
    loss = (inputs @ weight).sum()
    expected = weight.detach().sum(1).expand(2, 4).clone()
    window.release()
    window.gather()
    loss.backward()
    assert torch.equal(inputs.grad, expected)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_autograd_may_keep_views_of_a_released_window(transport: str) -> None:
    run_ranks(saved_views_survive_release, 2, transport=transport)


def many_reductions_at_random_times(turns: int) -> None:
    comm = ds_comm.communicator()
    rank, size, numel = comm.rank, comm.size, 12 * 64
    dice = random.Random(rank)
    windows = [comm.reduce_window(numel, torch.bfloat16, label=f"w{i}") for i in range(3)]
    params = comm.gather_window(numel, torch.float32, label="p")
    own = slice(rank * numel // size, (rank + 1) * numel // size)
    outs = [torch.empty(numel // size) for _ in windows]

    def pause() -> None:
        if dice.random() < 0.3:
            time.sleep(dice.random() * 2e-3)

    for turn in range(turns):
        works = []
        for i, window in enumerate(windows):
            pause()
            window.wait_reusable()
            window.local.copy_(contribution(rank, turn * 10 + i, numel, torch.bfloat16))
            works.append(window.reduce_scatter(outs[i]))
        for i, work in enumerate(works):
            pause()
            while dice.random() < 0.5 and not work.is_completed():
                pause()
            work.wait()
            windows[i].wait_reusable()
            windows[i].local.fill_(float("nan"))  # a peer that still reads would see it
            assert torch.equal(outs[i], ordered_sum(size, turn * 10 + i, numel, torch.bfloat16)[own])
        params.shard.fill_(turn * 10 + rank)
        pause()
        params.publish()
        params.gather()
        pause()
        firsts = params.full.view(size, -1)[:, 0].tolist()
        assert firsts == [turn * 10 + r for r in range(size)]
        params.release()
        total = torch.tensor([float(rank + turn)])
        comm.all_reduce(total)
        assert total.item() == sum(r + turn for r in range(size))


@pytest.mark.parametrize(("transport", "world_size", "turns"), [("shm", 2, 150), ("shm", 4, 50), ("gloo", 2, 20)])
def test_reuse_races(transport: str, world_size: int, turns: int) -> None:
    run_ranks(many_reductions_at_random_times, world_size, turns, transport=transport)


def wrong_arguments() -> None:
    comm = ds_comm.communicator()
    window = comm.reduce_window(8, torch.bfloat16, label="w")
    with pytest.raises(ValueError, match=r"out is \(3,\).*expected contiguous \[4\]"):
        window.reduce_scatter(torch.empty(3))
    with pytest.raises(ValueError, match=r"out has torch.bfloat16; expected torch.float32 to accumulate"):
        window.reduce_scatter(torch.empty(4, dtype=torch.bfloat16), accumulate=True)
    with pytest.raises(ValueError, match="bucket_numel=0"):
        window.reduce_scatter(torch.empty(4), bucket_numel=0)
    with pytest.raises(ValueError, match="9 elements do not split over 2 ranks"):
        comm.gather_window(9, torch.bfloat16, label="odd")
    work = window.reduce_scatter(torch.empty(4))
    with pytest.raises(ValueError, match="not waited for"):
        window.reduce_scatter(torch.empty(4))
    work.wait()
    comm.barrier()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_wrong_arguments(transport: str) -> None:
    run_ranks(wrong_arguments, 2, transport=transport)


@pytest.mark.parametrize("world_size", [1, 3, 64, 1024])
def test_windows_in_a_fake_world_obey_the_wire_law(world_size: int) -> None:
    with fake_world(rank=world_size - 1, world_size=world_size):
        comm = ds_comm.communicator()
        numel = 1000 * world_size
        assert comm.kind == ("torch" if world_size > 1 else comm.kind)
        params = comm.gather_window(numel, torch.bfloat16, label="unit")
        grads = comm.reduce_window(numel, torch.bfloat16, label="unit")
        params.publish()
        params.gather()
        assert params.full.shape == (numel,) and params.shard.shape == (1000,)
        params.release()
        params.gather()
        out = torch.zeros(1000)
        grads.reduce_scatter(out, accumulate=True).wait()
        grads.wait_reusable()
        grads.all_reduce(torch.zeros(numel)).wait()
        assert comm.ledger.wire_elements_of("all_gather") == 2 * 1000 * (world_size - 1)
        assert comm.ledger.wire_elements_of("reduce_scatter") == 1000 * (world_size - 1)
        assert comm.ledger.wire_elements_of("all_reduce") == 2 * 1000 * (world_size - 1)
