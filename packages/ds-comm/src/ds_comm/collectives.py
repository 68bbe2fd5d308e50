"""Collectives with the names and signatures of torch.distributed, on the group's communicator.

Every function takes torch's arguments plus ``label``, the name that the ledger and the errors show. ``group=None`` is
the world; ranks given as src, dst or peer are global, as in torch. With ``async_op`` a ``Work`` comes back (``wait``,
``is_completed``), else None. A rank outside the group returns at once. CPU tensors go over the group's own transport
(shm or gloo by all_to_all, reduced in rank order); what that does not serve goes to torch.distributed, counted and
stamped alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm._world import communicator, is_member
from ds_comm.communicator import Communicator
from ds_comm.errors import CommArgumentError
from ds_comm.transport.base import DONE, Work

Group = dist.ProcessGroup | None
Op = dist.ReduceOp | dist.ReduceOp.RedOpType
ReduceOp = dist.ReduceOp
_SUM = dist.ReduceOp.SUM


def all_reduce(
    tensor: Tensor, op: Op = _SUM, group: Group = None, async_op: bool = False, *, label: str | None = None
) -> Work | None:
    """Reduce over the ranks, in place, on every rank."""
    if not is_member(group):
        return None
    return communicator(group).all_reduce(tensor, op, label=label, async_op=async_op)


def all_gather_into_tensor(
    output_tensor: Tensor,
    input_tensor: Tensor,
    group: Group = None,
    async_op: bool = False,
    *,
    label: str | None = None,
) -> Work | None:
    """output: the ranks' inputs one after the other (concatenated or stacked)."""
    if not is_member(group):
        return None
    return communicator(group).all_gather_into(output_tensor, input_tensor, label=label, async_op=async_op)


def reduce_scatter_tensor(
    output: Tensor,
    input: Tensor,
    op: Op = _SUM,
    group: Group = None,
    async_op: bool = False,
    *,
    label: str | None = None,
) -> Work | None:
    """output: this rank's part of the reduction of all ranks' inputs."""
    if not is_member(group):
        return None
    return communicator(group).reduce_scatter_into(output, input, op, label=label, async_op=async_op)


def all_to_all_single(
    output: Tensor,
    input: Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: Group = None,
    async_op: bool = False,
    *,
    label: str | None = None,
) -> Work | None:
    """Send part i of input's rows to rank i; output collects what the ranks sent here, in rank order."""
    if not is_member(group):
        return None
    return communicator(group).all_to_all_into(
        output, input, output_split_sizes, input_split_sizes, label=label, async_op=async_op
    )


def broadcast(
    tensor: Tensor,
    src: int | None = None,
    group: Group = None,
    async_op: bool = False,
    group_src: int | None = None,
    *,
    label: str | None = None,
) -> Work | None:
    """Copy the tensor of global rank ``src`` (or group rank ``group_src``) to every rank."""
    if not is_member(group):
        return None
    comm = communicator(group)
    return comm.broadcast(tensor, _group_rank(comm, src, group_src, "broadcast"), label=label, async_op=async_op)


