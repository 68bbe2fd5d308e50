"""`deepspeed.comm`: upstream's names and keywords over ds_comm, which does the work.

Every collective takes upstream's extra keywords: `log_name` becomes the label of the call (shown in errors and in the
communication log), `prof` and `debug` are accepted (times are recorded for everything or nothing, see `configure`).

`is_initialized()` speaks of this package's world: False in a process where only torch.distributed was initialised,
True once `init_distributed` has adopted that group or made one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh

import ds_comm
import ds_comm.device
from deepspeed._lazy import explain_absent
from deepspeed.comm import log
from deepspeed.comm.log import (
    configure as configure,
)
from deepspeed.comm.log import (
    get_comm_operation_count as get_comm_operation_count,
)
from deepspeed.comm.log import (
    get_logged_comm_ops as get_logged_comm_ops,
)
from deepspeed.comm.log import (
    has_comm_data as has_comm_data,
)
from deepspeed.comm.log import (
    log_summary as log_summary,
)
from deepspeed.comm.log import (
    reset_log as reset_log,
)
from deepspeed.utils.logging import get_caller_func, logger
from ds_comm import (
    P2POp as P2POp,
)
from ds_comm import (
    destroy_process_group as destroy_process_group,
)
from ds_comm import (
    get_all_ranks_from_group as get_all_ranks_from_group,
)
from ds_comm import (
    get_global_rank as get_global_rank,
)
from ds_comm import (
    get_local_rank as get_local_rank,
)
from ds_comm import (
    get_rank as get_rank,
)
from ds_comm import (
    get_world_group as get_world_group,
)
from ds_comm import (
    get_world_size as get_world_size,
)
from ds_comm import (
    is_available as is_available,
)
from ds_comm import (
    is_initialized as is_initialized,
)
from ds_comm import (
    new_group as new_group,
)
from ds_comm.log import configure as show_logger

R = TypeVar("R")

DEFAULT_PORT = 29500


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = DEFAULT_PORT,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Initialise communication, once: later calls do nothing.

    Adopts a process group that torch already has; else reads the environment (torchrun, MPI, SLURM); with none of
    them the world is this process alone.

    Args:
        dist_backend: torch.distributed backend; None takes the device's own ("gloo" on a CPU, "nccl" on CUDA).
        timeout: how long a rank waits for another; None takes DEEPSPEED_TIMEOUT (minutes) or ds_comm's default.
        dist_init_required: False says that a process group must exist already.
        config: configuration with the section `comms_logger`.

    Raises:
        RuntimeError: `dist_init_required=False` and nothing is initialised.
    """
    show_logger("DeepSpeed")
    if not ds_comm.is_initialized():
        exists = torch.distributed.is_available() and torch.distributed.is_initialized()
        if dist_init_required is False and not exists:
            raise RuntimeError(
                "dist_init_required is False, but torch.distributed is not initialised; call "
                "deepspeed.init_distributed() or torch.distributed.init_process_group() first, or leave it out"
            )
        ds_comm.init_distributed(
            dist_backend,
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            distributed_port=distributed_port,
            auto_mpi_discovery=auto_mpi_discovery,
        )
        if verbose and ds_comm.get_rank() == 0:
            how = "adopted torch's process group" if exists else "initialised"
            logger.info(f"communication {how}: {ds_comm.get_world_size()} ranks, {ds_comm.communicator().kind}")
    if config is not None:
        log.configure(config)
    log.apply_timing()


def _upstream(function: Callable[..., R]) -> Callable[..., R]:
    """`function` with upstream's extra keywords."""

    @functools.wraps(function)
    def call(*args: Any, prof: bool = False, log_name: str | None = None, debug: str | None = None, **kwargs: Any) -> R:
        if log_name is not None:
            kwargs.setdefault("label", log_name)
            log.name_operation(log_name)
        settings = log.settings()
        if settings.enabled and settings.verbose and settings.wants(function.__name__):
            caller = f" | caller: {get_caller_func(2)}" if settings.debug else ""
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            size = log.readable_size(max((t.nbytes for t in tensors), default=0))
            logger.info(f"comm op: {log_name or function.__name__} | msg size: {size}{caller}")
        return function(*args, **kwargs)

    return call


all_gather = _upstream(ds_comm.all_gather)
all_gather_coalesced = _upstream(ds_comm.all_gather_coalesced)
all_gather_into_tensor = _upstream(ds_comm.all_gather_into_tensor)
all_gather_object = _upstream(ds_comm.all_gather_object)
all_reduce = _upstream(ds_comm.all_reduce)
all_reduce_coalesced = _upstream(ds_comm.all_reduce_coalesced)
all_to_all = _upstream(ds_comm.all_to_all)
all_to_all_single = _upstream(ds_comm.all_to_all_single)
barrier = _upstream(ds_comm.barrier)
batch_isend_irecv = _upstream(ds_comm.batch_isend_irecv)
broadcast = _upstream(ds_comm.broadcast)
broadcast_object_list = _upstream(ds_comm.broadcast_object_list)
gather = _upstream(ds_comm.gather)
irecv = _upstream(ds_comm.irecv)
isend = _upstream(ds_comm.isend)
monitored_barrier = _upstream(ds_comm.monitored_barrier)
recv = _upstream(ds_comm.recv)
reduce = _upstream(ds_comm.reduce)
reduce_scatter = _upstream(ds_comm.reduce_scatter)
reduce_scatter_tensor = _upstream(ds_comm.reduce_scatter_tensor)
scatter = _upstream(ds_comm.scatter)
send = _upstream(ds_comm.send)


def allgather_fn(
    output_tensor: torch.Tensor,
    input_tensor: torch.Tensor,
    group: Any = None,
    async_op: bool = False,
    debug: str | None = None,
    log_name: str | None = None,
) -> Any:
    """`all_gather_into_tensor` under upstream's older name."""
    return all_gather_into_tensor(
        output_tensor, input_tensor, group=group, async_op=async_op, debug=debug, log_name=log_name
    )


def reduce_scatter_fn(
    output_tensor: torch.Tensor,
    tensor: torch.Tensor,
    op: Any = ds_comm.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
    prof: bool = False,
    debug: str | None = None,
    log_name: str | None = None,
) -> Any:
    """`reduce_scatter_tensor` under upstream's older name."""
    return reduce_scatter_tensor(
        output_tensor, tensor, op=op, group=group, async_op=async_op, prof=prof, debug=debug, log_name=log_name
    )


def inference_all_reduce(
    tensor: torch.Tensor, op: Any = ds_comm.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """`all_reduce` in place, and nothing at all in a group of one rank. Returns a Work when asynchronous, else None."""
    if ds_comm.get_world_size(group) == 1:
        return None
    return ds_comm.all_reduce(tensor, op=op, group=group, async_op=async_op, label="inference_all_reduce")


def has_all_gather_into_tensor() -> bool:
    """True: every torch this package supports has it; the same goes for the three questions below."""
    return True


has_reduce_scatter_tensor = has_all_reduce_coalesced = has_coalescing_manager = has_all_gather_into_tensor


def initialize_mesh_device(mesh_shape: tuple[int, ...], mesh_dim_names: tuple[str, ...]) -> Any:
    """torch DeviceMesh over all ranks, row-major (the last name varies fastest); initialises communication."""
    init_distributed()
    return init_device_mesh(ds_comm.device.device_type(), mesh_shape, mesh_dim_names=mesh_dim_names)


explain_absent(__name__)
