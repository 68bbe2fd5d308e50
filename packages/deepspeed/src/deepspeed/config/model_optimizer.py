"""Sections that choose classes by name: `optimizer` and `scheduler`. Their `params` go to the class and are checked
by it.
"""

from __future__ import annotations

from pydantic import Field

from deepspeed.config.base import FreeForm, Section

__all__ = ["OptimizerSection", "SchedulerSection"]


class OptimizerSection(Section):
    """The optimizer to build when the caller of `initialize` passes none."""

    type: str
    """Adam, AdamW, Adagrad, Lamb, Lion, Muon (any case), or the exact name of a class in torch.optim."""
    params: FreeForm = Field(default_factory=dict)
    """Keyword arguments of the optimizer class."""
    legacy_fusion: bool = False
    """Upstream's older fp16 wrapper for fused Lamb."""


class SchedulerSection(Section):
    """The learning rate schedule to build when the caller of `initialize` passes none; stepped once per optimizer
    step.
    """

    type: str
    """LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR, or the exact name of a class in
    torch.optim.lr_scheduler.
    """
    params: FreeForm = Field(default_factory=dict)
    """Keyword arguments of the schedule class."""
