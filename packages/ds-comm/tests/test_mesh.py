"""The rank grid as pure data (against numpy), at 1,024 ranks in the fake world, and as real groups."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import ds_comm.mesh
from ds_comm.mesh import RankGrid, device_mesh, new_group_along
from ds_comm.testing import fake_world, run_ranks

NAMES = ("pp", "dp", "sp", "tp")
GRIDS = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(
    lambda sizes: RankGrid(NAMES[: len(sizes)], tuple(sizes))
)


def test_the_examples_of_the_docstring() -> None:
    result = doctest.testmod(ds_comm.mesh)
    assert result.attempted >= 4
    assert result.failed == 0


@settings(deadline=None)
@given(GRIDS)
def test_coords_are_numpys(grid: RankGrid) -> None:
    for rank in range(grid.size):
        place = tuple(grid.coords(rank).values())
        assert place == tuple(np.unravel_index(rank, grid.sizes))
        assert grid.rank(**grid.coords(rank)) == rank


@settings(deadline=None)
@given(GRIDS, st.data())
def test_groups_partition_the_ranks(grid: RankGrid, data: st.DataObject) -> None:
    axes = data.draw(st.lists(st.sampled_from(grid.names), unique=True))
    groups = list(grid.groups_along(*axes))
    assert sorted(rank for group in groups for rank in group) == list(range(grid.size))
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    for group in groups:
        assert len(group) == grid.axis_size(*axes)
        assert list(group) == sorted(group)
        for rank in group:
            assert grid.ranks_along(rank, *axes) == group
            assert all(grid.coords(rank)[name] == grid.coords(group[0])[name] for name in set(grid.names) - set(axes))


def test_neighbours_on_the_last_axis_are_adjacent() -> None:
    grid = RankGrid.of(8, pp=2, dp=2, tp=2)
    assert grid.ranks_along(5, "tp") == (4, 5)
    assert grid.ranks_along(5, "dp") == (5, 7)
    assert grid.ranks_along(5, "pp") == (1, 5)
    assert grid.ranks_along(5, "dp", "tp") == (4, 5, 6, 7) == grid.ranks_along(5, "tp", "dp")
    assert grid.ranks_along(5) == (5,)
    assert list(grid.groups_along("dp")) == [(0, 2), (1, 3), (4, 6), (5, 7)]


def test_a_free_axis_takes_what_remains() -> None:
    assert RankGrid.of(12, pp=2, dp=-1, tp=3) == RankGrid(("pp", "dp", "tp"), (2, 2, 3))
    assert str(RankGrid.of(6, dp_replicate=-1, dp_shard=2)) == "dp_replicate=3 x dp_shard=2"


@pytest.mark.parametrize(
    ("world_size", "axes", "text"),
    [
        (8, {"dp": 2, "tp": 3}, "dp=2 x tp=3 is 6 ranks .* the world needs 8"),
        (8, {"dp": -1, "tp": 3}, "dp=-1 x tp=3 is 3 ranks .* a product that divides 8"),
        (8, {"dp": -1, "tp": -1}, "only one axis can be -1"),
        (8, {"dp": 8, "zp": 1}, "axis 'zp' is unknown; axes are dp, tp, pp, sp, ep"),
        (8, {"dp": 0}, "dp=0 is 0 ranks"),
        (8, {"dp": -2, "tp": -4}, "axis dp=-2: a size is at least 1"),
        (1, {}, "at least one axis"),
    ],
)
def test_axes_that_do_not_fit(world_size: int, axes: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        RankGrid.of(world_size, **axes)


def test_places_off_the_grid() -> None:
    grid = RankGrid.of(4, dp=2, tp=2)
    with pytest.raises(ValueError, match="rank 4 is not on the grid dp=2 x tp=2"):
        grid.coords(4)
    with pytest.raises(ValueError, match="tp=2 is not on the grid"):
        grid.rank(dp=0, tp=2)
    with pytest.raises(ValueError, match="give an index for each of dp, tp"):
        grid.rank(dp=0)
    with pytest.raises(ValueError, match="axis 'pp' is not on the grid dp=2 x tp=2"):
        grid.ranks_along(0, "pp")


@pytest.mark.parametrize("rank", [0, 517, 1023])
def test_groups_and_device_mesh_at_1024_ranks(rank: int) -> None:
    grid = RankGrid.of(1024, pp=4, dp=-1, tp=8)
    with fake_world(rank=rank, world_size=1024):
        for axes in (("tp",), ("pp", "dp"), ()):
            group = new_group_along(grid, *axes)
            assert tuple(dist.get_process_group_ranks(group)) == grid.ranks_along(rank, *axes)
        assert new_group_along(grid, "pp", "dp", "tp") is dist.group.WORLD
        mesh = device_mesh(grid, "cpu")
        assert mesh.mesh_dim_names == ("pp", "dp", "tp")
        for name, index in grid.coords(rank).items():
            assert mesh.get_local_rank(name) == index
            assert tuple(dist.get_process_group_ranks(mesh.get_group(name))) == grid.ranks_along(rank, name)


def test_a_grid_of_another_size_than_the_world() -> None:
    grid = RankGrid.of(8, dp=8)
    with fake_world(rank=0, world_size=4):
        with pytest.raises(ValueError, match="the grid dp=8 has 8 ranks, but the world has 4"):
            new_group_along(grid, "dp")
        with pytest.raises(ValueError, match="but the world has 4"):
            device_mesh(grid)


def sums_along_the_axes() -> tuple[int, int]:
    grid = RankGrid.of(dist.get_world_size(), dp=2, tp=-1)
    sums = []
    for axis in ("dp", "tp"):
        total = torch.tensor(10 ** dist.get_rank())
        dist.all_reduce(total, group=new_group_along(grid, axis))
        sums.append(int(total))
    return sums[0], sums[1]


def test_real_groups() -> None:
    assert run_ranks(sums_along_the_axes, 4) == [(101, 11), (1010, 11), (101, 1100), (1010, 1100)]
