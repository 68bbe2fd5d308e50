"""Messages between two ranks: every dtype and size, order, early receives, any amount at once, and what goes wrong."""

from __future__ import annotations

import gc
import os
import signal
import time
from typing import Any

import pytest
import torch
from test_divergence import caught

import ds_comm
from ds_comm.testing import Died, RankFailure, run_ranks
from ds_comm.transport._messages import plan_capacity

TRANSPORTS = ["shm", "gloo"]
SMALL = {"DS_COMM_MESSAGE_LIMIT": str(256 << 10)}
DTYPES = [
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def numbers(numel: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    nbytes = torch.randint(0, 256 if dtype != torch.bool else 2, (numel * dtype.itemsize,), generator=generator)
    return nbytes.to(torch.uint8).view(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the bit: random bytes hold every NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def all_sizes(sizes: list[int]) -> None:
    for seed, numel in enumerate(sizes):
        if ds_comm.get_rank() == 0:
            ds_comm.send(numbers(numel, seed), 1)
        else:
            box = torch.empty(numel)
            assert ds_comm.recv(box, 0) == 0
            assert same(box, numbers(numel, seed)), numel


@pytest.mark.parametrize("env", [{}, SMALL], ids=["default", "small"])
def test_every_size(env: dict[str, str]) -> None:
    mebi = (1 << 20) // 4
    run_ranks(all_sizes, 2, [0, 1, 3, 15, 16, 1024, 1025, 16384, mebi - 1, mebi, mebi + 1, 5 * mebi + 7], env=env)


def all_dtypes() -> None:
    for seed, dtype in enumerate(DTYPES):
        sent = numbers(100, seed, dtype)
        if ds_comm.get_rank() == 0:
            ds_comm.isend(sent, 1, tag=seed).wait()
        else:
            box = torch.empty(100, dtype=dtype)
            ds_comm.irecv(box, 0, tag=seed).wait()
            assert same(box, sent), dtype


def test_every_dtype() -> None:
    run_ranks(all_dtypes, 2, transport="shm")


def shapes_and_strides() -> None:
    table = torch.arange(12.0).view(3, 4)
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    if ds_comm.get_rank() == 0:
        ds_comm.send(table.T, 1)
        ds_comm.send(table[:, 1:3], 1)
        ds_comm.send(torch.tensor(7.0), 1)
        ds_comm.send(torch.complex(table, table + 1).conj(), 1)
        ds_comm.send(torch.ones(2, 2, requires_grad=True) * 3, 1)
        return
    box = torch.empty(4, 3)
    ds_comm.recv(box, 0)
    assert torch.equal(box, table.T)
    wide = torch.zeros(3, 4)
    ds_comm.recv(wide[:, ::2], 0)
    assert torch.equal(wide, torch.stack([table[:, 1], torch.zeros(3), table[:, 2], torch.zeros(3)], 1))
    scalar = torch.zeros(())
    ds_comm.recv(scalar, 0)
    assert scalar.item() == 7
    values = torch.zeros(3, 4, dtype=torch.complex64)
    ds_comm.recv(values, 0)
    assert torch.equal(values, torch.complex(table, -table - 1))
    ds_comm.recv(parameter, 0)
    assert parameter.requires_grad and parameter.tolist() == [[3, 3], [3, 3]]


def test_shapes_and_strides() -> None:
    run_ranks(shapes_and_strides, 2, transport="shm")


def order_and_tags() -> None:
    """Sent interleaved; received tag by tag, the last tag first, some receives posted before anything is sent."""
    num = 40
    if ds_comm.get_rank() == 0:
        ds_comm.recv(torch.empty(1), 1, tag=99)
        works = [ds_comm.isend(torch.tensor([100.0 * tag + i]), 1, tag=tag) for i in range(num) for tag in range(3)]
        for work in works:
            work.wait()
        return
    early = [(torch.empty(1), i) for i in range(num)]
    posted = [ds_comm.irecv(box, 0, tag=1) for box, _ in early]
    assert not posted[0].is_completed()
    ds_comm.send(torch.ones(1), 0, tag=99)
    for tag in (2, 0):
        for i in range(num):
            box = torch.empty(1)
            ds_comm.irecv(box, 0, tag=tag).wait()
            assert box.item() == 100 * tag + i
    for work in reversed(posted):
        work.wait()
    assert [box.item() for box, _ in early] == [100 + i for _, i in early]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_order_and_tags(transport: str) -> None:
    run_ranks(order_and_tags, 2, transport=transport)


def both_send_first(numel: int) -> None:
    """No receive is posted anywhere when the sends start, and there is room for a fraction of them."""
    rank = ds_comm.get_rank()
    works = [ds_comm.isend(numbers(numel, 10 * rank + i), 1 - rank, tag=i) for i in range(3)]
    assert not works[2].is_completed()
    boxes = [torch.empty(numel) for _ in range(3)]
    for tag in (2, 1, 0):  # what is needed first was sent last: the others must move out of its way
        ds_comm.recv(boxes[tag], 1 - rank, tag=tag)
    for work in works:
        work.wait()
    for tag, box in enumerate(boxes):
        assert same(box, numbers(numel, 10 * (1 - rank) + tag))


def test_sends_beyond_the_limit_do_not_lock() -> None:
    run_ranks(both_send_first, 2, 1 << 20, env=SMALL)


def waits_elsewhere(numel: int) -> float:
    """Rank 0 waits in another group for rank 2, which waits for rank 1, which waits for the rest of rank 0's send."""
    rank = ds_comm.get_rank()
    groups = [ds_comm.new_group([0, 2]), ds_comm.new_group([1])]
    group = groups[rank % 2]
    ds_comm.barrier(group)
    box = torch.full((numel,), float(rank))
    if rank == 0:
        work = ds_comm.isend(box, 1)
        ds_comm.barrier(group)
        work.wait()
    elif rank == 1:
        ds_comm.recv(box, 0)
        ds_comm.send(box[:1], 2)
    else:
        ds_comm.recv(box[:1], 1)
        ds_comm.barrier(group)
    return box[0].item()


def test_a_send_beyond_the_limit_goes_on_in_any_wait() -> None:
    assert run_ranks(waits_elsewhere, 3, 1 << 20, env=SMALL, transport="shm", timeout=20) == [0.0, 0.0, 0.0]


def many_small(num: int) -> None:
    """More messages than there are records, none of them asked for before the last is sent."""
    if ds_comm.get_rank() == 0:
        works = [ds_comm.isend(torch.tensor([i]), 1, tag=5) for i in range(num)]
        ds_comm.isend(torch.tensor([-1]), 1, tag=6).wait()
        for work in works:
            work.wait()
        return
    box = torch.empty(1, dtype=torch.int64)
    ds_comm.recv(box, 0, tag=6)
    assert box.item() == -1
    for i in range(num):
        ds_comm.recv(box, 0, tag=5)
        assert box.item() == i


def test_more_messages_than_records() -> None:
    run_ranks(many_small, 2, 1000, transport="shm")


def sent_before_leaving() -> float:
    if ds_comm.get_rank() == 0:
        ds_comm.send(torch.full((1000,), 4.0), 1)
        ds_comm.communicator().close()
        return 0.0
    time.sleep(0.2)
    box = torch.empty(1000)
    ds_comm.recv(box, 0)
    return float(box.sum())


def test_what_was_sent_outlives_its_sender() -> None:
    assert run_ranks(sent_before_leaving, 2, transport="shm") == [0.0, 4000.0]


def whoever_comes_first() -> list[int]:
    rank = ds_comm.get_rank()
    box = torch.empty(3)
    if rank:
        ds_comm.send(torch.full((3,), float(rank)), 0, tag=4)
        return []
    found = []
    for _ in range(2):
        source = ds_comm.recv(box, tag=4)
        assert box.tolist() == [source] * 3
        found.append(source)
    return sorted(found)


def test_any_source() -> None:
    assert run_ranks(whoever_comes_first, 3, transport="shm")[0] == [1, 2]


def subgroup() -> None:
    world = ds_comm.get_world_group()
    group = ds_comm.new_group([1, 2])
    rank = ds_comm.get_rank()
    if rank == 1:
        ds_comm.send(torch.tensor([1.0]), 2, group=world)
        ds_comm.send(torch.tensor([2.0]), 2, group=group)
        ds_comm.send(torch.tensor([3.0]), group=group, group_dst=1)
    if rank == 2:
        box = torch.empty(1)
        for source, place, value in ((1, group, 2), (1, world, 1)):
            assert ds_comm.recv(box, source, group=place) == 1 and box.item() == value
        assert ds_comm.recv(box, group=group, group_src=0) == 1 and box.item() == 3


def test_groups_do_not_mix() -> None:
    run_ranks(subgroup, 3, transport="shm")


def packets(num: int, nbytes: int) -> tuple[int, int]:
    """Kept by the receiver, as autograd keeps activations, and given back in another order."""
    comm = ds_comm.communicator()
    if comm.rank == 0:
        channel = comm.channel(1, tag=1, label="activations")
        for i in range(num):
            packet = channel.packet(nbytes)
            packet.data.fill_(i)
            packet.send().wait()
        done = comm.channel(1, tag=2).receive(1)
        done.wait()
        return comm.ledger.counts["send", "activations"], 0
    channel = comm.channel(0, tag=1, label="activations")
    kept: list[torch.Tensor] = []
    shared = 0
    for i in range(num):
        receipt = channel.receive(nbytes)
        receipt.wait()
        assert int(receipt.data.min()) == int(receipt.data.max()) == i
        kept.append(receipt.data[1:])
        shared += in_shared_memory(receipt.data)
        del receipt
        if len(kept) == 8:
            for index in (5, 0, 2, 0):
                kept.pop(index)
        assert all(int(tensor[0]) == int(tensor[-1]) for tensor in kept)
    answer = comm.channel(0, tag=2).packet(1)
    answer.data.zero_()
    answer.send().wait()
    return comm.ledger.counts["recv", "activations"], shared


def in_shared_memory(tensor: torch.Tensor) -> bool:
    at = tensor.data_ptr()
    with open("/proc/self/maps", encoding="utf-8") as lines:
        for line in lines:
            span, _, rest = line.partition(" ")
            start, stop = (int(text, 16) for text in span.split("-"))
            if start <= at < stop:
                return rest[3] == "s"
    return False


@pytest.mark.parametrize("env", [{}, SMALL], ids=["default", "small"])
def test_packets_are_read_where_they_were_written(env: dict[str, str]) -> None:
    (sent, _), (received, shared) = run_ranks(packets, 2, 60, 30_000, env=env)
    assert sent == received == 60
    assert shared == 60 if not env else 4 <= shared < 60  # half of the limit is lent, the rest is copied


def test_packets_on_other_transports() -> None:
    (sent, _), (received, shared) = run_ranks(packets, 2, 20, 1000, transport="gloo")
    assert (sent, received, shared) == (20, 20, 0)


def kept_by_a_graph() -> list[float]:
    comm = ds_comm.communicator()
    if comm.rank == 0:
        channel = comm.channel(1)
        for i in range(8):
            packet = channel.packet(64)
            packet.data.view(torch.float32).fill_(i)
            packet.send().wait()
        comm.barrier()
        return []
    channel = comm.channel(0)
    losses, weights = [], []
    for _ in range(8):
        receipt = channel.receive(64)
        receipt.wait()
        weights.append(torch.ones(16, requires_grad=True))
        losses.append((receipt.data.view(torch.float32) * weights[-1]).sum())
        del receipt
        gc.collect()
    for loss in losses:
        loss.backward()
    comm.barrier()
    return [weight.grad[0].item() for weight in weights if weight.grad is not None]


def test_what_a_graph_has_saved_is_not_written_again() -> None:
    assert run_ranks(kept_by_a_graph, 2, transport="shm")[1] == [float(i) for i in range(8)]


def disagree(sent: Any, box: Any) -> tuple[str, str]:
    rank = ds_comm.get_rank()
    if rank == 0:
        first = caught(lambda: ds_comm.send(sent, 1, label="activations"))
        return first, caught(lambda: ds_comm.recv(torch.empty(1), 1))
    return caught(lambda: ds_comm.recv(box, 0, label="activations")), caught(ds_comm.barrier)


@pytest.mark.parametrize(
    ("sent", "box", "text"),
    [
        (torch.ones(6), torch.ones(8), "rank 0 sends 24 bytes of float32, rank 1 expects 32 bytes of float32"),
        (torch.ones(0), torch.ones(8), "rank 0 sends 0 bytes of float32"),
        (torch.ones(1 << 20), torch.ones(8), "rank 0 sends 4194304 bytes of float32"),
        (torch.ones(4), torch.ones(4, dtype=torch.int32), "rank 1 expects 16 bytes of int32"),
    ],
)
def test_ends_that_disagree(sent: torch.Tensor, box: torch.Tensor, text: str) -> None:
    (_, sender), receiver = run_ranks(disagree, 2, sent, box, transport="shm", timeout=30)
    for found in (sender, *receiver):
        assert found.startswith("DivergenceError: recv activations") and text in found
    run_ranks(all_sizes, 2, [3])  # the pool's next world is whole


def waits_for_the_dead(op: str) -> str:
    if ds_comm.get_rank() == 1:
        ds_comm.send(torch.ones(2), 0)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    box = torch.empty(2)
    ds_comm.recv(box, 1)
    if op == "send":
        return caught(lambda: ds_comm.send(torch.empty(1 << 20), 1, label="big"))
    if op == "any":
        return caught(lambda: ds_comm.recv(box, label="whoever"))
    return caught(lambda: ds_comm.recv(box, 1, label="more"))


@pytest.mark.parametrize(("op", "named"), [("send", "send big"), ("recv", "recv more"), ("any", "recv whoever")])
def test_a_peer_dies(op: str, named: str) -> None:
    text, died = run_ranks(waits_for_the_dead, 2, op, env=SMALL, transport="shm", expect_death=[1], timeout=30)
    assert died == Died(-signal.SIGKILL)
    assert text.startswith(f"RankMissingError: {named}") and "rank 1 has died" in text


def nobody_sends() -> str:
    ds_comm.set_watchdog(0.3)
    if ds_comm.get_rank() == 1:
        time.sleep(1.0)
        return caught(lambda: ds_comm.send(torch.ones(2), 0))
    return caught(lambda: ds_comm.recv(torch.empty(2), 1, label="late"))


def test_a_silent_rank_is_named() -> None:
    texts = run_ranks(nobody_sends, 2, transport="shm", timeout=30)
    for text in texts:
        assert text.startswith("RankMissingError: recv late") and "rank 1 did not come within 0.3 s" in text


def failed_elsewhere() -> str:
    comm = ds_comm.communicator()
    if comm.rank == 2:
        time.sleep(0.1)
        return caught(lambda: comm.transport.fail(ds_comm.CommError("the loss is not finite")))
    return caught(lambda: ds_comm.recv(torch.empty(2), 1 - comm.rank))


def test_a_failure_elsewhere_ends_the_wait() -> None:
    assert run_ranks(failed_elsewhere, 3, transport="shm", timeout=30) == ["CommError: the loss is not finite"] * 3


def one_rank_alone() -> None:
    with pytest.raises(ds_comm.CommArgumentError, match="group rank 3 does not exist in a group of 2"):
        ds_comm.communicator().channel(3)
    with pytest.raises((ValueError, RuntimeError)):
        ds_comm.isend(torch.ones(1), ds_comm.get_rank())


def test_arguments() -> None:
    run_ranks(one_rank_alone, 2, transport="shm")


def kind_and_messages() -> tuple[str, bool]:
    both_send_first_small()
    comm = ds_comm.communicator()
    return comm.kind, comm.transport.messages is not None


def both_send_first_small() -> None:
    rank = ds_comm.get_rank()
    work = ds_comm.isend(torch.tensor([float(rank)]), 1 - rank)
    box = torch.empty(1)
    ds_comm.recv(box, 1 - rank)
    work.wait()
    assert box.item() == 1 - rank


def test_too_little_shared_memory_for_messages() -> None:
    assert run_ranks(kind_and_messages, 2, env={"DS_COMM_SHM_LIMIT": "400000"}) == [("shm", False)] * 2
    assert run_ranks(kind_and_messages, 2, env={"DS_COMM_SHM_LIMIT": "2000000"}) == [("shm", True)] * 2


def use_and_die() -> None:
    rank = ds_comm.get_rank()
    works = [ds_comm.isend(torch.ones(1 << 20), 1 - rank) for _ in range(3)]
    ds_comm.recv(torch.empty(1 << 20), 1 - rank)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    del works
    time.sleep(0.1)


def test_nothing_is_left_in_shared_memory() -> None:
    before = set(os.listdir("/dev/shm"))
    run_ranks(use_and_die, 2, transport="shm", expect_death=[0])
    assert set(os.listdir("/dev/shm")) <= before


def memory_runs_out(reserved_before: int) -> tuple[str, str]:
    """After `reserved_before` reservations of pages there are no more: what there is must do, nothing is an error."""
    import ds_comm.transport._segment as module

    comm = ds_comm.communicator()
    if comm.rank == 1:
        box = torch.empty(1 << 20)
        return caught(lambda: ds_comm.recv(box, 0, label="big")), str(box.sum().item())
    real, calls = module._allocate, 0

    def limited(fd: int, start: int, stop: int) -> None:
        nonlocal calls
        calls += 1
        if calls > reserved_before:
            raise module.NoSpaceError(f"reserving {stop - start} bytes of shared memory: none left")
        real(fd, start, stop)

    module._allocate = limited
    try:
        return caught(lambda: ds_comm.send(torch.ones(1 << 20), 1, label="big")), ""
    finally:
        module._allocate = real


@pytest.mark.parametrize("reserved_before", [2, 3])
def test_memory_that_runs_out_is_made_do_with(reserved_before: int) -> None:
    texts = run_ranks(memory_runs_out, 2, reserved_before, transport="shm", timeout=30)
    assert texts == [("nothing raised", ""), ("nothing raised", str(float(1 << 20)))]


@pytest.mark.parametrize("reserved_before", [0, 1])
def test_no_memory_at_all_is_an_error_on_both_ends(reserved_before: int) -> None:
    for text, _ in run_ranks(memory_runs_out, 2, reserved_before, transport="shm", timeout=30):
        assert text.startswith("CommError: send big") and "none left" in text and "enlarge /dev/shm" in text


def one_is_kept(num: int) -> int:
    """A block that stays with the receiver for ever does not keep the others from their way."""
    comm = ds_comm.communicator()
    if comm.rank == 0:
        channel = comm.channel(1)
        for i in range(num):
            packet = channel.packet(8)
            packet.data.view(torch.int64).fill_(i)
            packet.send().wait()
        return num
    channel, kept, total = comm.channel(0), [], 0
    for i in range(num):
        receipt = channel.receive(8)
        receipt.wait()
        total += int(receipt.data.view(torch.int64)) == i
        if i % 50 == 7:
            kept.append((i, receipt.data))
    assert all(int(data.view(torch.int64)) == i for i, data in kept)
    return total


def test_a_block_that_is_kept_for_ever() -> None:
    assert run_ranks(one_is_kept, 2, 2000, transport="shm", timeout=30) == [2000, 2000]


@pytest.mark.parametrize("text", ["1000", "64MB"])
def test_a_limit_that_is_none(text: str) -> None:
    with pytest.raises(RankFailure) as info:
        run_ranks(kind_and_messages, 2, env={"DS_COMM_MESSAGE_LIMIT": text}, timeout=30)
    assert f"DS_COMM_MESSAGE_LIMIT='{text}': expected a number of bytes, at least 65536" in str(info.value)


def test_capacity_by_group_size() -> None:
    assert [plan_capacity(size, None, None) >> 20 for size in (2, 8, 16, 64, 256)] == [256, 256, 68, 4, 1]
    assert plan_capacity(2, 100_000, None) == 102_400
    assert plan_capacity(2, None, 400_000) == 0
