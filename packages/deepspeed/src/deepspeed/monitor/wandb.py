"""Figures for Weights & Biases (pip install wandb)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepspeed.monitor.base import Event, Monitor, option


class WandbMonitor(Monitor):
    """Section `wandb` of the configuration (`project`, `group`, `team`)."""

    package = "wandb"
    requirement = "wandb"

    def _open(self) -> None:
        import wandb

        self.run: Any = wandb.init(
            project=option(self.config, "project", None) or "deepspeed",
            group=option(self.config, "group", None),
            entity=option(self.config, "team", None),
        )

    def _write(self, events: Sequence[Event]) -> None:
        for name, value, step in events:
            self.run.log({name: value}, step=step)

    def close(self) -> None:
        if self.writes:
            self.run.finish()
        super().close()
