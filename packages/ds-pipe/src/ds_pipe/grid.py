"""`PipelineParallelGrid`: the process groups of a rank grid, and the questions that Megatron-like code asks of them.

A `ProcessTopology` says who shares which axis; the grid makes the groups: one along "pipe" (the stages of one replica
of the model), one along "data" (the replicas of one stage), one along "model" (the tensor-parallel ranks), and one per
replica (pipe x model). Names and semantics are upstream's (`deepspeed.pipe`); this object is
the `mpu` of a pipeline engine.

Invariants. Making a grid is collective over the world, since groups are. An axis that the topology lacks has size 1.
As upstream has it, `get_model_parallel_*` ask for the ranks that hold one whole replica (pipe x model), and
`get_slice_parallel_*` as well as `get_tensor_model_parallel_*` for the axis "model".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

import ds_comm
from ds_pipe.errors import PipelineError
from ds_pipe.topology import PipeDataParallelTopology, ProcessTopology

__all__ = ["PipelineParallelGrid"]

Group = dist.ProcessGroup | None


class PipelineParallelGrid:
    """The groups of this rank on `topology` (default: one stage, all ranks replicas of it).

    `process_group` is the group whose ranks the topology numbers; only one of all ranks will do.

    PipelineError when topology and ranks do not fit each other.
    """

    def __init__(self, topology: ProcessTopology | None = None, process_group: Group = None) -> None:
        if not ds_comm.is_initialized():
            ds_comm.init_distributed()
        self.global_rank = ds_comm.get_rank()
        self.world_size = ds_comm.get_world_size()
        if ds_comm.get_world_size(process_group) != self.world_size:
            raise PipelineError(
                f"process_group has {ds_comm.get_world_size(process_group)} of the world's {self.world_size} ranks; a "
                "grid spans the world"
            )
        self._topo = PipeDataParallelTopology(1, self.world_size) if topology is None else topology
        if self._topo.world_size() != self.world_size:
            raise PipelineError(
                f"the topology has {self._topo.world_size()} ranks (axes {self._topo.axes}, dims {self._topo.dims}), "
                f"the world has {self.world_size}; expected as many"
            )
        self.data_parallel_size = max(self._topo.get_dim("data"), 1)
        self.pipe_parallel_size = max(self._topo.get_dim("pipe"), 1)
        self.model_parallel_size = max(self._topo.get_dim("model"), 1)
        self.slice_parallel_size = self.pipe_parallel_size * self.model_parallel_size
        coord = self._topo.get_coord(self.global_rank)
        self.stage_id = int(getattr(coord, "pipe", 0))
        self.data_parallel_id = int(getattr(coord, "data", 0))
        self.p2p_groups = [[rank, _next_stage(self._topo, rank)] for rank in range(self.world_size)]
        self.dp_groups = _lists(self._topo, "data")
        self.pp_group, self.pp_proc_group = self._make(_lists(self._topo, "pipe"))
        self.dp_group, self.dp_proc_group = self._make(self.dp_groups)
        self.slice_group, self.slice_proc_group = self._make(_lists(self._topo, "model"))
        whole = [self._topo.filter_match(data=at) for at in range(self._topo.get_dim("data"))]
        self.ds_model_group, self.ds_model_proc_group = self._make(whole or [list(range(self.world_size))])

    def _make(self, lists: Sequence[list[int]]) -> tuple[list[int], dist.ProcessGroup]:
        """One group per list, all ranks making all of them; this rank's list and group."""
        if len(lists) == 1:
            return list(lists[0]), ds_comm.get_world_group()
        mine: tuple[list[int], dist.ProcessGroup] | None = None
        for ranks in lists:
            made = ds_comm.new_group(ranks)
            if self.global_rank in ranks:
                mine = list(ranks), made
        assert mine is not None  # the lists of an axis cover the grid
        return mine

    def topology(self) -> ProcessTopology:
        """The grid itself."""
        return self._topo

    def get_global_rank(self) -> int:
        return self.global_rank

    def get_stage_id(self) -> int:
        return self.stage_id

    def get_data_parallel_id(self) -> int:
        return self.data_parallel_id

    def stage_to_global(self, stage_id: int, **kwargs: int) -> int:
        """The rank of another stage with this rank's other coordinates, but those in `kwargs`."""
        return self._topo.get_rank(**{**self._topo.get_coord(self.global_rank)._asdict(), **kwargs, "pipe": stage_id})

    def get_pipe_parallel_rank(self) -> int:
        return self.pp_group.index(self.global_rank)

    def get_pipe_parallel_world_size(self) -> int:
        return len(self.pp_group)

    def get_pipe_parallel_group(self) -> dist.ProcessGroup:
        return self.pp_proc_group

    def get_data_parallel_rank(self) -> int:
        return self.dp_group.index(self.global_rank)

    def get_data_parallel_world_size(self) -> int:
        return len(self.dp_group)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.dp_proc_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.dp_group

    def get_model_parallel_rank(self) -> int:
        return self.ds_model_group.index(self.global_rank)

    def get_model_parallel_world_size(self) -> int:
        return len(self.ds_model_group)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.ds_model_proc_group

    def get_slice_parallel_rank(self) -> int:
        return self.slice_group.index(self.global_rank)

    def get_slice_parallel_world_size(self) -> int:
        return len(self.slice_group)

    def get_slice_parallel_group(self) -> dist.ProcessGroup:
        return self.slice_proc_group

    get_pipeline_model_parallel_rank = get_pipe_parallel_rank
    get_pipeline_model_parallel_world_size = get_pipe_parallel_world_size
    get_pipeline_model_parallel_group = get_pipe_parallel_group
    get_tensor_model_parallel_rank = get_slice_parallel_rank
    get_tensor_model_parallel_world_size = get_slice_parallel_world_size
    get_tensor_model_parallel_group = get_slice_parallel_group


def _lists(topology: ProcessTopology, axis: str) -> list[list[int]]:
    """All lists of ranks along an axis; of single ranks for one that the topology lacks."""
    return topology.get_axis_comm_lists(axis) or [[rank] for rank in range(topology.world_size())]


def _next_stage(topology: ProcessTopology, rank: int) -> int:
    """The rank that `rank` sends its activations to; the last stage's next is the first."""
    ranks = next(ranks for ranks in _lists(topology, "pipe") if rank in ranks)
    return ranks[(ranks.index(rank) + 1) % len(ranks)]
