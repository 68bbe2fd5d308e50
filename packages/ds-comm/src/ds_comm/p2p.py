"""Messages between two ranks: torch.distributed's, counted in the group's ledger.

They carry no stamp (only two ranks take part); while this rank waits for one, a death or a failure that another rank
reports ends the wait where the transport is watched (shm, gloo).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ds_comm._world import communicator, resolve
from ds_comm.transport.base import TorchWork, Work

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
    return _start("send", tensor, label, group, lambda g: dist.isend(tensor, dst, g, tag, group_dst))


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
    return _start("recv", tensor, label, group, lambda g: dist.irecv(tensor, src, g, tag, group_src))


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
    entries = [
        comm.ledger.add("send" if op.op is dist.isend else "recv", op.tensor.dtype, op.tensor.numel(), label)
        for op in p2p_op_list
    ]
    return [
        TorchWork([work], entry=entries[0], block=comm.transport.block_message)
        for work in dist.batch_isend_irecv(p2p_op_list)
    ]


def _start(
    op: str, tensor: Tensor, label: str | None, group: Group, start: Callable[[dist.ProcessGroup], dist.Work | None]
) -> Work:
    comm = communicator(group)
    entry = comm.ledger.add(op, tensor.dtype, tensor.numel(), label)
    work = start(resolve(group))
    return TorchWork([work] if work is not None else [], entry=entry, block=comm.transport.block_message)
