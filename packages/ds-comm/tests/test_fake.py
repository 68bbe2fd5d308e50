"""The fake world: a rank among thousands, in this process, leaving nothing behind."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

import ds_comm
from ds_comm.testing import fake_world

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (3, 4), (1023, 1024)])
def test_rank_and_size(rank: int, world_size: int) -> None:
    with fake_world(rank=rank, world_size=world_size):
        assert (ds_comm.get_rank(), ds_comm.get_world_size()) == (rank, world_size)
        assert (dist.get_rank(), dist.get_world_size()) == (rank, world_size)


def test_collectives_return_at_once() -> None:
    with fake_world(rank=7, world_size=1024):
        tensor = torch.full((4,), 7.0)
        dist.all_reduce(tensor)
        dist.barrier()
        assert tensor.tolist() == [7.0] * 4  # nothing moved: numbers are not what the fake world is for


def test_the_communicator_counts() -> None:
    with fake_world(rank=3, world_size=8):
        communicator = ds_comm.communicator()
        assert (communicator.rank, communicator.size) == (3, 8)
        communicator.all_reduce(torch.zeros(16), label="gradients")
        assert communicator.ledger.wire_elements == 2 * 16 * 7 / 8


def test_the_environment_of_a_node() -> None:
    before = {name: os.environ.get(name) for name in VARIABLES}
    with fake_world(rank=13, world_size=32, ranks_per_node=8):
        assert [os.environ[name] for name in VARIABLES] == ["13", "32", "5", "8"]
        assert ds_comm.get_local_rank() == 5
    assert {name: os.environ.get(name) for name in VARIABLES} == before


def test_it_leaves_nothing_behind_after_an_error() -> None:
    with pytest.raises(KeyError), fake_world(rank=1, world_size=2):
        raise KeyError
    assert not ds_comm.is_initialized()
    assert not dist.is_initialized()
    assert os.environ.get("RANK") is None
    with fake_world(rank=0, world_size=3):
        assert dist.get_world_size() == 3


def test_worlds_do_not_nest() -> None:
    with fake_world(rank=0, world_size=2):
        with pytest.raises(RuntimeError, match="already rank 0 of 2"), fake_world():
            pytest.fail("must not be entered")
        assert dist.get_world_size() == 2  # the outer world is intact


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"rank": 4, "world_size": 4}, "rank=4 is not in a world of world_size=4"),
        ({"rank": 0, "world_size": 4, "ranks_per_node": 3}, "ranks_per_node=3 does not divide"),
    ],
)
def test_worlds_that_cannot_be(arguments: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text), fake_world(**arguments):
        pytest.fail("must not be entered")
    assert not dist.is_initialized()
