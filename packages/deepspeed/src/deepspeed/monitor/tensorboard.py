"""Figures for TensorBoard, through torch's SummaryWriter (pip install tensorboard)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepspeed.monitor.base import Event, Monitor, log_directory


class TensorBoardMonitor(Monitor):
    """Section `tensorboard` of the configuration (`output_path`, `job_name`)."""

    package = "tensorboard"
    requirement = "tensorboard"

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.summary_writer: Any = SummaryWriter(log_dir=str(log_directory(self.config, "tensorboard")))

    def _write(self, events: Sequence[Event]) -> None:
        for name, value, step in events:
            self.summary_writer.add_scalar(name, value, step)
        self.summary_writer.flush()

    def close(self) -> None:
        if self.writes:
            self.summary_writer.close()
        super().close()
