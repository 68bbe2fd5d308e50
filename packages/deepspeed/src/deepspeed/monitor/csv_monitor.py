"""Figures as CSV files, one per name.

Layout: `<output_path>/<job_name>/<name with "/" and " " as "_">.csv`, header `step,<last part of the name>`, one line
per event. Files are opened for appending at each write: a crash loses nothing, and a resumed run goes on in them.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence

from deepspeed.monitor.base import Event, Monitor, log_directory


class csvMonitor(Monitor):
    """Section `csv_monitor` of the configuration (`output_path`, `job_name`)."""

    def _open(self) -> None:
        self.log_dir = log_directory(self.config, "csv_monitor")

    def _write(self, events: Sequence[Event]) -> None:
        for name, value, step in events:
            path = self.log_dir / (name.replace("/", "_").replace(" ", "_") + ".csv")
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    writer.writerow(["step", name.rsplit("/", 1)[-1]])
                writer.writerow([step, value])
