"""What an engine tells the outside world, and how to listen.

Owns `Callback`, the four moments a listener can act on, and `CallbackList`, which calls listeners in the order
they were added. Features that watch training (monitors, profilers, progress displays) subscribe here; none of them
is a line inside the engine.

Vocabulary: a *micro-step* is one backward; a *step* is one optimizer step (the boundary of accumulation).

Invariants:
- A listener never changes the mathematics: it gets the detached loss and reads the engine.
- Nothing here synchronises a device. A listener that reads a number off a device (`float(loss)`) pays for it itself.
- A listener that fails stops training with its own exception, annotated with which listener and which moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch


class EngineView(Protocol):
    """The part of an engine that listeners may read."""

    global_steps: int
    global_samples: int
    skipped_steps: int
    optimizer: Any

    def get_lr(self) -> list[float]:
        """Learning rate of each parameter group."""
        ...

    def get_mom(self) -> list[Any]:
        """Momentum or betas of each parameter group."""
        ...

    def get_global_grad_norm(self) -> Any:
        """Gradient norm of the last step before clipping, None before the first step."""
        ...


class Callback:
    """Base of all listeners: every moment does nothing until a subclass overrides it."""

    def after_backward(self, engine: EngineView, loss: torch.Tensor) -> None:
        """One micro-batch has gone backward. `loss` is detached and neither scaled nor divided."""

    def after_step(self, engine: EngineView) -> None:
        """One optimizer step is over (also one that an overflow skipped); counters are already advanced."""

    def on_save(self, engine: EngineView, directory: str, tag: str) -> None:
        """A checkpoint `<directory>/<tag>` has been handed over for writing (it may not be on disk yet)."""

    def on_load(self, engine: EngineView, directory: str, tag: str) -> None:
        """A checkpoint `<directory>/<tag>` has been loaded."""


class CallbackList(Callback):
    """Callbacks called one after the other; itself a callback."""

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self._callbacks = list(callbacks)

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._callbacks)

    def __len__(self) -> int:
        return len(self._callbacks)

    def add(self, callback: Callback) -> None:
        """Add one listener; it is called after those already there."""
        if not isinstance(callback, Callback):
            raise TypeError(
                f"callback is a {type(callback).__name__}; expected an object derived from deepspeed.events.Callback"
            )
        self._callbacks.append(callback)

    def remove(self, callback: Callback) -> None:
        """Remove one listener; ValueError when it was never added."""
        self._callbacks.remove(callback)

    def after_backward(self, engine: EngineView, loss: torch.Tensor) -> None:
        self._call("after_backward", engine, loss)

    def after_step(self, engine: EngineView) -> None:
        self._call("after_step", engine)

    def on_save(self, engine: EngineView, directory: str, tag: str) -> None:
        self._call("on_save", engine, directory, tag)

    def on_load(self, engine: EngineView, directory: str, tag: str) -> None:
        self._call("on_load", engine, directory, tag)

    def _call(self, moment: str, *args: Any) -> None:
        for callback in self._callbacks:
            try:
                getattr(callback, moment)(*args)
            except Exception as error:
                where = f"raised by callback {type(callback).__name__} in {moment}"
                # `add_note` is 3.11; on 3.10 the same attribute is written by hand so that tools still find it.
                error.__notes__ = [*getattr(error, "__notes__", []), where]  # type: ignore[attr-defined]
                raise
