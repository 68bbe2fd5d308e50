"""Callbacks: order, moments, failures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepspeed.events import Callback, CallbackList


class Recorder(Callback):
    def __init__(self, log: list[Any], name: str) -> None:
        self.log, self.name = log, name

    def after_backward(self, engine: Any, loss: torch.Tensor) -> None:
        self.log.append((self.name, "after_backward", float(loss)))

    def on_save(self, engine: Any, directory: str, tag: str) -> None:
        self.log.append((self.name, "on_save", directory, tag))


class Broken(Callback):
    def after_step(self, engine: Any) -> None:
        raise OSError("disk is full")


def test_called_in_the_order_added_and_removed() -> None:
    log: list[Any] = []
    first, second = Recorder(log, "a"), Recorder(log, "b")
    callbacks = CallbackList([first])
    callbacks.add(second)
    callbacks.after_backward(None, torch.tensor(2.0))  # type: ignore[arg-type]
    callbacks.after_step(None)  # type: ignore[arg-type]
    callbacks.remove(first)
    callbacks.on_save(None, "out", "step5")  # type: ignore[arg-type]
    callbacks.on_load(None, "out", "step5")  # type: ignore[arg-type]
    assert log == [("a", "after_backward", 2.0), ("b", "after_backward", 2.0), ("b", "on_save", "out", "step5")]
    assert list(callbacks) == [second] and len(callbacks) == 1


def test_a_failing_callback_is_named() -> None:
    with pytest.raises(OSError, match="disk is full") as caught:
        CallbackList([Broken()]).after_step(None)  # type: ignore[arg-type]
    assert caught.value.__notes__ == ["raised by callback Broken in after_step"]


def test_only_callbacks_can_be_added() -> None:
    with pytest.raises(TypeError, match="function"):
        CallbackList().add(lambda: None)  # type: ignore[arg-type]
