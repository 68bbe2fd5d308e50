"""Nested tensors from stage to stage: no pickle, and one message each once the shapes are known.

A *payload* is a tensor, or a tuple, list or dict (with str keys) of payloads; None, bool, int, float and str may stand
in it as well. Its *header* is JSON: the structure with those constants, and per tensor dtype, shape and whether it
takes a gradient. A `Sender` and a `Receiver` are the two ends of one channel: one direction between two stages, one
purpose. Per payload the channel carries

    [header length, header]   first time only; with `dynamic` always
    packet                    a status word (64 bytes), then the tensors' bytes, each at a multiple of 64

so that a payload of any number of tensors and dtypes is one message, and its receive can be posted early. Packets are
those of a `ds_comm.Channel`: between ranks of one host the sender copies the tensors into shared memory, and the
receiver's tensors are that memory, until the last of them (and the graph that saved it) is gone. A sender that finds
another header than the one announced, and a stage that fails, sends a packet of the announced size whose status says
so, then the text as a header (`fail`): both ends raise PipelineError and none waits.

Invariants. A channel's messages are sent and received in one order, and a packet stays alive until its send is done.
Received tensors share storage, but neither version counters nor gradients.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ds_comm
from ds_pipe.errors import PipelineError

__all__ = ["Incoming", "Outbox", "Receiver", "Sender"]

_ALIGNMENT = 64
_OK, _FAILED = 0, 1
_KEPT = 16
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


@dataclass(frozen=True)
class _Layout:
    """Where one tensor lies in a packet: `offset` and `nbytes` in bytes."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    requires_grad: bool
    offset: int

    def fits(self, tensor: Tensor) -> bool:
        return tensor.dtype is self.dtype and tensor.shape == self.shape and tensor.requires_grad is self.requires_grad

    def view(self, packet: Tensor) -> Tensor:
        """The tensor in the packet (uint8 [nbytes]), with a version counter of its own."""
        start = (packet.storage_offset() + self.offset) // self.dtype.itemsize
        empty = torch.empty(0, dtype=self.dtype, device=packet.device)
        return empty.set_(packet.untyped_storage(), start, self.shape, self.stride)


@dataclass(frozen=True)
class _Header:
    """Where each tensor lies in a packet of `nbytes`, and the structure around them."""

    text: str
    structure: Any
    tensors: list[_Layout]
    nbytes: int

    @classmethod
    def parse(cls, text: str) -> _Header:
        structure, described = json.loads(text)
        tensors, at = [], _ALIGNMENT
        for name, shape, grad in described:
            dtype = _DTYPES[name]
            stride = [prod(shape[i + 1 :]) for i in range(len(shape))]
            tensors.append(_Layout(dtype, torch.Size(shape), tuple(stride), grad, at))
            at += -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        return cls(text, structure, tensors, at)

    @staticmethod
    def describe(structure: Any, tensors: list[Tensor]) -> str:
        """The header of a payload."""
        described = [(str(t.dtype).removeprefix("torch."), list(t.shape), t.requires_grad) for t in tensors]
        return json.dumps([structure, described])

    def fits(self, structure: Any, tensors: list[Tensor]) -> bool:
        """Whether this is the header of such a payload."""
        return (
            structure == self.structure
            and len(tensors) == len(self.tensors)
            and all(layout.fits(tensor) for layout, tensor in zip(self.tensors, tensors, strict=True))
        )

    def shapes(self) -> str:
        return ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in self.tensors)


def flatten(payload: Any, tensors: list[Tensor]) -> Any:
    """Append the payload's tensors to `tensors`; returns its structure for JSON. PipelineError for another type."""
    if isinstance(payload, Tensor):
        tensors.append(payload)
        return {"tensor": len(tensors) - 1}
    if payload is None or isinstance(payload, bool):
        return {"constant": payload}
    if isinstance(payload, int):
        return {"int": int(payload)}
    if isinstance(payload, float):
        return {"float": float(payload).hex()}  # exact, and equal where the bits are: as JSON -0.0 == 0.0, nan != nan
    if isinstance(payload, str):
        return {"str": str(payload)}
    if isinstance(payload, tuple | list):
        kind = "tuple" if isinstance(payload, tuple) else "list"
        return {kind: [flatten(item, tensors) for item in payload]}
    if isinstance(payload, dict) and all(isinstance(key, str) for key in payload):
        return {"dict": {key: flatten(item, tensors) for key, item in payload.items()}}
    raise PipelineError(
        f"a stage returned {type(payload).__name__}; between stages go tensors, None, numbers, strings, and tuples, "
        "lists and dicts (with str keys) of them"
    )


