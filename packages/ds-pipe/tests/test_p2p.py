"""Nested tensors between two ranks: what arrives, how many messages it takes, and a shape that changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ds_comm
from ds_comm.testing import run_ranks
from ds_pipe import PipelineError
from ds_pipe._p2p import Outbox, Receiver, Sender

CPU = torch.device("cpu")
DTYPES = [
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
]


def sample() -> dict[str, Any]:
    tensors = [torch.arange(7).to(dtype) for dtype in DTYPES]
    return {
        "all": tensors,
        "nested": (tensors[0].view(7, 1), [None, True, 3, 2.5, "text"], {}),
        "grad": torch.ones(2, 3, requires_grad=True).T,
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(5.0),
    }


def exchange(payloads: list[Any], dynamic: bool) -> tuple[list[Any], int]:
    """Rank 0 sends, rank 1 receives; returns what came, and the number of messages."""
    ledger = ds_comm.communicator().ledger
    if ds_comm.get_rank() == 0:
        outbox = Outbox()
        sender = Sender(None, 1, 1, "test", CPU, dynamic)
        for payload in payloads:
            sender.send(payload, outbox)
        outbox.drain()
        return [], sum(n for (op, _), n in ledger.counts.items() if op == "send")
    receiver = Receiver(None, 0, 1, "test", CPU, dynamic)
    incoming = [receiver.post() for _ in payloads]
    return [one.wait() for one in incoming], 0


def exchange_samples(num: int, dynamic: bool) -> tuple[list[bool], int]:
    came, messages = exchange([sample()] * num, dynamic)
    expected = sample()
    same = []
    for one in came:
        assert list(one) == list(expected)
        assert one["nested"][1:] == expected["nested"][1:] and isinstance(one["nested"], tuple)
        pairs = list(zip(one["all"], expected["all"], strict=True))
        pairs += [(one[name], expected[name]) for name in ("grad", "empty", "scalar")]
        pairs.append((one["nested"][0], expected["nested"][0]))
        same += [a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist() for a, b in pairs]
        assert one["grad"].requires_grad and one["grad"].is_leaf
        assert not any(tensor.requires_grad for tensor in one["all"])
    return same, messages


@pytest.mark.parametrize(("dynamic", "messages"), [(False, 2 + 3), (True, 3 * 3)])
def test_every_type_arrives_as_it_was(dynamic: bool, messages: int) -> None:
    sent, received = run_ranks(exchange_samples, 2, 3, dynamic)
    assert sent == ([], messages)
    assert len(received[0]) == 3 * (len(DTYPES) + 4) and all(received[0])


def exchange_shapes(dynamic: bool) -> list[tuple[int, ...]] | str:
    try:
        came, _ = exchange([torch.ones(2, 3), torch.ones(2, 3), torch.ones(4)], dynamic)
    except PipelineError as error:
        return str(error)
    return [tuple(tensor.shape) for tensor in came]


def test_dynamic_shapes() -> None:
    assert run_ranks(exchange_shapes, 2, True) == [[], [(2, 3), (2, 3), (4,)]]


def send_a_changed_shape() -> str:
    """The sender lets its last words out, as the executor does."""
    if ds_comm.get_rank() == 0:
        outbox = Outbox()
        sender = Sender(None, 1, 1, "activations", CPU)
        sender.send(torch.ones(2, 3), outbox)
        with pytest.raises(PipelineError) as info:
            sender.send(torch.ones(4), outbox)
        sender.fail(str(info.value), outbox)
        outbox.drain()
        return str(info.value)
    receiver = Receiver(None, 0, 1, "activations", CPU)
    assert receiver.post().wait().shape == (2, 3)
    with pytest.raises(PipelineError) as info:
        receiver.post().wait()
    return str(info.value)


def test_a_changed_shape_is_an_error_on_both_sides() -> None:
    texts = run_ranks(send_a_changed_shape, 2)
    assert texts[0] == texts[1]
    assert "changed from [float32 (2, 3)] to [float32 (4,)]" in texts[0] and "dynamic_shape=True" in texts[0]


def send_a_set() -> str:
    with pytest.raises(PipelineError) as info:
        Sender(None, 0, 1, "activations", CPU).send({1, 2}, Outbox())
    return str(info.value)


def test_an_object_that_is_no_payload() -> None:
    assert "a stage returned set; between stages go tensors" in run_ranks(send_a_set, 1)[0]


def changes_that_count() -> list[str]:
    """A constant is part of what was announced; one that is equal and not the same is another."""
    texts = []
    for tag, (first, second) in enumerate([(1, True), (0.0, -0.0), (2, 3), (float("nan"), float("nan"))], start=1):
        if ds_comm.get_rank() == 0:
            outbox = Outbox()
            sender = Sender(None, 1, tag, "test", CPU)
            sender.send([first, torch.ones(1)], outbox)
            try:
                sender.send([second, torch.ones(1)], outbox)
                texts.append("same")
            except PipelineError:
                texts.append("another")
            outbox.drain()
        else:
            value = Receiver(None, 0, tag, "test", CPU).post().wait()[0]
            texts.append(repr(value))
    return texts


def test_constants_are_compared_to_the_bit() -> None:
    sent, received = run_ranks(changes_that_count, 2)
    assert sent == ["another", "another", "another", "same"]
    assert received == ["1", "0.0", "2", "nan"]


def kept_activations() -> list[bool]:
    """Tensors of one packet have version counters of their own, and packets that are kept stay as they came."""
    num = 12
    if ds_comm.get_rank() == 0:
        outbox, sender = Outbox(), Sender(None, 1, 1, "test", CPU)
        for i in range(num):
            sender.send((torch.full((64,), float(i), requires_grad=True), torch.full((3,), i)), outbox)
        outbox.drain()
        return []
    receiver = Receiver(None, 0, 1, "test", CPU)
    losses, leaves = [], []
    for i in range(num):
        floats, integers = receiver.post().wait()
        losses.append((floats * floats).sum())
        integers.add_(1)  # no business of the graph that saved `floats`
        leaves.append((floats, i))
    for loss in losses:
        loss.backward()
    return [torch.equal(leaf.grad, torch.full((64,), 2.0 * i)) for leaf, i in leaves if leaf.grad is not None]


def test_activations_that_are_kept() -> None:
    assert run_ranks(kept_activations, 2)[1] == [True] * 12
