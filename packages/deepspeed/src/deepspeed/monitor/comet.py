"""Figures for Comet (pip install comet-ml)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepspeed.monitor.base import Event, Monitor, option


class CometMonitor(Monitor):
    """Section `comet` of the configuration.

    `samples_log_interval`: an event of one name is sent only when its step is at least so many samples after the last
    one sent under that name. The other keys go to `comet_ml.start` (`experiment_name` names the experiment).
    """

    package = "comet_ml"
    requirement = "comet-ml"

    def _open(self) -> None:
        import comet_ml

        keys = ("api_key", "project", "workspace", "experiment_key", "mode", "online")
        given = {key: option(self.config, key, None) for key in keys}
        self.experiment: Any = comet_ml.start(**{key: value for key, value in given.items() if value is not None})
        name = option(self.config, "experiment_name", None)
        if name is not None:
            self.experiment.set_name(name)
        self.samples_log_interval = int(option(self.config, "samples_log_interval", 100))
        self._last_step: dict[str, int] = {}

    def _write(self, events: Sequence[Event]) -> None:
        for name, value, step in events:
            last = self._last_step.get(name)
            if last is None or step - last >= self.samples_log_interval:
                self._last_step[name] = step
                self.experiment.log_metric(name=name, value=value, step=step)

    def close(self) -> None:
        if self.writes:
            self.experiment.end()
        super().close()
