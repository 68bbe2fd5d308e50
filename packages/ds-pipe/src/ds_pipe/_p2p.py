"""Nested tensors from stage to stage: no pickle, and one message each once the shapes are known.

A *payload* is a tensor, or a tuple, list or dict (with str keys) of payloads; None, bool, int, float and str may stand
in it as well. Its *header* is JSON: the structure with those constants, and per tensor dtype, shape and whether it
takes a gradient. A `Sender` and a `Receiver` are the two ends of one channel: one direction between two stages, one
purpose. Per payload the channel carries

    [header length, header]   first time only; with `dynamic` always
    packet                    a status word (64 bytes), then the tensors' bytes, each at a multiple of 64

so that a payload of any number of tensors and dtypes is one message, and its receive can be posted early. A sender that
finds another header than the one announced, and a stage that fails, sends a packet of the announced size whose status
says so, then the text as a header (`fail`): both ends raise PipelineError and none waits.

Invariants. A channel's messages are sent and received in one order (messages between two ranks of a group keep their
order), and a packet stays alive until its send is done.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
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
_CONSTANTS = (type(None), bool, int, float, str)
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


@dataclass(frozen=True)
class _Header:
    """Where each tensor lies in a packet, and the structure around them."""

    text: str
    structure: Any
    tensors: list[tuple[torch.dtype, list[int], bool]]
    offsets: list[int]
    nbytes: int

    @classmethod
    def parse(cls, text: str) -> _Header:
        structure, described = json.loads(text)
        tensors = [(_DTYPES[dtype], shape, grad) for dtype, shape, grad in described]
        offsets, at = [], _ALIGNMENT
        for dtype, shape, _ in tensors:
            offsets.append(at)
            at += -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        return cls(text, structure, tensors, offsets, at)

    def views(self, packet: Tensor) -> list[Tensor]:
        """The tensors, as views of the packet (uint8 [nbytes])."""
        return [
            packet[at : at + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for at, (dtype, shape, _) in zip(self.offsets, self.tensors, strict=True)
        ]

    def shapes(self) -> str:
        return ", ".join(f"{str(dtype).removeprefix('torch.')} {tuple(shape)}" for dtype, shape, _ in self.tensors)


def flatten(payload: Any, tensors: list[Tensor]) -> Any:
    """Append the payload's tensors to `tensors`; returns its structure for JSON. PipelineError for another type."""
    if isinstance(payload, Tensor):
        tensors.append(payload)
        return {"tensor": len(tensors) - 1}
    if isinstance(payload, _CONSTANTS):
        return {"constant": payload}
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
    if kind == "constant":
        return value
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in value.items()}
    items = [_unflatten(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items


class Outbox:
    """The sends under way of one stage, with what they read: at most `limit` (None: any number), else `put` waits."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._pending: deque[tuple[ds_comm.Work, Tensor]] = deque()

    def put(self, tensor: Tensor, group: dist.ProcessGroup | None, peer: int, tag: int, label: str) -> None:
        while self.limit is not None and len(self._pending) >= self.limit:
            self._pending.popleft()[0].wait()
        self._pending.append((ds_comm.isend(tensor, group=group, tag=tag, group_dst=peer, label=label), tensor))

    def drain(self) -> None:
        """Wait until all is sent."""
        while self._pending:
            self._pending.popleft()[0].wait()


@dataclass
class _End:
    """One end of a channel: `peer` is a rank of `group`; `tag` tells the purposes apart; `label` is for the ledger."""

    group: dist.ProcessGroup | None
    peer: int
    tag: int
    label: str
    device: torch.device
    dynamic: bool = False
    header: _Header | None = None


class Sender(_End):
    """The end that sends."""

    def send(self, payload: Any, outbox: Outbox) -> None:
        """Start sending. PipelineError if shapes or structure changed and not `dynamic`; the caller then `fail`s."""
        tensors: list[Tensor] = []
        structure = flatten(payload, tensors)
        described = [(str(t.dtype).removeprefix("torch."), list(t.shape), t.requires_grad) for t in tensors]
        text = json.dumps([structure, described])
        known = self.header
        if known is None or self.dynamic:
            known = known if known is not None and known.text == text else _Header.parse(text)
            self.header = known
            self._send_text(text, outbox)
        elif text != known.text:
            raise PipelineError(
                f"{self.label}: the payload changed from [{known.shapes()}] to [{_Header.parse(text).shapes()}] (or "
                "its structure did); give dynamic_shape=True, or micro-batches of one shape"
            )
        packet = torch.empty(known.nbytes, dtype=torch.uint8, device=self.device)
        packet[:_ALIGNMENT] = _OK
        for view, tensor in zip(known.views(packet), tensors, strict=True):
            view.copy_(tensor.detach())
        outbox.put(packet, self.group, self.peer, self.tag, self.label)

    def fail(self, message: str, outbox: Outbox) -> None:
        """Instead of a payload: make the receiver raise `message`."""
        known = self.header
        if known is None or self.dynamic:
            self._send_text(message, outbox, failed=True)
            return
        packet = torch.full((known.nbytes,), _FAILED, dtype=torch.uint8, device=self.device)
        outbox.put(packet, self.group, self.peer, self.tag, self.label)
        self._send_text(message, outbox, failed=True)

    def _send_text(self, text: str, outbox: Outbox, *, failed: bool = False) -> None:
        data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor([-data.numel() if failed else data.numel()], device=self.device)
        outbox.put(length, self.group, self.peer, self.tag, f"{self.label} header")
        outbox.put(data, self.group, self.peer, self.tag, f"{self.label} header")


class Receiver(_End):
    """The end that receives."""

    def post(self) -> Incoming:
        """Start receiving the next payload; waits for its header only where one comes."""
        known = self.header
        if known is None or self.dynamic:
            known = _Header.parse(self._receive_text())
            self.header = known
        packet = torch.empty(known.nbytes, dtype=torch.uint8, device=self.device)
        return Incoming(self, known, packet, self._start(packet, self.label))

    def raise_failure(self) -> None:
        """After a packet that says so: receive the text and raise it."""
        self._receive_text()
        raise PipelineError(f"{self.label}: rank {self.peer} of the pipeline sent a failure without a text")

    def _receive_text(self) -> str:
        length = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._start(length, f"{self.label} header").wait()
        data = torch.empty(abs(int(length)), dtype=torch.uint8, device=self.device)
        self._start(data, f"{self.label} header").wait()
        text = bytes(data.tolist()).decode()
        if length < 0:
            raise PipelineError(text)
        return text

    def _start(self, tensor: Tensor, label: str) -> ds_comm.Work:
        return ds_comm.irecv(tensor, group=self.group, tag=self.tag, group_src=self.peer, label=label)


@dataclass(frozen=True)
class Incoming:
    """A payload on its way."""

    receiver: Receiver
    header: _Header
    packet: Tensor
    work: ds_comm.Work

    def wait(self) -> Any:
        """The payload; tensors that take a gradient are leaves that require one. PipelineError if the peer failed."""
        self.work.wait()
        if self.packet[0] != _OK:
            self.receiver.raise_failure()
        tensors = self.header.views(self.packet)
        for tensor, (_, _, grad) in zip(tensors, self.header.tensors, strict=True):
            tensor.requires_grad_(grad)
        return _unflatten(self.header.structure, tensors)
