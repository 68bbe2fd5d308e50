"""Which ranks form which groups: a grid of ranks with named axes, first as pure data, then as process groups.

Vocabulary
  axis    a side of the grid: dp (data), tp (tensor), pp (pipeline), sp (sequence), ep (expert) parallel. An axis may be
          split in two, named after its part: dp_replicate and dp_shard, say. (`dim` is a tensor's, never the grid's.)
  coords  a rank's place: one index per axis.
  along   the ranks *along* some axes from a rank are those that differ from it in these axes only. They form a group.

Invariants
  - Row major, as `torch.distributed.DeviceMesh`: the last axis changes fastest, so neighbours on it have adjacent ranks
    (give tp, which talks most, the last place).
  - For any axes the groups along them partition the ranks, and each group is in ascending order of rank.
  - `RankGrid` needs no process group: plans and tests use it at any size. Only the functions below it communicate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ds_comm.device import device_type

AXES: Mapping[str, str] = {
    "dp": "data parallel",
    "tp": "tensor parallel",
    "pp": "pipeline parallel",
    "sp": "sequence parallel",
    "ep": "expert parallel",
}


@dataclass(frozen=True)
class RankGrid:
    """Ranks 0 to `size - 1` on a grid: `names` and `sizes` of its axes, the slowest first.

    >>> grid = RankGrid.of(8, dp=-1, tp=2)
    >>> str(grid)
    'dp=4 x tp=2'
    >>> grid.coords(5)
    {'dp': 2, 'tp': 1}
    >>> grid.ranks_along(5, "dp")
    (1, 3, 5, 7)
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.sizes) or len(set(self.names)) != len(self.names) or not self.names:
            raise ValueError(f"axes {self.names} and sizes {self.sizes}: need one size for each of at least one axis")
        for name, size in zip(self.names, self.sizes, strict=True):
            if name.split("_")[0] not in AXES:
                raise ValueError(f"axis {name!r} is unknown; axes are {', '.join(AXES)}, or these with a _suffix")
            if size < 1:
                raise ValueError(f"axis {name}={size}: a size is at least 1")

    @classmethod
    def of(cls, world_size: int, **axes: int) -> RankGrid:
        """The grid of `world_size` ranks with these axes, slowest first; one of them may be -1: what remains.

        Raises:
            ValueError: the axes do not multiply to the world size; the text has every factor.
        """
        free = [name for name, size in axes.items() if size == -1]
        known = math.prod(size for size in axes.values() if size != -1)
        factors = " x ".join(f"{name}={size}" for name, size in axes.items())
        if len(free) > 1:
            raise ValueError(f"{factors}: only one axis can be -1 (the ranks that remain); give the others a size")
        if known < 1 or (world_size % known if free else world_size != known):
            expected = f"a product that divides {world_size}" if free else f"{world_size}"
            raise ValueError(f"{factors} is {known} ranks (without -1), but the world needs {expected}")
        sizes = {name: world_size // known if size == -1 else size for name, size in axes.items()}
        return cls(tuple(sizes), tuple(sizes.values()))

    def __str__(self) -> str:
        return " x ".join(f"{name}={size}" for name, size in zip(self.names, self.sizes, strict=True))

    @property
    def size(self) -> int:
        """The number of ranks."""
        return math.prod(self.sizes)

    def axis_size(self, *axes: str) -> int:
        """The number of ranks along these axes together (1 for none)."""
        return math.prod(self.sizes[index] for index in self._indices(axes))

    def coords(self, rank: int) -> dict[str, int]:
        """The place of `rank`: its index on every axis."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is not on the grid {self}; need 0 <= rank < {self.size}")
        place = []
        for size in reversed(self.sizes):
            rank, index = divmod(rank, size)
            place.append(index)
        return dict(zip(self.names, reversed(place), strict=True))

    def rank(self, **coords: int) -> int:
        """The rank at a place; every axis must be given."""
        if set(coords) != set(self.names):
            raise ValueError(f"coords {coords} of the grid {self}: give an index for each of {', '.join(self.names)}")
        rank = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            if not 0 <= coords[name] < size:
                raise ValueError(f"{name}={coords[name]} is not on the grid {self}; need 0 <= {name} < {size}")
            rank = rank * size + coords[name]
        return rank

    def ranks_along(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The group of `rank` along these axes, ascending: the ranks at its place on all the other axes."""
        chosen = self._indices(axes)
        place = list(self.coords(rank).values())
        ranges = [range(size) if i in chosen else (place[i],) for i, size in enumerate(self.sizes)]
        return tuple(self._rank_at(where) for where in product(*ranges))

    def groups_along(self, *axes: str) -> Iterator[tuple[int, ...]]:
        """Every group along these axes, ordered by first rank; together they hold each rank once."""
        chosen = self._indices(axes)
        ranges = [(0,) if i in chosen else range(size) for i, size in enumerate(self.sizes)]
        for where in product(*ranges):
            yield self.ranks_along(self._rank_at(where), *axes)

    def _rank_at(self, place: tuple[int, ...]) -> int:
        rank = 0
        for index, size in zip(place, self.sizes, strict=True):
            rank = rank * size + index
        return rank

    def _indices(self, axes: tuple[str, ...]) -> set[int]:
        for axis in axes:
            if axis not in self.names:
                raise ValueError(f"axis {axis!r} is not on the grid {self}; its axes are {', '.join(self.names)}")
        return {self.names.index(axis) for axis in axes}


def _check_world(grid: RankGrid) -> None:
    world_size = dist.get_world_size()
    if grid.size != world_size:
        raise ValueError(f"the grid {grid} has {grid.size} ranks, but the world has {world_size}")


def device_mesh(grid: RankGrid, kind: str | None = None) -> DeviceMesh:
    """torch's DeviceMesh of the grid, over the whole world; collective. `kind` is a device type, by default ours."""
    _check_world(grid)
    return init_device_mesh(kind or device_type(), grid.sizes, mesh_dim_names=grid.names)


def new_group_along(grid: RankGrid, *axes: str) -> dist.ProcessGroup:
    """This rank's process group along these axes; collective over the world: every rank calls it with the same axes.

    Along all axes it is the world's own group. Each rank makes only the group it is in, so the cost does not grow
    with the world.

    Raises:
        ValueError: the grid is not as large as the world, or has no such axis.
    """
    _check_world(grid)
    ranks = grid.ranks_along(dist.get_rank(), *axes)
    world = dist.group.WORLD
    if len(ranks) == grid.size and world is not None:
        return world
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)  # this rank is in it
    return group
