"""The process's world: the only process-wide state of ds-comm.

Owns: whether ``init_distributed`` ran, the communicators made so far (one per process group), the watchdog's limit.

Invariants
  - Nothing runs at import. ``is_initialized()`` is False until ``init_distributed`` of *this* package ran, also when
    torch.distributed was initialised by somebody else (whose group is then adopted, not replaced).
  - Leaving (``destroy_process_group``, or the interpreter's end) closes every communicator: waiting peers learn of it.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from ds_comm import device
from ds_comm._connect import connect
from ds_comm._environment import Launch, discover
from ds_comm.communicator import Communicator
from ds_comm.errors import CommArgumentError, CommError
from ds_comm.log import get_logger
from ds_comm.watchdog import Watchdog, seconds_from_environment

_logger = get_logger(__name__)

_MARGIN_SECONDS = 30.0
"""torch's own time limit comes this much later than the watchdog, which says more."""


@dataclass
class _World:
    initialized: bool = False
    pid: int = 0
    watchdog: Watchdog = field(default_factory=Watchdog)
    communicators: dict[dist.ProcessGroup, Communicator] = field(default_factory=dict)
    instances: dict[dist.ProcessGroup, int] = field(default_factory=dict)


_world = _World()


def is_available() -> bool:
    """Whether torch was built with torch.distributed."""
    return dist.is_available()


def is_initialized() -> bool:
    """Whether ``init_distributed`` ran and its world still stands."""
    return _world.initialized and dist.is_initialized()


def init_distributed(
    backend: str | None = None,
    *,
    init_method: str | None = None,
    rank: int = -1,
    world_size: int = -1,
    timeout: timedelta | float | None = None,
    distributed_port: int = 29500,
    auto_mpi_discovery: bool = True,
) -> None:
    """Make this process part of a world; without a launcher, of a world of one. Calling it again is no change.

    Adopts a process group that exists already. Otherwise rank and size come from the arguments, else from RANK and
    WORLD_SIZE (torchrun), else from the environment of MPI or SLURM, else the world has one process and opens no port.

    backend: None for the accelerator's (nccl, ...) or gloo. timeout: the watchdog's limit (a timedelta or seconds;
    default DEEPSPEED_TIMEOUT minutes, or 600 s). distributed_port: where MASTER_PORT is not set.

    Raises: CommError where the environment contradicts itself or the port is taken; CommArgumentError.
    """
    if is_initialized():
        if timeout is not None:
            set_watchdog(timeout)
        return
    set_watchdog(timeout if timeout is not None else seconds_from_environment())
    if not dist.is_initialized():
        launch = discover(rank, world_size, distributed_port, mpi=auto_mpi_discovery, explicit=init_method is not None)
        _init_torch(backend or device.communication_backend(), init_method, launch)
    _world.initialized = True
    if _world.pid != os.getpid():
        _world.pid = os.getpid()
        atexit.register(_leave)
    if dist.get_world_size() > 1:
        communicator()  # every rank is here now: the world can connect at once, and later calls are watched


def _init_torch(backend: str, init_method: str | None, launch: Launch) -> None:
    limit = timedelta(seconds=_world.watchdog.seconds + _MARGIN_SECONDS)
    if launch.world_size == 1 and init_method is None:
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but missing in torch's export list
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
        return
    if init_method is None:
        os.environ.update(launch.variables())
    try:
        dist.init_process_group(
            backend, init_method=init_method, rank=launch.rank, world_size=launch.world_size, timeout=limit
        )
    except RuntimeError as error:
        text = str(error)
        if "EADDRINUSE" in text or "ddress already in use" in text:
            where = init_method or f"port {launch.master_port} on {launch.master_addr}"
            raise CommError(
                f"{where} is taken by another process, so rank {launch.rank} cannot open the world's store there. "
                "Choose a free one with MASTER_PORT, init_distributed(distributed_port=...) or the launcher's "
                "--master_port; a run that ended badly may still hold it"
            ) from error
        raise


def set_watchdog(limit: timedelta | float) -> None:
    """Longest wait (a timedelta or seconds) for a rank that is alive and silent; for all groups, from now on."""
    seconds = limit.total_seconds() if isinstance(limit, timedelta) else float(limit)
    if seconds <= 0:
        raise CommArgumentError(f"watchdog limit {seconds} s: expected a positive number of seconds")
    _world.watchdog.seconds = seconds


def communicator(group: dist.ProcessGroup | None = None) -> Communicator:
    """The communicator of a group (None: the world). Its first call on a group is collective over the group."""
    if not dist.is_initialized():
        raise CommError("there is no process group yet; call ds_comm.init_distributed() first")
    key = resolve(group)
    found = _world.communicators.get(key)
    if found is None:
        instance = _world.instances.get(key, 0)
        _world.instances[key] = instance + 1
        found = _world.communicators[key] = connect(key, instance, _world.watchdog)
    return found


def resolve(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group itself, or the world's for None; CommArgumentError where this process is no member."""
    world = dist.group.WORLD
    if group is None:
        if world is None:
            raise CommError("there is no process group yet; call ds_comm.init_distributed() first")
        return world
    if not is_member(group):
        raise CommArgumentError("this rank is not a member of the given group")
    return group


def is_member(group: dist.ProcessGroup | None) -> bool:
    """Whether this process is in the group (torch's new_group gives those who are not an int)."""
    return not isinstance(group, int)


def destroy_process_group(group: dist.ProcessGroup | None = None) -> None:
    """Leave a group, or with None the whole world and every group. Local; peers that still wait raise."""
    if not dist.is_initialized():
        _forget()
        return
    if group is None or group is dist.group.WORLD:
        _forget()
        dist.destroy_process_group()
        return
    if is_member(group):
        found = _world.communicators.pop(group, None)
        if found is not None:
            found.close()
        dist.destroy_process_group(group)


def _forget() -> None:
    communicators, _world.communicators = _world.communicators, {}
    _world.instances.clear()
    _world.initialized = False
    for found in communicators.values():
        found.close()


def _leave() -> None:
    """At the interpreter's end: tell the peers. The process group is left to torch, which knows what may block.

    A forked child (a data loader's worker) ends without a word: the rank it came from is still there.
    """
    if os.getpid() == _world.pid:
        _forget()
