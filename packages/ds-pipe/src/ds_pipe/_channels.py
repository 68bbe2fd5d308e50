"""All message channels of one rank of a pipeline: opened when first used, told when the rank fails.

A channel is one purpose (activations, gradients, ...), a number (the virtual stage that makes the payload, or a tie),
one direction and one peer; its tag is made of the purpose and the number, so both ends agree without a word. Sends do
not block (up to `_SENDS_UNDER_WAY` of the program's are on their way); whatever goes wrong on one rank reaches all
others as a text.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

import ds_comm
from ds_pipe._p2p import Incoming, Outbox, Receiver, Sender

__all__ = ["ACTIVATION", "EVALUATION", "GRADIENT", "TIE", "TOTAL", "Channels"]

ACTIVATION, GRADIENT, EVALUATION, TIE, TOTAL = 1, 2, 3, 4, 5
_NAMES = {ACTIVATION: "activations", GRADIENT: "gradients", EVALUATION: "evaluation", TIE: "tied", TOTAL: "tied total"}
_PURPOSES = 8
_SENDS_UNDER_WAY = 4  # the program is free of deadlock even with blocking sends, so waiting for old ones is safe


class Channels:
    """The ends of rank `stage` of `group`; only activations change shape where `dynamic`."""

    def __init__(self, group: dist.ProcessGroup | None, stage: int, device: torch.device, dynamic: bool) -> None:
        self._group = group
        self._stage = stage
        self._device = device
        self._dynamic = dynamic
        self._outbox = Outbox(_SENDS_UNDER_WAY)
        self._tied_outbox = Outbox()  # ties are no part of the program: waiting for one could hold up what it waits for
        self._senders: dict[tuple[int, int, int], Sender] = {}
        self._receivers: dict[tuple[int, int, int], Receiver] = {}

    def open(self, purpose: int, number: int, peer: int) -> Sender:
        """The sending end; channels opened early are those that a failure is told through."""
        sender = self._senders.get((purpose, number, peer))
        if sender is None:
            sender = self._senders[purpose, number, peer] = self._end(Sender, purpose, number, peer)
        return sender

    def send(self, purpose: int, number: int, peer: int, payload: Any) -> None:
        """Start sending; returns before it is received."""
        outbox = self._tied_outbox if purpose in (TIE, TOTAL) else self._outbox
        self.open(purpose, number, peer).send(payload, outbox)

    def post(self, purpose: int, number: int, peer: int) -> Incoming:
        """Start receiving."""
        receiver = self._receivers.get((purpose, number, peer))
        if receiver is None:
            receiver = self._receivers[purpose, number, peer] = self._end(Receiver, purpose, number, peer)
        return receiver.post()

    def receive(self, purpose: int, number: int, peer: int) -> Any:
        return self.post(purpose, number, peer).wait()

    def renew(self, purpose: int) -> None:
        """Let the payloads of a purpose have other shapes from now on; all ranks call it before the next of them."""
        for ends in (self._senders, self._receivers):
            for (about, _, _), end in ends.items():
                if about == purpose:
                    end.header = None

    def drain(self) -> None:
        """Wait until all is sent."""
        self._outbox.drain()
        self._tied_outbox.drain()

    def fail(self, text: str) -> None:
        """Make every rank that waits for this one, or for another, raise `text`."""
        self._outbox.limit = None  # nobody may be there to receive
        for sender in self._senders.values():
            with suppress(RuntimeError):  # the connection may be what failed
                sender.fail(text, self._outbox)
        with suppress(ds_comm.CommError):  # who waits for something else: in the loss, or for another stage
            ds_comm.communicator(self._group).fail(ds_comm.CommError(text))

    def _end(self, kind: Any, purpose: int, number: int, peer: int) -> Any:
        label = f"{_NAMES[purpose]} of stages {min(self._stage, peer)} and {max(self._stage, peer)}"
        dynamic = self._dynamic and purpose in (ACTIVATION, GRADIENT, EVALUATION)
        tag = number * _PURPOSES + purpose
        return kind(self._group, peer, tag, label, self._device, dynamic)
