"""Monitors: training figures to TensorBoard, CSV files, Weights & Biases and Comet.

`base.py` has the base class, `monitor.py` the master over all configured ones, every other file one writer.
"""

from deepspeed.monitor.base import Monitor
from deepspeed.monitor.monitor import MonitorMaster

__all__ = ["Monitor", "MonitorMaster"]
