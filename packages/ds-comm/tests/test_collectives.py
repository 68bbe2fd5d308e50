"""The facade against what torch.distributed documents, on shm, gloo-by-all_to_all, torch's own, and one rank."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import ds_comm
from ds_comm.testing import fake_world, run_ranks

TRANSPORTS = ["shm", "gloo", "torch"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8]


def value(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.rand(numel, generator=generator) * 8 + 1).to(dtype)


def reductions(numel: int) -> None:
    rank, size = ds_comm.get_rank(), ds_comm.get_world_size()
    exact = ds_comm.communicator().kind != "torch"
    for dtype in DTYPES:
        values = [value(r, numel, dtype) for r in range(size)]
        wide = [v.to(torch.float32) if dtype.itemsize == 2 else v for v in values]
        total, product = wide[0], wide[0]
        for v in wide[1:]:
            total, product = total + v, product * v
        cases = [(ds_comm.ReduceOp.SUM, total), (ds_comm.ReduceOp.MAX, torch.stack(wide).amax(0))]
        cases += [(ds_comm.ReduceOp.MIN, torch.stack(wide).amin(0)), (ds_comm.ReduceOp.PRODUCT, product)]
        if exact and dtype.is_floating_point:
            cases.append((ds_comm.ReduceOp.AVG, total / size))
        for op, expected in cases:
            tensor = values[rank].clone()
            assert ds_comm.all_reduce(tensor, op, label="x") is None
            if exact:
                assert torch.equal(tensor, expected.to(dtype)), (dtype, op)
            else:
                torch.testing.assert_close(tensor, expected.to(dtype), rtol=2e-2, atol=1e-2)
        if exact:
            table = torch.stack([value(rank * 10 + r, numel, dtype) for r in range(size)])
            out = torch.empty(numel, dtype=dtype)
            work = ds_comm.reduce_scatter_tensor(out, table, async_op=True)
            work.wait()
            expected = value(rank, numel, dtype).to(wide[0].dtype)
            for r in range(1, size):
                expected = expected + value(r * 10 + rank, numel, dtype).to(wide[0].dtype)
            assert torch.equal(out, expected.to(dtype))
            out.zero_()
            ds_comm.reduce_scatter(out, list(table))
            assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("world_size", "numel"), [(1, 7), (2, 1), (2, 40_001), (3, 1001)])
def test_reductions(transport: str, world_size: int, numel: int) -> None:
    run_ranks(reductions, world_size, numel, transport=transport)


def copies() -> None:
    rank, size = ds_comm.get_rank(), ds_comm.get_world_size()
    for dtype in [*DTYPES, torch.bool, torch.complex64]:
        mine = (torch.arange(6) + 10 * rank).to(dtype)
        everyone = torch.stack([(torch.arange(6) + 10 * r).to(dtype) for r in range(size)])

        tensor = mine.clone()
        ds_comm.broadcast(tensor, size - 1)
        assert torch.equal(tensor, everyone[size - 1])

        out = torch.empty(size, 6, dtype=dtype)
        ds_comm.all_gather_into_tensor(out, mine)
        assert torch.equal(out, everyone)

        parts = [torch.empty(2, 3, dtype=dtype) for _ in range(size)]
        work = ds_comm.all_gather(parts, mine.view(2, 3), async_op=True)
        work.wait()
        assert work.is_completed() and torch.equal(torch.stack(parts).view(size, 6), everyone)

        gathered = [torch.empty(6, dtype=dtype) for _ in range(size)] if rank == 0 else None
        ds_comm.gather(mine, gathered, 0)
        assert gathered is None or torch.equal(torch.stack(gathered), everyone)

        piece = torch.empty(6, dtype=dtype)
        ds_comm.scatter(piece, list(everyone) if rank == 0 else None, 0)
        assert torch.equal(piece, mine)


@pytest.mark.parametrize("transport", ["shm", "gloo"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_copies_of_any_dtype(transport: str, world_size: int) -> None:
    run_ranks(copies, world_size, transport=transport)


def all_to_alls() -> None:
    rank, size = ds_comm.get_rank(), ds_comm.get_world_size()
    inp = torch.arange(2 * size * 3, dtype=torch.bfloat16).view(2 * size, 3) + 100 * rank
    out = torch.empty_like(inp)
    ds_comm.all_to_all_single(out, inp)
    expected = [torch.arange(2 * size * 3).view(size, 2, 3)[rank] + 100 * r for r in range(size)]
    assert torch.equal(out, torch.cat(expected).to(torch.bfloat16))

    # rank r sends r + s rows to rank s: some parts are empty
    in_splits = [rank + s for s in range(size)]
    out_splits = [r + rank for r in range(size)]
    inp = torch.full((sum(in_splits), 2), float(rank))
    out = torch.empty(sum(out_splits), 2)
    ds_comm.all_to_all_single(out, inp, out_splits, in_splits)
    assert out[:, 0].tolist() == [float(r) for r in range(size) for _ in range(r + rank)]

    outs = [torch.empty(r + rank + 1) for r in range(size)]
    ds_comm.all_to_all(outs, [torch.full((rank + s + 1,), 10.0 * rank + s) for s in range(size)])
    assert [o.tolist() for o in outs] == [[10.0 * r + rank] * (r + rank + 1) for r in range(size)]


@pytest.mark.parametrize("transport", ["shm", "gloo"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_to_all(transport: str, world_size: int) -> None:
    run_ranks(all_to_alls, world_size, transport=transport)


def larger_than_the_scratch() -> None:
    rank, size = ds_comm.get_rank(), ds_comm.get_world_size()
    numel = 3_000_001
    tensor = torch.arange(numel, dtype=torch.float32) + rank
    ds_comm.all_reduce(tensor)
    assert torch.equal(tensor, torch.arange(numel, dtype=torch.float32) * size + sum(range(size)))
    tensor = torch.full((numel,), float(rank))
    ds_comm.broadcast(tensor, 1)
    assert bool((tensor == 1).all())
    out = torch.empty(size, numel)
    ds_comm.all_gather_into_tensor(out, torch.full((numel,), float(rank)))
    assert all(bool((out[r] == r).all()) for r in range(size))
    inp = torch.arange(size, dtype=torch.float32).repeat_interleave(numel) + rank
    part = torch.empty(numel)
    ds_comm.reduce_scatter_tensor(part, inp)
    assert bool((part == rank * size + sum(range(size))).all())
    swapped = torch.empty_like(inp)
    ds_comm.all_to_all_single(swapped, inp)
    assert all(bool((swapped.view(size, numel)[r] == rank + r).all()) for r in range(size))


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_large_messages(transport: str) -> None:
    run_ranks(larger_than_the_scratch, 2, transport=transport)


def shapes_and_strides() -> None:
    rank = ds_comm.get_rank()
    base = torch.zeros(4, 6)
    base[:, ::2] = rank + 1.0
    ds_comm.all_reduce(base[:, ::2])
    assert torch.equal(base[:, ::2], torch.full((4, 3), 3.0)) and bool((base[:, 1::2] == 0).all())
    scalar = torch.tensor(rank + 1.0)
    ds_comm.all_reduce(scalar)
    assert scalar.item() == 3.0
    parameter = torch.nn.Parameter(torch.full((3,), rank + 1.0))
    ds_comm.broadcast(parameter, 0)
    assert parameter.tolist() == [1.0] * 3
    ds_comm.all_reduce(torch.empty(0))
    flags = torch.tensor([rank == 0, True])
    ds_comm.all_reduce(flags, ds_comm.ReduceOp.MIN)
    assert flags.tolist() == [False, True]
    with pytest.raises(ValueError, match="2 times the smaller"):
        ds_comm.all_gather_into_tensor(torch.empty(3), torch.empty(2))
    with pytest.raises(ValueError, match="one per rank, 2"):
        ds_comm.all_gather([torch.empty(2)], torch.empty(2))
    with pytest.raises(ValueError, match="rank 7 is not in the group"):
        ds_comm.broadcast(torch.empty(1), 7)
    ds_comm.barrier()


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_shapes_and_strides(transport: str) -> None:
    run_ranks(shapes_and_strides, 2, transport=transport)


def coalesced_and_reduce() -> None:
    rank, size = ds_comm.get_rank(), ds_comm.get_world_size()
    tensors = [torch.full((3,), rank + 1.0), torch.full((2, 2), 10.0 * rank)]
    ds_comm.all_reduce_coalesced(tensors)
    assert tensors[0].tolist() == [sum(range(1, size + 1))] * 3
    assert tensors[1].tolist() == [[10.0 * sum(range(size))] * 2] * 2
    outs = [torch.empty(size, dtype=torch.int32), torch.empty(2 * size)]
    ds_comm.all_gather_coalesced(outs, [torch.tensor([rank], dtype=torch.int32), torch.full((2,), float(rank))])
    assert outs[0].tolist() == list(range(size)) and outs[1][-1].item() == size - 1
    tensor = torch.full((2,), rank + 1.0)
    ds_comm.reduce(tensor, 1)
    assert tensor.tolist() == ([sum(range(1, size + 1))] * 2 if rank == 1 else [rank + 1.0] * 2)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_coalesced_and_reduce(transport: str) -> None:
    run_ranks(coalesced_and_reduce, 3, transport=transport)


def messages() -> None:
    rank, size = ds_comm.get_rank(), ds_comm.get_world_size()
    if rank == 0:
        ds_comm.send(torch.full((4,), 7.0), 1, label="hello")
    if rank == 1:
        box = torch.empty(4)
        assert ds_comm.recv(box, 0) == 0 and box.tolist() == [7.0] * 4
    box = torch.empty(2)
    works = [ds_comm.isend(torch.full((2,), float(rank)), (rank + 1) % size, tag=3)]
    works.append(ds_comm.irecv(box, (rank - 1) % size, tag=3))
    for work in works:
        work.wait()
    assert box.tolist() == [(rank - 1) % size] * 2
    ops = [ds_comm.P2POp(ds_comm.isend, torch.full((2,), float(rank)), (rank + 1) % size)]
    ops.append(ds_comm.P2POp(ds_comm.irecv, box, (rank - 1) % size))
    for work in ds_comm.batch_isend_irecv(ops):
        work.wait()
    assert box.tolist() == [(rank - 1) % size] * 2
    counts = ds_comm.communicator().ledger.counts
    assert counts[("send", "")] == 2 and counts.get(("send", "hello"), 0) == (rank == 0)


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_messages(transport: str) -> None:
    run_ranks(messages, 3, transport=transport)


def objects_and_barriers() -> None:
    rank, size = ds_comm.get_rank(), ds_comm.get_world_size()
    found: list[object] = [None] * size
    ds_comm.all_gather_object(found, {"rank": rank, "pad": "x" * 1000 * rank})
    assert [o["rank"] for o in found] == list(range(size))
    box = [rank, "a"] if rank == 1 else [None, None]
    ds_comm.broadcast_object_list(box, 1)
    assert box == [1, "a"]
    ds_comm.barrier(label="here")
    ds_comm.monitored_barrier(timeout=timedelta(seconds=20))
    comm = ds_comm.communicator()
    comm.agree("the same", label="plan")
    with pytest.raises(ds_comm.DivergenceError, match="plan and do not: rank 0: 'value 0'; rank 1: 'value 1'"):
        comm.agree(f"value {rank}", label="plan")


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_objects_barriers_agreement(transport: str) -> None:
    run_ranks(objects_and_barriers, 2, transport=transport)


def subgroups() -> None:
    rank = ds_comm.get_rank()
    evens, all_but_first = ds_comm.new_group([0, 2]), ds_comm.new_group([1, 2])
    alone = [ds_comm.new_group([r]) for r in range(3)]
    tensor = torch.tensor([float(rank)])
    for group, ranks in ((evens, [0, 2]), (all_but_first, [1, 2])):
        tensor.fill_(rank)
        ds_comm.all_reduce(tensor, group=group)
        assert tensor.item() == (sum(ranks) if rank in ranks else rank)
        ds_comm.broadcast(tensor.fill_(rank), ranks[1], group=group)
        assert tensor.item() == (ranks[1] if rank in ranks else rank)
        if rank in ranks:
            assert ds_comm.get_rank(group) == ranks.index(rank) and ds_comm.get_world_size(group) == 2
            assert ds_comm.get_global_rank(group, 1) == ranks[1]
            assert ds_comm.get_all_ranks_from_group(group) == ranks
            comm = ds_comm.communicator(group)
            window = comm.gather_window(4, torch.float32, label="sub")
            window.shard.fill_(rank)
            window.publish()
            window.gather()
            assert window.full.tolist() == [float(r) for r in ranks for _ in range(2)]
        else:
            assert ds_comm.get_rank(group) == -1
    assert ds_comm.communicator(alone[rank]).kind == "local"
    ds_comm.all_reduce(tensor.fill_(1.0))
    assert tensor.item() == 3.0
    if rank in (0, 2):
        ds_comm.destroy_process_group(evens)
    ds_comm.barrier()


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_subgroups(transport: str) -> None:
    run_ranks(subgroups, 3, transport=transport)


def timing_is_counted() -> None:
    comm = ds_comm.communicator()
    comm.all_reduce(torch.ones(10))
    assert comm.ledger.wait_seconds == 0.0
    comm.ledger.timing = True
    comm.all_reduce(torch.ones(10))
    assert comm.ledger.wait_seconds > 0.0


def test_timing_is_counted() -> None:
    run_ranks(timing_is_counted, 2)


def test_one_process_without_a_launcher() -> None:
    assert not ds_comm.is_initialized()
    ds_comm.init_distributed()
    try:
        ds_comm.init_distributed()
        assert ds_comm.is_initialized() and ds_comm.get_world_size() == 1 and ds_comm.get_rank() == 0
        tensor = torch.ones(3)
        ds_comm.all_reduce(tensor)
        assert tensor.tolist() == [1.0] * 3
        assert "local" in repr(ds_comm.communicator())
    finally:
        ds_comm.destroy_process_group()
    assert not ds_comm.is_initialized() and not dist.is_initialized()
    with pytest.raises(ds_comm.CommError, match="init_distributed"):
        ds_comm.communicator()


def test_adopts_a_group_that_exists() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert not ds_comm.is_initialized()
        world = dist.group.WORLD
        ds_comm.init_distributed()
        assert ds_comm.is_initialized() and ds_comm.get_world_group() is world
    finally:
        ds_comm.destroy_process_group()


def test_collectives_in_a_fake_world() -> None:
    with fake_world(rank=3, world_size=512):
        comm = ds_comm.communicator()
        ds_comm.all_reduce(torch.zeros(512), label="norm")
        ds_comm.all_gather_into_tensor(torch.empty(512 * 4), torch.zeros(4))
        ds_comm.barrier()
        comm.agree("x")
        assert comm.ledger.counts[("all_reduce", "norm")] == 1
        assert comm.ledger.wire_elements == 2 * 511 + 4 * 511


def test_groups_before_there_is_a_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (ds_comm.get_rank(), ds_comm.get_world_size(), ds_comm.get_local_rank()) == (3, 5, 1)
    with pytest.raises(ds_comm.CommError, match="new_group"):
        ds_comm.new_group([0])
