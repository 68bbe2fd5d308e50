"""A channel: bytes to and from one peer, written and read in place where the ranks share memory.

What pipelines need and `isend`/`irecv` do not give: the sender builds its message where the receiver will read it, and
the receiver's tensor may be that very memory, lent until its storage is dead. On other transports both ends have
memory of their own and torch.distributed carries the bytes.

Invariant: packets of one channel arrive in the order of their sends; channels of different tags do not disturb each
other. Both ends agree on each packet's size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.ledger import Entry, Ledger
from ds_comm.transport.base import Packet, Receipt, TorchWork, Transport, Work


class Channel:
    """One end of a channel, made by ``Communicator.channel``; ``peer`` is a group rank."""

    def __init__(
        self,
        transport: Transport,
        group: dist.ProcessGroup,
        ledger: Ledger,
        peer: int,
        tag: int,
        label: str | None,
        device: torch.device,
    ) -> None:
        self.peer, self.tag, self.label, self.device = peer, tag, label, device
        self._transport = transport
        self._group = group
        self._ledger = ledger
        self._sent: Entry | None = None
        self._received: Entry | None = None
        self._messages = transport.messages if device.type == "cpu" and peer != group.rank() else None

    def packet(self, nbytes: int) -> Packet:
        """A message to be: write all of its ``data`` (uint8 [nbytes]), then ``send()`` it, once."""
        entry = self._sent = self._count(self._sent, "send", nbytes)
        if self._messages is not None:
            return self._messages.packet(nbytes, self.peer, self.tag, entry)
        return _TorchPacket(torch.empty(nbytes, dtype=torch.uint8, device=self.device), self, entry)

    def receive(self, nbytes: int) -> Receipt:
        """Start receiving the peer's next packet; after ``wait()`` it is ``data`` (uint8 [nbytes])."""
        entry = self._received = self._count(self._received, "recv", nbytes)
        if self._messages is not None:
            return self._messages.receive(nbytes, self.peer, self.tag, entry)
        data = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        work = dist.irecv(data, group=self._group, tag=self.tag, group_src=self.peer)
        return _TorchReceipt(data, self._watched(work, entry))

    def send(self, data: Tensor, entry: Entry) -> Work:
        """Let torch.distributed carry a packet's bytes."""
        return self._watched(dist.isend(data, group=self._group, tag=self.tag, group_dst=self.peer), entry)

    def _count(self, last: Entry | None, op: str, nbytes: int) -> Entry:
        """Count a packet; mostly it is like the one before."""
        if last is None or last.numel != nbytes:
            return self._ledger.add(op, torch.uint8, nbytes, self.label)
        last.count += 1
        return last

    def _watched(self, work: dist.Work | None, entry: Entry) -> Work:
        return TorchWork([work] if work is not None else [], entry=entry, block=self._transport.block_message)


class _TorchPacket(Packet):
    lasting = False

    def __init__(self, data: Tensor, channel: Channel, entry: Entry) -> None:
        self.data = data
        self._channel = channel
        self._entry = entry

    def send(self) -> Work:
        return self._channel.send(self.data, self._entry)


class _TorchReceipt(Receipt):
    def __init__(self, data: Tensor, work: Work) -> None:
        self.data = data
        self._work = work

    def wait(self) -> None:
        self._work.wait()
        self.finished = True

    def is_completed(self) -> bool:
        return self._work.is_completed()