def _unflatten(structure: Any, tensors: list[Tensor]) -> Any:
    ((kind, value),) = structure.items()
    if kind == "tensor":
        return tensors[value]
    if kind in ("constant", "int", "str"):
        return value
    if kind == "float":
        return float.fromhex(value)
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in value.items()}
    items = [_unflatten(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items


class Outbox:
    """The sends under way of one stage, with what they read: at most `limit` (None: any number), else `put` waits."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._pending: deque[tuple[ds_comm.Work, ds_comm.Packet]] = deque()

    def put(self, packet: ds_comm.Packet) -> None:
        """Start sending the packet."""
        work = packet.send()
        if work.finished:
            return
        while self.limit is not None and len(self._pending) >= self.limit:
            self._pending.popleft()[0].wait()
        self._pending.append((work, packet))

    def drain(self) -> None:
        """Wait until all is sent."""
        while self._pending:
            self._pending.popleft()[0].wait()


class _End:
    """One end of a channel: `peer` is a rank of `group`; `tag` tells the purposes apart; `label` is for the ledger."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        peer: int,
        tag: int,
        label: str,
        device: torch.device,
        dynamic: bool = False,
    ) -> None:
        comm = ds_comm.communicator(group)
        self.peer, self.label, self.dynamic = peer, label, dynamic
        self.header: _Header | None = None
        self._packets = comm.channel(peer, tag=tag, label=label, device=device)
        self._texts = comm.channel(peer, tag=tag, label=f"{label} header", device=device)


class Sender(_End):
    """The end that sends."""

    @cached_property
    def _kept(self) -> dict[int, tuple[Tensor, _Header, Any, list[Tensor]]]:
        """By packet data: what `_views` made for it."""
        return {}

    def send(self, payload: Any, outbox: Outbox) -> None:
        """Start sending. PipelineError if shapes or structure changed and not `dynamic`; the caller then `fail`s."""
        tensors: list[Tensor] = []
        structure = flatten(payload, tensors)
        known = self.header
        if known is None or self.dynamic or not known.fits(structure, tensors):
            known = self._announce(_Header.describe(structure, tensors), outbox)
        packet = self._packets.packet(known.nbytes)
        for view, tensor in zip(self._views(packet, known), tensors, strict=True):
            view.copy_(tensor.detach())
        outbox.put(packet)

    def fail(self, message: str, outbox: Outbox) -> None:
        """Instead of a payload: make the receiver raise `message`."""
        if self.header is not None and not self.dynamic:
            packet = self._packets.packet(self.header.nbytes)
            _set_status(packet.data, _FAILED)
            outbox.put(packet)
        self._send_text(message, outbox, failed=True)

    def _views(self, packet: ds_comm.Packet, known: _Header) -> list[Tensor]:
        """The tensors in the packet, whose status is set: kept for packets that come again."""
        data = packet.data
        found = self._kept.get(id(data))
        if found is None or found[0] is not data or found[1] is not known:
            views = [layout.view(data) for layout in known.tensors]
            if not packet.lasting:
                _set_status(data, _OK)
                return views
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            found = self._kept[id(data)] = (data, known, data.numpy(), views)
        found[2][0] = _OK
        return found[3]

    def _announce(self, text: str, outbox: Outbox) -> _Header:
        known = self.header
        if known is not None and not self.dynamic:
            raise PipelineError(
                f"{self.label}: the payload changed from [{known.shapes()}] to [{_Header.parse(text).shapes()}] (or "
                "its structure did); give dynamic_shape=True, or micro-batches of one shape"
            )
        if known is None or known.text != text:
            known = self.header = _Header.parse(text)
        self._send_text(text, outbox)
        return known

    def _send_text(self, text: str, outbox: Outbox, *, failed: bool = False) -> None:
        encoded = text.encode()
        length = self._texts.packet(8)
        length.data.copy_(torch.tensor([-len(encoded) if failed else len(encoded)]).view(torch.uint8))
        outbox.put(length)
        data = self._texts.packet(len(encoded))
        data.data.copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
        outbox.put(data)


class Receiver(_End):
    """The end that receives."""

    def post(self) -> Incoming:
        """Start receiving the next payload; waits for its header only where one comes."""
        known = self.header
        if known is None or self.dynamic:
            text = self._receive_text()
            if known is None or known.text != text:
                known = self.header = _Header.parse(text)
        return Incoming(self, known, self._packets.receive(known.nbytes))

    def raise_failure(self) -> None:
        """After a packet that says so: receive the text and raise it."""
        self._receive_text()
        raise PipelineError(f"{self.label}: rank {self.peer} of the pipeline sent a failure without a text")

    def _receive_text(self) -> str:
        length = int.from_bytes(self._receive_bytes(8), sys.byteorder, signed=True)
        text = self._receive_bytes(abs(length)).decode()
        if length < 0:
            raise PipelineError(text)
        return text

    def _receive_bytes(self, nbytes: int) -> bytes:
        receipt = self._texts.receive(nbytes)
        receipt.wait()
        return receipt.data.cpu().numpy().tobytes()


class Incoming:
    """A payload on its way."""

    __slots__ = ("_header", "_receipt", "_receiver")

    def __init__(self, receiver: Receiver, header: _Header, receipt: ds_comm.Receipt) -> None:
        self._receiver, self._header, self._receipt = receiver, header, receipt

    def wait(self) -> Any:
        """The payload; tensors that take a gradient are leaves that require one. PipelineError if the peer failed."""
        self._receipt.wait()
        data = self._receipt.data
        if _status(data) != _OK:
            self._receiver.raise_failure()
        tensors = []
        for layout in self._header.tensors:
            tensor = layout.view(data)
            tensors.append(tensor.requires_grad_() if layout.requires_grad else tensor)
        return _unflatten(self._header.structure, tensors)


def _set_status(packet: Tensor, status: int) -> None:
    if packet.device.type == "cpu":
        packet.numpy()[0] = status  # a fraction of what torch takes for it
    else:
        packet[0] = status


def _status(packet: Tensor) -> int:
    return int(packet.numpy()[0] if packet.device.type == "cpu" else packet[0])
