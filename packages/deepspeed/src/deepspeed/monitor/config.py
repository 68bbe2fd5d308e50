"""Upstream's path of the monitors' sections."""

from __future__ import annotations

from typing import Any

from deepspeed.config.base import Section
from deepspeed.config.model_observe import Comet as CometConfig
from deepspeed.config.model_observe import CsvMonitor as CSVConfig
from deepspeed.config.model_observe import TensorBoard as TensorBoardConfig
from deepspeed.config.model_observe import WandB as WandbConfig

__all__ = [
    "CSVConfig",
    "CometConfig",
    "DeepSpeedMonitorConfig",
    "TensorBoardConfig",
    "WandbConfig",
    "get_monitor_config",
]


class DeepSpeedMonitorConfig(Section):
    """The four sections of a config, for `MonitorMaster`."""

    tensorboard: TensorBoardConfig = TensorBoardConfig()
    """Scalars for TensorBoard."""
    comet: CometConfig = CometConfig()
    """Scalars for Comet."""
    wandb: WandbConfig = WandbConfig()
    """Scalars for Weights & Biases."""
    csv_monitor: CSVConfig = CSVConfig()
    """Scalars as CSV."""

    @property
    def enabled(self) -> bool:
        """Whether any of them is on."""
        return any((self.tensorboard.enabled, self.comet.enabled, self.wandb.enabled, self.csv_monitor.enabled))


def get_monitor_config(param_dict: dict[str, Any]) -> DeepSpeedMonitorConfig:
    """The monitors' sections of a whole config."""
    return DeepSpeedMonitorConfig(
        **{key: param_dict[key] for key in DeepSpeedMonitorConfig.model_fields if key in param_dict}
    )
