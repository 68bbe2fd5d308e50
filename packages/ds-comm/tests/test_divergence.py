"""Ranks that part ways: every rank raises the same text, at once, naming who did what."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

import ds_comm
from ds_comm.testing import run_ranks

TRANSPORTS = ["shm", "gloo"]


def caught(act: Callable[[], object]) -> str:
    """The text of the communication error that ``act`` ends in."""
    try:
        act()
    except ds_comm.CommError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def extra_collective() -> str:
    def act() -> None:
        rank = ds_comm.get_rank()
        ds_comm.barrier(label="start")
        if rank == 1:
            ds_comm.all_gather_into_tensor(torch.empty(8), torch.ones(8 // ds_comm.get_world_size()), label="layers.7")
        ds_comm.reduce_scatter_tensor(torch.empty(2), torch.ones(2 * ds_comm.get_world_size()), label="layers.9")
        ds_comm.barrier(label="end")

    return caught(act)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_extra_collective(transport: str) -> None:
    texts = run_ranks(extra_collective, 2, transport=transport)
    assert len(set(texts)) == 1
    assert texts[0].startswith("DivergenceError")
    assert "rank 0: reduce_scatter layers.9 [4 x float32]; rank 1: all_gather layers.7 [8 x float32]" in texts[0]
    assert "last call they agreed on: barrier start" in texts[0]


def skipped_layer() -> str:
    def act() -> None:
        comm = ds_comm.communicator()
        windows = [comm.reduce_window(4 * comm.size, torch.bfloat16, label=f"layers.{i}") for i in range(3)]
        for i, window in enumerate(windows):
            if not (comm.rank == 1 and i == 1):
                window.reduce_scatter(torch.empty(4)).wait()
        comm.barrier()

    return caught(act)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_skipped_layer(transport: str, world_size: int) -> None:
    texts = run_ranks(skipped_layer, world_size, transport=transport)
    for text in texts:
        assert text.startswith("DivergenceError")
        # of three ranks the first two to come may already disagree: the third is then told of with its last call
        assert "reduce_scatter layers.1" in text and "rank 1: reduce_scatter layers.2" in text


def another_size() -> str:
    return caught(lambda: ds_comm.all_reduce(torch.ones(3 + ds_comm.get_rank()), label="norm"))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_another_size(transport: str) -> None:
    texts = run_ranks(another_size, 2, transport=transport)
    assert len(set(texts)) == 1
    assert "rank 0: all_reduce norm [3 x float32]; rank 1: all_reduce norm [4 x float32]" in texts[0]


def gathers_in_another_order() -> str:
    def act() -> None:
        comm = ds_comm.communicator()
        windows = [comm.gather_window(4 * comm.size, torch.bfloat16, label=f"layers.{i}") for i in range(2)]
        for window in windows if comm.rank == 0 else windows[::-1]:
            window.gather()
        comm.barrier()

    return caught(act)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_gathers_in_another_order(transport: str) -> None:
    """On shared memory a gather waits for nobody: the next meeting finds it."""
    texts = run_ranks(gathers_in_another_order, 2, transport=transport)
    for text in texts:
        assert text.startswith("DivergenceError")
        assert "rank 0: all_gather layers.0" in text and "rank 1: all_gather layers.1" in text


def more_gathers_than_the_ring_holds() -> str:
    comm = ds_comm.communicator()
    window = comm.gather_window(comm.size, torch.float32, label="w")
    if comm.rank == 1:
        time.sleep(0.3)
    for _ in range(2000):
        window.gather()
        window.release()
    comm.barrier()

    def act() -> None:
        for turn in range(2000):
            if not (comm.rank == 1 and turn == 1000):
                comm.ledger.add("counted only", None, 0, None)
                comm.gather_window(comm.size, torch.float32, label="one") if turn == 1000 else window.gather()
            window.release()
        comm.barrier()

    return caught(act)


def test_more_stamps_than_the_ring_holds() -> None:
    for text in run_ranks(more_gathers_than_the_ring_holds, 2, transport="shm"):
        assert "rank 0: gather_window one" in text and "rank 1: all_gather w" in text


def stays_away(seconds: float) -> tuple[str, float]:
    ds_comm.barrier()
    ds_comm.set_watchdog(seconds)
    start = time.monotonic()

    def act() -> None:
        if ds_comm.get_rank() == 1:
            time.sleep(3 * seconds)
        ds_comm.all_reduce(torch.ones(2), label="norm")

    return caught(act), time.monotonic() - start


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_silent_rank(transport: str) -> None:
    results = run_ranks(stays_away, 3, 2.0, transport=transport)
    texts = [text for text, _ in results]
    assert len(set(texts)) == 1
    assert texts[0].startswith("RankMissingError: all_reduce norm [2 x float32]: rank 1 did not come within 2 s")
    assert "rank 1: last called barrier" in texts[0] and "rank 2: last called all_reduce norm" in texts[0]


def uses_the_group_again() -> list[str]:
    first = caught(lambda: ds_comm.all_reduce(torch.ones(1 + ds_comm.get_rank())))
    comm = ds_comm.communicator()
    return [first, caught(comm.barrier), caught(lambda: comm.gather_window(2, torch.float32, label="w"))]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_failed_group_stays_failed(transport: str) -> None:
    for texts in run_ranks(uses_the_group_again, 2, transport=transport):
        assert len(set(texts)) == 1 and texts[0].startswith("DivergenceError")


def one_rank_never_uses_the_subgroup() -> str:
    group = ds_comm.new_group([0, 1])
    ds_comm.set_watchdog(1.0)
    if ds_comm.get_rank() == 0:
        return caught(lambda: ds_comm.all_reduce(torch.ones(1), group=group))
    time.sleep(1.5)
    return ""


def test_a_group_that_one_rank_never_uses() -> None:
    text = run_ranks(one_rank_never_uses_the_subgroup, 2)[0]
    assert text.startswith("RankMissingError") and "rank 1 did not come" in text
