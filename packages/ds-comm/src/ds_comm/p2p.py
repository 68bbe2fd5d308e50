"""Messages between two ranks, counted in the group's ledger: through shared memory on shm, else torch.distributed's.

They carry no stamp (only two ranks take part); while this rank waits for one, a death or a failure that another rank
reports ends the wait where the transport is watched (shm, gloo). On shm, ``isend`` never waits (256 MB to each rank may
be under way, what is beyond moves at this rank's later calls), receives may be posted early, and ends that differ in
size or dtype raise on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ds_comm._world import communicator
from ds_comm.communicator import Communicator
from ds_comm.ledger import Entry
from ds_comm.transport.base import Messenger, TorchWork, Work

Group = dist.ProcessGroup | None


def send(
    tensor: Tensor,
    dst: int | None = None,
    group: Group = None,
    tag: int = 0,
    group_dst: int | None = None,
    *,
    label: str | None = None,
) -> None:
    """Send to global rank ``dst`` (or group rank ``group_dst``); returns when the tensor may be written again."""
    isend(tensor, dst, group, tag, group_dst, label=label).wait()


def recv(
    tensor: Tensor,
    src: int | None = None,
    group: Group = None,
    tag: int = 0,
    group_src: int | None = None,
    *,
    label: str | None = None,
) -> int:
    """Receive from global rank ``src``, or None for whoever sends first; returns the sender's global rank."""
    if src is None and group_src is None:
        comm = communicator(group)
        messages = _messages(comm, tensor)
        if messages is not None:
            entry = comm.ledger.add("recv", tensor.dtype, tensor.numel(), label)
            found = messages.probe(tag, entry)
            messages.irecv(tensor, found, tag, entry).wait()
            return comm.global_ranks[found]
        comm.ledger.add("recv", tensor.dtype, tensor.numel(), label)
        return int(dist.recv(tensor, None, comm.group, tag))
    irecv(tensor, src, group, tag, group_src, label=label).wait()
    if src is not None:
        return src
    assert group_src is not None
    return communicator(group).global_ranks[group_src]


def isend(
    tensor: Tensor,
    dst: int | None = None,
    group: Group = None,
    tag: int = 0,
    group_dst: int | None = None,
    *,
    label: str | None = None,
) -> Work:
    """As ``send``; the tensor must stay as it is until the Work's ``wait``."""
    comm = communicator(group)
    entry = comm.ledger.add("send", tensor.dtype, tensor.numel(), label)
    messages, peer = _messages(comm, tensor), _group_rank(comm, dst, group_dst)
    if messages is not None and peer is not None:
        return messages.isend(tensor, peer, tag, entry)
    return _torch_work(comm, dist.isend(tensor, dst, comm.group, tag, group_dst), entry)


def irecv(
    tensor: Tensor,
    src: int | None = None,
    group: Group = None,
    tag: int = 0,
    group_src: int | None = None,
    *,
    label: str | None = None,
) -> Work:
    """As ``recv``; the tensor is valid after the Work's ``wait``."""
    comm = communicator(group)
    entry = comm.ledger.add("recv", tensor.dtype, tensor.numel(), label)
    messages, peer = _messages(comm, tensor), _group_rank(comm, src, group_src)
    if messages is not None and peer is not None:
        return messages.irecv(tensor, peer, tag, entry)
    return _torch_work(comm, dist.irecv(tensor, src, comm.group, tag, group_src), entry)


def P2POp(
    op: Callable[..., Any], tensor: Tensor, peer: int | None = None, group: Group = None, tag: int = 0
) -> dist.P2POp:
    """One message of a batch: op is ``isend`` or ``irecv`` (of this module or of torch.distributed)."""
    known: dict[Callable[..., Any], Callable[..., Any]] = {isend: dist.isend, irecv: dist.irecv}
    return dist.P2POp(known.get(op, op), tensor, peer, group, tag)


def batch_isend_irecv(p2p_op_list: list[dist.P2POp], *, label: str | None = None) -> list[Work]:
    """Start all messages of a batch; wait for every Work returned."""
    if not p2p_op_list:
        return []
    comm = communicator(p2p_op_list[0].group)
    if all(_messages(comm, op.tensor) is not None for op in p2p_op_list):
        calls = {dist.isend: isend, dist.irecv: irecv}
        return [calls[op.op](op.tensor, None, op.group, op.tag, op.group_peer, label=label) for op in p2p_op_list]
    entries = [
        comm.ledger.add("send" if op.op is dist.isend else "recv", op.tensor.dtype, op.tensor.numel(), label)
        for op in p2p_op_list
    ]
    return [_torch_work(comm, work, entries[0]) for work in dist.batch_isend_irecv(p2p_op_list)]


def _messages(comm: Communicator, tensor: Tensor) -> Messenger | None:
    """Who carries a message with this tensor, if not torch.distributed."""
    messages = comm.transport.messages
    return messages if messages is not None and comm.serves(tensor) else None


def _group_rank(comm: Communicator, rank: int | None, group_rank: int | None) -> int | None:
    """The peer's rank in the group; None where torch.distributed has to say what is wrong with it."""
    if group_rank is None and rank in comm.global_ranks:
        group_rank = comm.global_ranks.index(rank)
    elif rank is not None:
        return None
    return group_rank if group_rank is not None and 0 <= group_rank < comm.size and group_rank != comm.rank else None


def _torch_work(comm: Communicator, work: dist.Work | None, entry: Entry) -> Work:
    return TorchWork([work] if work is not None else [], entry=entry, block=comm.transport.block_message)
