"""From a process group to a communicator: who is where, which transport, and the first shared memory.

The only traffic is through the group's key-value store: every rank posts who it is (host, process, wishes), reads the
others' posts, and all come to the same decision. Polling with a limit, never a blocking read: a rank that does not come
is named.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

from ds_comm.communicator import Communicator
from ds_comm.errors import CommArgumentError, CommError, RankMissingError
from ds_comm.log import get_logger
from ds_comm.transport._control import ROW_NBYTES, Control, Members
from ds_comm.transport._messages import Messages, area_nbytes, message_limit, plan_capacity
from ds_comm.transport._observer import Observer, Ranks
from ds_comm.transport._segment import Arena, Segment, shared_limit
from ds_comm.transport.base import Transport
from ds_comm.transport.gloo import GlooTransport
from ds_comm.transport.local import LocalTransport
from ds_comm.transport.shm import ShmTransport
from ds_comm.transport.torch_ import TorchTransport
from ds_comm.watchdog import Patience, Watchdog

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_FORCED = "DS_COMM_TRANSPORT"
_KINDS = ("shm", "gloo", "torch")

_logger = get_logger(__name__)


@dataclass(frozen=True)
class _Identity:
    """Who a rank is: ``host`` is equal exactly where processes can reach each other's memory and ids."""

    host: str
    pid: int
    forced: str | None


def _host() -> str:
    """Host, boot and process namespace: ranks with the same value see each other under the same process ids."""
    parts = [socket.gethostname()]
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            parts.append(file.read().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        parts.append(f"process {os.getpid()}")  # without /proc nothing can be shared: be a host of one's own
    return "/".join([*parts, str(os.getuid())])


class _Meeting:
    """Exchanges through the store before there is a transport."""

    def __init__(self, store: Store, prefix: str, comm: Communicator, watchdog: Watchdog) -> None:
        self.store, self.prefix = store, prefix
        self._comm, self._watchdog = comm, watchdog

    def exchange(self, name: str, payload: bytes) -> list[bytes]:
        """Every rank's payload, in rank order; RankMissingError naming the ranks that do not post theirs."""
        keys = [f"{self.prefix}/{name}/{rank}" for rank in range(self._comm.size)]
        self.store.set(keys[self._comm.rank], payload)  # type: ignore[arg-type]  # bytes are taken too
        patience = Patience(self._watchdog, f"connecting a group of {self._comm.size} ranks ({name})")
        missing = list(range(self._comm.size))
        pause = 0.0005
        while missing := [rank for rank in missing if not self.store.check([keys[rank]])]:
            names = ", ".join(str(self._comm.global_ranks[rank]) for rank in missing)
            if patience.exhausted:
                raise RankMissingError(
                    f"{patience.what}: rank {names} did not come within {patience.limit:g} s. Every rank of the "
                    "group must make the group's first call"
                )
            patience.notice(lambda text=names: f"rank {text} is not there")  # type: ignore[misc]
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)
        return [self.store.get(key) for key in keys]


def connect(group: dist.ProcessGroup, instance: int, watchdog: Watchdog) -> Communicator:
    """Collective over the group: make its communicator. ``instance`` counts the communicators of this group so far."""
    comm = Communicator(group, dist.get_process_group_ranks(group))
    comm.bind(_choose(comm, instance, watchdog))
    return comm


