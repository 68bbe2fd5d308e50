"""Collectives for PyTorch with torch.distributed's names: fast on one host, counted, and never silent when ranks part.

``init_distributed()``, then either the functions here, or ``communicator(group)`` for windows (long-lived flat buffers)
and the group's ledger. Importing this package starts nothing.
"""

from ds_comm.__about__ import __version__
from ds_comm._world import (
    communicator,
    destroy_process_group,
    init_distributed,
    is_available,
    is_initialized,
    set_watchdog,
)
from ds_comm.channel import Channel
from ds_comm.collectives import (
    ReduceOp,
    all_gather,
    all_gather_coalesced,
    all_gather_into_tensor,
    all_gather_object,
    all_reduce,
    all_reduce_coalesced,
    all_to_all,
    all_to_all_single,
    barrier,
    broadcast,
    broadcast_object_list,
    gather,
    monitored_barrier,
    reduce,
    reduce_scatter,
    reduce_scatter_tensor,
    scatter,
)
from ds_comm.communicator import Communicator
from ds_comm.errors import CommArgumentError, CommError, DivergenceError, RankMissingError
from ds_comm.groups import (
    get_all_ranks_from_group,
    get_global_rank,
    get_local_rank,
    get_rank,
    get_world_group,
    get_world_size,
    new_group,
)
from ds_comm.ledger import Ledger
from ds_comm.p2p import P2POp, batch_isend_irecv, irecv, isend, recv, send
from ds_comm.transport.base import GatherWindow, Packet, Receipt, ReduceWindow, Work

__all__ = [
    "CommArgumentError",
    "CommError",
    "Channel",
    "Communicator",
    "DivergenceError",
    "GatherWindow",
    "Ledger",
    "P2POp",
    "Packet",
    "Receipt",
    "RankMissingError",
    "ReduceOp",
    "ReduceWindow",
    "Work",
    "__version__",
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "communicator",
    "destroy_process_group",
    "gather",
    "get_all_ranks_from_group",
    "get_global_rank",
    "get_local_rank",
    "get_rank",
    "get_world_group",
    "get_world_size",
    "init_distributed",
    "irecv",
    "is_available",
    "is_initialized",
    "isend",
    "monitored_barrier",
    "new_group",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
    "set_watchdog",
]
