"""Training figures sent somewhere: the base of all monitors.

Owns `Monitor`, a callback that turns the engine's moments into events and leaves writing them to its subclass.

Vocabulary: an *event* is (name, value, step); names are paths such as `Train/Samples/train_loss`, the step of the
engine's own events is the number of samples seen.

Invariants:
- Only rank 0 writes. The other ranks still check that the package is installed, so that a missing one is an error on
  every rank and not a hang of those that go on.
- A loss is added up on its device and read once per step, never once per micro-batch.
- Nothing is imported for a monitor that is off.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import ds_comm
from deepspeed.events import Callback, EngineView

Event = tuple[str, Any, int]


class Monitor(Callback, ABC):
    """Base of the writers. A subclass names its `package` (None: none needed) and writes events.

    Args:
        config: the section of the configuration (attributes or mapping) with `enabled` and the writer's own keys.

    Raises:
        ImportError: the section is enabled and the package is not installed.
    """

    package: str | None = None
    requirement: str = ""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.enabled = bool(option(config, "enabled", False))
        self._loss_sum: torch.Tensor | None = None
        self._num_losses = 0
        if self.enabled and self.package is not None and importlib.util.find_spec(self.package) is None:
            raise ImportError(
                f"the configuration enables the {type(self).__name__}, which needs the package {self.package!r}; it is "
                f"not installed: pip install {self.requirement}"
            )
        self.writes = self.enabled and (not ds_comm.is_initialized() or ds_comm.get_rank() == 0)
        if self.writes:
            self._open()

    def _open(self) -> None:
        """Start the session of the writer; called on the writing rank only."""

    @abstractmethod
    def _write(self, events: Sequence[Event]) -> None:
        """Write events with plain float values; called on the writing rank only."""

    def close(self) -> None:
        """End the session; further events are lost."""
        self.writes = False

    def write_events(self, event_list: Sequence[Event], flush: bool = True) -> None:
        """Write events; values may be tensors of one element. Does nothing on ranks other than 0."""
        if self.writes and event_list:
            self._write([(name, float(value), int(step)) for name, value, step in event_list])

    def after_backward(self, engine: EngineView, loss: torch.Tensor) -> None:
        if self.writes:
            value = loss.detach().float()
            self._loss_sum = value if self._loss_sum is None else self._loss_sum + value
            self._num_losses += 1

    def after_step(self, engine: EngineView) -> None:
        if self.writes:
            self.write_events(self._step_events(engine))
        self._loss_sum, self._num_losses = None, 0

    def _step_events(self, engine: EngineView) -> list[Event]:
        step = engine.global_samples
        events: list[Event] = []
        if self._loss_sum is not None:
            events.append(("Train/Samples/train_loss", self._loss_sum / self._num_losses, step))
        rates = engine.get_lr()
        if rates:
            events.append(("Train/Samples/lr", rates[0], step))
        scale = getattr(engine.optimizer, "loss_scale", None)
        if scale is not None:
            events.append(("Train/Samples/loss_scale", scale, step))
        norm = engine.get_global_grad_norm()
        if norm is not None:
            events.append(("Train/Samples/grad_norm", norm, step))
        return events


def option(section: Any, name: str, default: Any) -> Any:
    """Value of a key in a configuration section given as mapping, object or None."""
    if isinstance(section, Mapping):
        return section.get(name, default)
    return getattr(section, name, default)


def log_directory(section: Any, default_folder: str) -> Path:
    """`<output_path>/<job_name>`, created; without an output_path under `default_folder` in the working directory."""
    base = Path(option(section, "output_path", "") or default_folder)
    directory = base / (option(section, "job_name", None) or "DeepSpeedJobName")
    directory.mkdir(parents=True, exist_ok=True)
    return directory