def _choose(comm: Communicator, instance: int, watchdog: Watchdog) -> Transport:
    backends = str(dist.get_backend_config(comm.group))
    if "fake" in backends:
        return TorchTransport(comm.group, enter=comm.enter, observer=None, fake=True)
    if comm.size == 1:
        return LocalTransport(comm.enter)
    store = comm.group.get_group_store()
    meeting = _Meeting(store, f"ds_comm/{instance}", comm, watchdog)
    me = _Identity(_host(), os.getpid(), os.environ.get(_FORCED))
    everyone = [_Identity(**json.loads(raw)) for raw in meeting.exchange("who", json.dumps(asdict(me)).encode())]
    kind = _decide(everyone, backends)

    def observer(suffix: str) -> Observer:
        pids = tuple(i.pid if i.host == me.host else None for i in everyone)
        return Observer(store, f"{meeting.prefix}/{suffix}", comm.rank, Ranks(comm.global_ranks, pids), watchdog)

    if kind == "shm":
        shared = _share_control(meeting, comm, everyone, watchdog)
        if shared is not None:
            return ShmTransport(
                shared[0],
                messages=shared[1],
                ledger=comm.ledger,
                enter=comm.enter,
                fallback=lambda: GlooTransport(comm.group, enter=comm.enter, observer=observer("fallback")),
            )
        kind = "gloo"
    make = GlooTransport if kind == "gloo" else TorchTransport
    return make(comm.group, enter=comm.enter, observer=observer("stamps"))


def _decide(everyone: list[_Identity], backends: str) -> str:
    forced = {identity.forced for identity in everyone}
    if len(forced) > 1:
        raise CommArgumentError(f"{_FORCED} differs between ranks: {sorted(map(str, forced))}; set it alike everywhere")
    wish = everyone[0].forced
    if wish is not None and wish not in _KINDS:
        raise CommArgumentError(f"{_FORCED}={wish!r}: expected one of {', '.join(_KINDS)}")
    one_host = len({identity.host for identity in everyone}) == 1
    if wish == "shm" and not one_host:
        hosts = sorted({identity.host.split("/")[0] for identity in everyone})
        raise CommError(f"{_FORCED}=shm, but the ranks are on several hosts or in several containers: {hosts}")
    if wish is not None:
        return wish
    on_device = any(name in backends for name in ("nccl", "xccl", "hccl", "ucc", "mpi"))
    if on_device or "cpu:gloo" not in backends:
        return "torch"
    return "shm" if one_host else "gloo"


def _share_control(
    meeting: _Meeting, comm: Communicator, everyone: list[_Identity], watchdog: Watchdog
) -> tuple[Control, Messages | None] | None:
    """The group's control block and messages in shared memory, or None (on every rank) where there is none to be had.

    Both lie in one segment: the directions between all pairs of ranks cost address space only, until they are used.
    """
    limit = message_limit()  # on every rank, though rank 0 alone plans: a mistake is told by all
    nbytes = comm.size * ROW_NBYTES
    fd, offer = -1, b""
    if comm.rank == 0:
        try:
            capacity = plan_capacity(comm.size, limit, shared_limit())
            fd, path = Arena().create(nbytes, sparse_nbytes=area_nbytes(comm.size, capacity))
            offer = f"+{capacity}:{path}".encode()
        except OSError as error:
            offer = b"-" + str(error).encode()
    answer = meeting.exchange("control", offer)[0].decode()
    segment, problem = None, answer[1:] if answer.startswith("-") else ""
    if not problem:
        size, _, path = answer[1:].partition(":")
        capacity = int(size)
        total = nbytes + area_nbytes(comm.size, capacity)
        own = (comm.rank * ROW_NBYTES, (comm.rank + 1) * ROW_NBYTES)
        segment, problem = _try(lambda: Segment(path, total, own, growing=capacity > 0))
        problems = meeting.exchange("mapped", problem.encode())
        problem = next((text.decode(errors="replace") for text in problems if text), "")
    if fd >= 0:
        os.close(fd)
    if problem or segment is None:
        if comm.rank == 0:
            _logger.warning("a group of %d ranks uses gloo instead of shared memory: %s", comm.size, problem)
        return None
    members = Members(comm.global_ranks, tuple(identity.pid for identity in everyone))
    control = Control(segment, comm.rank, members, watchdog)
    return control, Messages(control, segment, nbytes, capacity) if capacity else None


def _try(make: Callable[[], Segment]) -> tuple[Segment | None, str]:
    try:
        return make(), ""
    except (OSError, RuntimeError) as error:
        return None, str(error)
