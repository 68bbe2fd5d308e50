"""A Cartesian grid of ranks with named axes, row-major: the last axis runs fastest. Pure: no process groups.

The names and semantics are upstream's (`deepspeed.runtime.pipe.topology`), so that code written for it runs. A rank's
*coordinate* is a namedtuple `ProcessCoord` with one field per axis. A *comm list* is the ranks that differ on one axis
only: the members of one process group.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from itertools import product
from typing import Any

__all__ = ["PipeDataParallelTopology", "PipeModelDataParallelTopology", "ProcessTopology"]


class ProcessTopology:
    """Ranks 0 .. prod(dims) - 1 on a grid with the named `axes`.

    `ProcessTopology(["pipe", "data"], [2, 3])` puts rank 4 at pipe 1, data 1. `mapping` is coordinate -> rank.
    ValueError for axes and dims of different length, repeated axes or a dim below 1.
    """

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        self.axes = list(axes)
        self.dims = [int(dim) for dim in dims]
        if len(self.axes) != len(self.dims) or len(set(self.axes)) != len(self.axes) or min(self.dims, default=1) < 1:
            raise ValueError(
                f"axes {self.axes} with dims {self.dims}; expected distinct axes, each with a dim of 1 or more"
            )
        make: Any = namedtuple  # its fields are known at run time only
        self.ProcessCoord = make("ProcessCoord", self.axes)
        coords = product(*map(range, self.dims))
        self.mapping: dict[Any, int] = {self.ProcessCoord(*coord): rank for rank, coord in enumerate(coords)}
        self._coords = list(self.mapping)

    def get_rank(self, **coord_kwargs: int) -> int:
        """The rank at a full coordinate, e.g. `get_rank(pipe=0, data=1)`; ValueError for another set of axes or a
        coordinate off the grid."""
        if set(coord_kwargs) != set(self.axes):
            raise ValueError(
                f"get_rank() takes every axis exactly once: got {sorted(coord_kwargs)}, expected {self.axes}; "
                "filter_match() finds all ranks of a slice"
            )
        coord = self.ProcessCoord(**coord_kwargs)
        if coord not in self.mapping:
            raise ValueError(f"{coord} is off the grid; {self._grid()}")
        return self.mapping[coord]

    def get_axis_names(self) -> list[str]:
        return self.axes

    def get_rank_repr(
        self, rank: int, omit_axes: Sequence[str] = ("data", "pipe"), inner_sep: str = "_", outer_sep: str = "-"
    ) -> str:
        """A text for checkpoint names: `model_01` for model 1, axes joined by `outer_sep`, without `omit_axes`."""
        coord = self.get_coord(rank)
        shown = [axis for axis in self.axes if axis not in omit_axes]
        return outer_sep.join(f"{axis}{inner_sep}{getattr(coord, axis):02d}" for axis in shown)

    def get_dim(self, axis: str) -> int:
        """The number of ranks along `axis`; 0 for an axis that the grid does not have."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def get_coord(self, rank: int) -> Any:
        """The `ProcessCoord` of `rank`; ValueError for a rank off the grid."""
        if not 0 <= rank < len(self._coords):
            raise ValueError(f"rank {rank} not found in topology; {self._grid()}")
        return self._coords[rank]

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """All lists of ranks that differ on `axis` only, each ascending; [] for an axis that the grid does not have."""
        if axis not in self.axes:
            return []
        others = [other for other in self.axes if other != axis]
        rests = product(*(range(self.get_dim(other)) for other in others))
        return [self.filter_match(**dict(zip(others, rest, strict=True))) for rest in rests]

    def filter_match(self, **filter_kwargs: int) -> list[int]:
        """The ranks whose coordinates have all these values, ascending; ValueError for an unknown axis."""
        for axis in filter_kwargs:
            self._check_axis(axis)
        wanted = filter_kwargs.items()
        return [r for r, coord in enumerate(self._coords) if all(getattr(coord, axis) == at for axis, at in wanted)]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """The ranks at position `idx` of `axis`, ascending; ValueError for an unknown axis."""
        self._check_axis(axis)
        return self.filter_match(**{axis: idx})

    def world_size(self) -> int:
        return len(self._coords)

    def _check_axis(self, axis: str) -> None:
        if axis not in self.axes:
            raise ValueError(f"axis {axis!r} is unknown; {self._grid()}")

    def _grid(self) -> str:
        return "the grid is " + " x ".join(f"{axis} {dim}" for axis, dim in zip(self.axes, self.dims, strict=True))

    def __str__(self) -> str:
        return str(self.mapping)


class PipeDataParallelTopology(ProcessTopology):
    """Pipeline x data: the data-parallel ranks of a stage are neighbours, so that gradients take the fastest links."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__(axes=["pipe", "data"], dims=[num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """Pipeline x data x model, with tensor-parallel (model) ranks as neighbours."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__(axes=["pipe", "data", "model"], dims=[num_pp, num_dp, num_mp])
