"""A communicator: a process group bound to its transport.

What it owns: the ledger of the group, the numbering of its collectives (stamps), its windows' way of moving data.
A call is *entered* first: counted in the ledger and stamped; then the transport moves the data if it serves the tensor
(CPU tensors on shm and gloo), else torch.distributed does.

Invariants
  - Making a communicator is collective over the group, once; ``ds_comm.communicator`` keeps it.
  - The kind is the same on every rank: ``local`` one rank; ``shm`` all on one host over gloo; ``gloo`` over several
    hosts; ``torch`` every other backend. ``DS_COMM_TRANSPORT`` forces one of shm, gloo, torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.channel import Channel
from ds_comm.errors import CommArgumentError, CommError, DivergenceError
from ds_comm.ledger import Entry, Ledger
from ds_comm.transport._reduce import can_reduce, red_op
from ds_comm.transport.base import DONE, GatherWindow, ReduceWindow, Transport, Work
from ds_comm.transport.torch_ import all_gather_single, reduce_scatter_single

ReduceOp = dist.ReduceOp
_SUM = dist.ReduceOp.SUM


class Communicator:
    """Collectives, windows and ledger of one group. Ranks are group ranks."""

    def __init__(self, group: dist.ProcessGroup, global_ranks: Sequence[int]) -> None:
        self.group = group
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.global_ranks = tuple(global_ranks)
        self.ledger = Ledger(self.size)
        self._transport: Transport | None = None

    def bind(self, transport: Transport) -> None:
        """Give the communicator its transport (done once, by ``ds_comm.communicator``)."""
        self._transport = transport

    @property
    def transport(self) -> Transport:
        if self._transport is None:
            raise CommError("this communicator is closed; get the group's new one with ds_comm.communicator(group)")
        return self._transport

    @property
    def kind(self) -> str:
        """``local``, ``shm``, ``gloo`` or ``torch``."""
        return self.transport.kind

    def __repr__(self) -> str:
        kind = self._transport.kind if self._transport is not None else "closed"
        return f"Communicator(kind={kind!r}, rank={self.rank}, size={self.size})"

    def enter(self, op: str, dtype: torch.dtype | None, numel: int, label: str | None) -> Entry:
        """Count and stamp a call. numel: of the whole message; 0 where it rightly differs between ranks."""
        entry = self.ledger.add(op, dtype, numel, label)
        self.transport.post(entry.stamp)
        return entry

    # ---- collectives

    def all_reduce(
        self,
        tensor: Tensor,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType = _SUM,
        *,
        label: str | None = None,
        async_op: bool = False,
    ) -> Work | None:
        """In place. Floating CPU tensors are added in rank order with fp32 accumulation."""
        entry = self.enter(_named("all_reduce", op), tensor.dtype, tensor.numel(), label)
        if self.serves(tensor, reduces=True):
            return self._flat(entry, tensor, lambda flat: self.transport.all_reduce(flat, red_op(op), entry), async_op)
        return self.delegate(entry, lambda **kw: dist.all_reduce(tensor, op, group=self.group, **kw), async_op)

    def broadcast(self, tensor: Tensor, src: int, *, label: str | None = None, async_op: bool = False) -> Work | None:
        """In place, from group rank ``src``."""
        self._check_rank(src, "broadcast")
        entry = self.enter("broadcast", tensor.dtype, tensor.numel(), label)
        if self.serves(tensor):
            return self._flat(entry, tensor, lambda flat: self.transport.broadcast(flat, src, entry), async_op)
        group = self.group
        return self.delegate(entry, lambda **kw: dist.broadcast(tensor, group_src=src, group=group, **kw), async_op)

    def all_gather_into(
        self, out: Tensor, inp: Tensor, *, label: str | None = None, async_op: bool = False
    ) -> Work | None:
        """out: ``size`` times the elements of inp, in rank order."""
        self._check_sizes("all_gather", out, inp, out.numel(), inp.numel() * self.size)
        entry = self.enter("all_gather", out.dtype, out.numel(), label)
        if self.serves(inp):
            source = inp.detach().contiguous().view(-1)
            return self._flat(entry, out, lambda flat: self.transport.all_gather(flat, source, entry), async_op)
        return self.delegate(entry, lambda **kw: all_gather_single(out, inp, group=self.group, **kw), async_op)

    def reduce_scatter_into(
        self,
        out: Tensor,
        inp: Tensor,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType = _SUM,
        *,
        label: str | None = None,
        async_op: bool = False,
    ) -> Work | None:
        """inp: ``size`` times the elements of out, which becomes the reduction of this rank's part of every inp."""
        self._check_sizes("reduce_scatter", out, inp, inp.numel(), out.numel() * self.size)
        entry = self.enter(_named("reduce_scatter", op), inp.dtype, inp.numel(), label)
        if self.serves(inp, reduces=True):
            source = inp.detach().contiguous().view(-1)
            kind = red_op(op)
            return self._flat(
                entry, out, lambda flat: self.transport.reduce_scatter(flat, source, kind, entry), async_op
            )
        return self.delegate(entry, lambda **kw: reduce_scatter_single(out, inp, op, group=self.group, **kw), async_op)

    def all_to_all_into(
        self,
        out: Tensor,
        inp: Tensor,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
        *,
        label: str | None = None,
        async_op: bool = False,
    ) -> Work | None:
        """Splits count rows of dimension 0; None splits evenly."""
        even = out_splits is None and in_splits is None
        entry = self.enter("all_to_all", inp.dtype, inp.numel() if even else 0, label)
        if self.serves(inp):
            outs, ins = self._splits(out, out_splits), self._splits(inp, in_splits)
            source = inp.detach().contiguous().view(-1)
            return self._flat(
                entry, out, lambda flat: self.transport.all_to_all(flat, source, outs, ins, entry), async_op
            )
        given_out, given_in = (list(s) if s is not None else None for s in (out_splits, in_splits))
        return self.delegate(
            entry, lambda **kw: dist.all_to_all_single(out, inp, given_out, given_in, group=self.group, **kw), async_op
        )

    def barrier(self, *, label: str | None = None, limit: float | None = None) -> None:
        """Return when every rank has come here. limit: seconds instead of the watchdog's."""
        entry = self.enter("barrier", None, 0, label)
        with self.ledger.timed(entry):
            self.transport.meet(entry, limit)

    def agree(self, value: str, *, label: str | None = None) -> None:
        """Raise DivergenceError on every rank unless all ranks give the same value."""
        entry = self.enter("agree", None, 0, label)
        replies = self.transport.exchange(hashlib.sha256(value.encode()).digest() + value[:200].encode(), entry)
        if len({reply[:32] for reply in replies}) > 1:
            texts = [reply[32:].decode(errors="replace") for reply in replies]
            values = "; ".join(f"rank {rank}: {text!r}" for rank, text in zip(self.global_ranks, texts, strict=True))
            raise DivergenceError(f"the ranks must agree on {label or 'a value'} and do not: {values}")

    def fail(self, error: Exception) -> None:
        """Raise ``error`` here, and on every rank that waits for this group or calls it later: the group is lost."""
        self.transport.fail(error)

    def delegate(self, entry: Entry, start: Callable[..., Any], async_op: bool) -> Work | None:
        """Let torch.distributed do a collective, ``start(async_op=True)``, watched as far as the transport can."""
        work = self.transport.delegate(start, entry)
        if async_op:
            return work
        work.wait()
        return None

    # ---- messages

    def channel(
        self, peer: int, *, tag: int = 0, label: str | None = None, device: torch.device | str | None = None
    ) -> Channel:
        """This rank's end of a channel with group rank ``peer``: packets of bytes, in place where memory is shared."""
        self._check_rank(peer, "channel")
        return Channel(self.transport, self.group, self.ledger, peer, tag, label, self._device(device))

    # ---- windows

    def gather_window(
        self, numel: int, dtype: torch.dtype, *, device: torch.device | str | None = None, label: str
    ) -> GatherWindow:
        """Collective. A flat buffer of ``numel`` elements (a multiple of the group's size), one shard per rank."""
        self.transport.post(self.ledger.entry("gather_window", dtype, numel, label).stamp)
        return self.transport.gather_window(numel, dtype, self._device(device), label)

    def reduce_window(
        self, numel: int, dtype: torch.dtype, *, device: torch.device | str | None = None, label: str
    ) -> ReduceWindow:
        """Collective. A flat buffer of ``numel`` elements (a multiple of the group's size) per rank."""
        self.transport.post(self.ledger.entry("reduce_window", dtype, numel, label).stamp)
        return self.transport.reduce_window(numel, dtype, self._device(device), label)

    def close(self) -> None:
        """Give back the transport; ranks that still wait for this one are told that it has left."""
        if self._transport is not None:
            transport, self._transport = self._transport, None
            transport.close()

    # ---- checks and shapes

    def _device(self, device: torch.device | str | None) -> torch.device:
        if device is not None:
            return torch.device(device)
        return device_of(self.group) if self.kind in ("torch", "local") else torch.device("cpu")

    def serves(self, tensor: Tensor, *, reduces: bool = False) -> bool:
        """Whether this group's transport moves (or reduces) the tensor; if not, torch.distributed does."""
        return (
            tensor.layout == torch.strided
            and not tensor.is_quantized
            and self.transport.serves(tensor)
            and (not reduces or can_reduce(tensor.dtype) or self.size == 1)
        )

    def _flat(self, entry: Entry, tensor: Tensor, run: Callable[[Tensor], None], async_op: bool) -> Work | None:
        """Run a transport's collective on the flat form of ``tensor``; copy back where that is other memory."""
        target = tensor.detach()
        flat = target.contiguous()
        with self.ledger.timed(entry):
            run(flat.view(-1))
            if flat.data_ptr() != target.data_ptr():
                target.copy_(flat)
        return DONE if async_op else None

    def _splits(self, tensor: Tensor, splits: Sequence[int] | None) -> list[int]:
        """Elements per rank."""
        rows = tensor.shape[0] if tensor.dim() else 1
        per_row = tensor.numel() // rows if rows else 0
        if splits is None:
            if rows % self.size:
                raise CommArgumentError(f"all_to_all: {rows} rows do not split evenly over {self.size} ranks")
            return [rows // self.size * per_row] * self.size
        if len(splits) != self.size or sum(splits) != rows:
            raise CommArgumentError(
                f"all_to_all: splits {list(splits)} must be {self.size} numbers that add up to {rows} rows"
            )
        return [split * per_row for split in splits]

    def _check_sizes(self, op: str, out: Tensor, inp: Tensor, larger: int, expected: int) -> None:
        if larger != expected or out.dtype != inp.dtype:
            raise CommArgumentError(
                f"{op} over {self.size} ranks: out has {out.numel()} elements of {out.dtype}, input {inp.numel()} of "
                f"{inp.dtype}; the larger must be {self.size} times the smaller, with the same dtype"
            )

    def _check_rank(self, rank: int, op: str) -> None:
        if not 0 <= rank < self.size:
            raise CommArgumentError(f"{op}: group rank {rank} does not exist in a group of {self.size}")


def device_of(group: dist.ProcessGroup) -> torch.device:
    """The current accelerator where the group's backend moves its tensors, else the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    current = torch.accelerator.current_accelerator()
    if current is None or f"{current.type}:" not in str(dist.get_backend_config(group)):
        return torch.device("cpu")
    return torch.device(current.type, torch.accelerator.current_device_index())


def _named(op: str, red: dist.ReduceOp | dist.ReduceOp.RedOpType) -> str:
    """The ledger's name of a reduction: plain for SUM, with the kind otherwise."""
    kind = red_op(red)
    return op if kind == dist.ReduceOp.SUM else f"{op}.{kind.name.lower()}"
