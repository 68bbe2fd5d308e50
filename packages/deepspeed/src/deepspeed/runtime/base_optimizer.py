"""Upstream's path of the class of every optimizer that `deepspeed.initialize` returns, and of two argument types."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from deepspeed._lazy import explain_absent
from ds_zero import ZeroOptimizer

__all__ = [
    "DeepSpeedOptimizer",
    "DeepSpeedOptimizerCallable",
    "DeepSpeedSchedulerCallable",
    "ZeROOptimizer",
]

DeepSpeedOptimizer = ZeROOptimizer = ZeroOptimizer

# What `deepspeed.initialize` takes in place of an optimizer or a scheduler: a function that makes one.
DeepSpeedOptimizerCallable = Callable[[Iterable[Any]], torch.optim.Optimizer]
DeepSpeedSchedulerCallable = Callable[[torch.optim.Optimizer], Any]

explain_absent(__name__)