def all_gather(
    tensor_list: list[Tensor], tensor: Tensor, group: Group = None, async_op: bool = False, *, label: str | None = None
) -> Work | None:
    """tensor_list: one tensor per rank, all shaped like the input."""
    if not is_member(group):
        return None
    comm = communicator(group)
    _check_count(tensor_list, comm, "all_gather", "tensor_list")
    if any(t.numel() != tensor.numel() or t.dtype != tensor.dtype for t in tensor_list):
        raise CommArgumentError("all_gather: every tensor of tensor_list must have the shape and dtype of the input")
    gathered = torch.empty(comm.size * tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    work = comm.all_gather_into(gathered, tensor.detach().reshape(-1), label=label, async_op=True)
    return _then(work, lambda: _copy_parts(tensor_list, gathered), async_op)


def reduce_scatter(
    output: Tensor,
    input_list: list[Tensor],
    op: Op = _SUM,
    group: Group = None,
    async_op: bool = False,
    *,
    label: str | None = None,
) -> Work | None:
    """output: the reduction of every rank's ``input_list[this rank]``; all of one shape."""
    if not is_member(group):
        return None
    comm = communicator(group)
    _check_count(input_list, comm, "reduce_scatter", "input_list")
    flat = torch.cat([part.detach().reshape(-1) for part in input_list])
    return comm.reduce_scatter_into(output, flat, op, label=label, async_op=async_op)


def all_to_all(
    output_tensor_list: list[Tensor],
    input_tensor_list: list[Tensor],
    group: Group = None,
    async_op: bool = False,
    *,
    label: str | None = None,
) -> Work | None:
    """Send tensor i to rank i, of whatever size; output i comes from rank i."""
    if not is_member(group):
        return None
    comm = communicator(group)
    _check_count(output_tensor_list, comm, "all_to_all", "output_tensor_list")
    _check_count(input_tensor_list, comm, "all_to_all", "input_tensor_list")
    out_splits = [t.numel() for t in output_tensor_list]
    flat = torch.cat([t.detach().reshape(-1) for t in input_tensor_list])
    out = torch.empty(sum(out_splits), dtype=flat.dtype, device=flat.device)
    in_splits = [t.numel() for t in input_tensor_list]
    work = comm.all_to_all_into(out, flat, out_splits, in_splits, label=label, async_op=True)
    return _then(work, lambda: _copy_parts(output_tensor_list, out), async_op)


def reduce(
    tensor: Tensor,
    dst: int | None = None,
    op: Op = _SUM,
    group: Group = None,
    async_op: bool = False,
    group_dst: int | None = None,
    *,
    label: str | None = None,
) -> Work | None:
    """Reduce over the ranks into the tensor of global rank ``dst``; the other ranks' tensors keep their content."""
    if not is_member(group):
        return None
    comm = communicator(group)
    target = _group_rank(comm, dst, group_dst, "reduce")
    result = tensor if comm.rank == target else tensor.detach().clone()
    return comm.all_reduce(result, op, label=label, async_op=async_op)


def gather(
    tensor: Tensor,
    gather_list: list[Tensor] | None = None,
    dst: int | None = None,
    group: Group = None,
    async_op: bool = False,
    group_dst: int | None = None,
    *,
    label: str | None = None,
) -> Work | None:
    """gather_list, on global rank ``dst`` only: one tensor per rank."""
    if not is_member(group):
        return None
    comm = communicator(group)
    target = _group_rank(comm, 0 if dst is None and group_dst is None else dst, group_dst, "gather")
    if comm.rank == target:
        _check_count(gather_list or [], comm, "gather", "gather_list")
    entry = comm.enter("gather", tensor.dtype, tensor.numel() * comm.size, label)
    if not comm.serves(tensor):
        return comm.delegate(
            entry, lambda **kw: dist.gather(tensor, gather_list, group_dst=target, group=comm.group, **kw), async_op
        )
    source = tensor.detach().contiguous().view(-1)
    here = source.numel() if comm.rank == target else 0
    out = source.new_empty(here * comm.size)
    in_splits = [source.numel() if rank == target else 0 for rank in range(comm.size)]
    with entry.timed():
        comm.transport.all_to_all(out, source, [here] * comm.size, in_splits, entry)
    _copy_parts(gather_list if gather_list and comm.rank == target else [], out)
    return DONE if async_op else None


def scatter(
    tensor: Tensor,
    scatter_list: list[Tensor] | None = None,
    src: int | None = None,
    group: Group = None,
    async_op: bool = False,
    group_src: int | None = None,
    *,
    label: str | None = None,
) -> Work | None:
    """tensor becomes this rank's part of the ``scatter_list`` of global rank ``src``."""
    if not is_member(group):
        return None
    comm = communicator(group)
    source = _group_rank(comm, 0 if src is None and group_src is None else src, group_src, "scatter")
    if comm.rank == source:
        _check_count(scatter_list or [], comm, "scatter", "scatter_list")
    entry = comm.enter("scatter", tensor.dtype, tensor.numel() * comm.size, label)
    if not comm.serves(tensor):
        return comm.delegate(
            entry, lambda **kw: dist.scatter(tensor, scatter_list, group_src=source, group=comm.group, **kw), async_op
        )
    parts = [part.detach().reshape(-1) for part in (scatter_list or [] if comm.rank == source else [])]
    inp = torch.cat(parts) if parts else tensor.new_empty(0)
    out = torch.empty(tensor.numel(), dtype=tensor.dtype)
    in_splits = [part.numel() for part in parts] or [0] * comm.size
    out_splits = [tensor.numel() if rank == source else 0 for rank in range(comm.size)]
    with entry.timed():
        comm.transport.all_to_all(out, inp, out_splits, in_splits, entry)
    tensor.detach().copy_(out.view(tensor.shape))
    return DONE if async_op else None


def all_reduce_coalesced(
    tensors: list[Tensor], op: Op = _SUM, group: Group = None, async_op: bool = False, *, label: str | None = None
) -> Work | None:
    """Reduce several tensors of one dtype as one message, in place."""
    if not is_member(group) or not tensors:
        return DONE if async_op and is_member(group) else None
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise CommArgumentError("all_reduce_coalesced: the tensors must have one dtype; call it once per dtype")
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    work = communicator(group).all_reduce(flat, op, label=label, async_op=True)
    return _then(work, lambda: _copy_parts(tensors, flat), async_op)


def all_gather_coalesced(
    output_tensors: list[Tensor],
    input_tensors: list[Tensor],
    group: Group = None,
    async_op: bool = False,
    *,
    label: str | None = None,
) -> Work | None:
    """``all_gather_into_tensor`` of several pairs."""
    if not is_member(group):
        return None
    comm = communicator(group)
    if len(output_tensors) != len(input_tensors):
        raise CommArgumentError(f"all_gather_coalesced: {len(output_tensors)} outputs for {len(input_tensors)} inputs")
    works = [
        comm.all_gather_into(out, inp, label=label, async_op=True)
        for out, inp in zip(output_tensors, input_tensors, strict=True)
    ]
    return _then(_Several([work for work in works if work is not None]), lambda: None, async_op)


def barrier(
    group: Group = None,
    async_op: bool = False,
    device_ids: list[int] | None = None,
    *,
    label: str | None = None,
) -> Work | None:
    """Return when every rank has come here. ``device_ids`` is accepted for torch's signature."""
    if is_member(group):
        communicator(group).barrier(label=label)
    return DONE if async_op else None


def monitored_barrier(
    group: Group = None,
    timeout: timedelta | None = None,
    wait_all_ranks: bool = False,
    *,
    label: str | None = None,
) -> None:
    """A barrier with a limit of its own; its error always names every missing rank (``wait_all_ranks`` or not)."""
    if is_member(group):
        communicator(group).barrier(label=label, limit=None if timeout is None else timeout.total_seconds())


def all_gather_object(object_list: list[Any], obj: Any, group: Group = None, *, label: str | None = None) -> None:
    """object_list: one picklable object per rank. Unpickles what the ranks sent: for trusted ranks only."""
    if not is_member(group):
        return
    comm = communicator(group)
    entry = comm.enter("all_gather_object", None, 0, label)
    with entry.timed():
        comm.transport.guard(lambda: dist.all_gather_object(object_list, obj, group=comm.group), entry)


def broadcast_object_list(
    object_list: list[Any],
    src: int | None = None,
    group: Group = None,
    device: torch.device | None = None,
    group_src: int | None = None,
    *,
    label: str | None = None,
) -> None:
    """Replace the list's picklable objects by those of global rank ``src``. Unpickles: for trusted ranks only."""
    if not is_member(group):
        return
    comm = communicator(group)
    source = _group_rank(comm, 0 if src is None and group_src is None else src, group_src, "broadcast_object_list")
    entry = comm.enter("broadcast_object_list", None, 0, label)
    with entry.timed():
        comm.transport.guard(
            lambda: dist.broadcast_object_list(object_list, group_src=source, group=comm.group, device=device), entry
        )


class _Several(Work):
    """Several works as one."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self.finished = True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


class _Then(Work):
    """A work followed, once, by a step on the caller's thread."""

    def __init__(self, work: Work, then: Callable[[], None]) -> None:
        self._work, self._then = work, then

    def wait(self) -> None:
        if not self.finished:
            self._work.wait()
            self._then()
            self.finished = True

    def is_completed(self) -> bool:
        return self._work.is_completed()


def _then(work: Work | None, then: Callable[[], None], async_op: bool) -> Work | None:
    pending = _Then(work or DONE, then)
    if async_op:
        return pending
    pending.wait()
    return None


def _copy_parts(targets: Sequence[Tensor], flat: Tensor) -> None:
    """Fill the targets, one after the other, from a flat tensor."""
    start = 0
    for target in targets:
        target.detach().copy_(flat[start : start + target.numel()].view(target.shape))
        start += target.numel()


def _check_count(tensors: Sequence[Tensor], comm: Communicator, op: str, name: str) -> None:
    if len(tensors) != comm.size:
        raise CommArgumentError(f"{op}: {name} has {len(tensors)} tensors; expected one per rank, {comm.size}")


def _group_rank(comm: Communicator, global_rank: int | None, group_rank: int | None, op: str) -> int:
    if (global_rank is None) == (group_rank is None):
        raise CommArgumentError(f"{op}: give either the global rank or the group rank")
    if group_rank is not None:
        return group_rank
    assert global_rank is not None
    if global_rank not in comm.global_ranks:
        raise CommArgumentError(f"{op}: rank {global_rank} is not in the group {list(comm.global_ranks)}")
    return comm.global_ranks.index(global_rank)
