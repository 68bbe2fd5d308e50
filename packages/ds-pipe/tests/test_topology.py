"""The grid of ranks: row-major, the last axis fastest; upstream's answers for known and unknown axes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_pipe import PipeDataParallelTopology, PipeModelDataParallelTopology, ProcessTopology

GRID = ProcessTopology(["pipe", "data"], [2, 3])


def test_rank_and_coordinate_are_inverse() -> None:
    assert GRID.world_size() == 6
    assert [GRID.get_rank(pipe=p, data=d) for p in range(2) for d in range(3)] == list(range(6))
    assert GRID.get_coord(4) == (1, 1) and GRID.get_coord(4).pipe == 1
    assert str(GRID.get_coord(4)) == "ProcessCoord(pipe=1, data=1)"
    assert GRID.mapping[GRID.ProcessCoord(pipe=1, data=2)] == 5


def test_lists_of_ranks() -> None:
    assert GRID.get_axis_comm_lists("pipe") == [[0, 3], [1, 4], [2, 5]]
    assert GRID.get_axis_comm_lists("data") == [[0, 1, 2], [3, 4, 5]]
    assert GRID.filter_match(pipe=1) == [3, 4, 5]
    assert GRID.filter_match() == list(range(6))
    assert GRID.get_axis_list("data", 2) == [2, 5]
    assert GRID.get_axis_names() == ["pipe", "data"]


def test_unknown_axes() -> None:
    """As upstream: no lists and dim 0 where an optional axis is asked for, an error where it is named as a filter."""
    assert GRID.get_axis_comm_lists("model") == [] and GRID.get_dim("model") == 0
    with pytest.raises(ValueError, match="axis 'model' is unknown; the grid is pipe 2 x data 3"):
        GRID.filter_match(model=0)
    with pytest.raises(ValueError, match="axis 'model' is unknown"):
        GRID.get_axis_list("model", 0)


def test_errors_of_get_rank() -> None:
    with pytest.raises(ValueError, match=r"every axis exactly once.*filter_match"):
        GRID.get_rank(pipe=0)
    with pytest.raises(ValueError, match="every axis exactly once"):
        GRID.get_rank(pipe=0, data=1, model=0)
    with pytest.raises(ValueError, match=r"ProcessCoord\(pipe=9, data=0\) is off the grid"):
        GRID.get_rank(pipe=9, data=0)
    for rank in (6, -1):
        with pytest.raises(ValueError, match=f"rank {rank} not found in topology"):
            GRID.get_coord(rank)
    with pytest.raises(ValueError, match="distinct axes"):
        ProcessTopology(["pipe", "pipe"], [1, 2])
    with pytest.raises(ValueError, match="distinct axes"):
        ProcessTopology(["pipe"], [0])


def test_named_grids_and_checkpoint_names() -> None:
    assert PipeDataParallelTopology(2, 4).get_dim("data") == 4
    grid = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=2)
    assert (grid.axes, grid.dims) == (["pipe", "data", "model"], [2, 2, 2])
    assert grid.get_axis_comm_lists("model") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert grid.get_rank_repr(3) == "model_01" and GRID.get_rank_repr(3) == ""
    assert GRID.get_rank_repr(4, omit_axes=[], inner_sep="=", outer_sep="+") == "pipe=01+data=01"


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_comm_lists_partition_the_ranks(dims: list[int]) -> None:
    axes = [f"axis{at}" for at in range(len(dims))]
    grid = ProcessTopology(axes, dims)
    for axis, dim in zip(axes, dims, strict=True):
        lists = grid.get_axis_comm_lists(axis)
        assert sorted(rank for ranks in lists for rank in ranks) == list(range(grid.world_size()))
        for ranks in lists:
            assert len(ranks) == dim and ranks == sorted(ranks)
            assert [getattr(grid.get_coord(rank), axis) for rank in ranks] == list(range(dim))
            assert len({tuple(c for a, c in grid.get_coord(r)._asdict().items() if a != axis) for r in ranks}) == 1
