"""`MonitorMaster`: all monitors that the configuration enables, as one monitor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepspeed.monitor.base import Event, Monitor, option
from deepspeed.monitor.comet import CometMonitor
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.tensorboard import TensorBoardMonitor
from deepspeed.monitor.wandb import WandbMonitor

MONITORS: dict[str, type[Monitor]] = {
    "tensorboard": TensorBoardMonitor,
    "wandb": WandbMonitor,
    "csv_monitor": csvMonitor,
    "comet": CometMonitor,
}


class MonitorMaster(Monitor):
    """All monitors that the configuration enables, as one.

    Args:
        config: anything with the sections `tensorboard`, `wandb`, `csv_monitor`, `comet` (attributes or mapping);
            absent sections are off.
    """

    def __init__(self, config: Any) -> None:
        sections = {name: option(config, name, None) for name in MONITORS}
        self.monitors = [
            MONITORS[name](section) for name, section in sections.items() if option(section, "enabled", False)
        ]
        super().__init__({"enabled": bool(self.monitors)})

    def _write(self, events: Sequence[Event]) -> None:
        for monitor in self.monitors:
            monitor.write_events(events)

    def close(self) -> None:
        for monitor in self.monitors:
            monitor.close()
        super().close()
