"""What all learning rate schedules share: the step counter, writing the parameter groups, the torch-like surface.

A subclass says the lr of every group as a function of t; everything with state is here. See `lr_schedules` for
vocabulary and invariants.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["PerGroup", "Schedule", "get_torch_optimizer", "per_group", "positive_int", "update_lr"]

_logger = logging.getLogger("DeepSpeed")
PerGroup = float | Sequence[float]
"""One number for all parameter groups, or one for each."""


def get_torch_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer that `optimizer` is or wraps as its attribute `optimizer`. TypeError for anything else."""
    for candidate in (optimizer, getattr(optimizer, "optimizer", None)):
        if isinstance(candidate, Optimizer):
            return candidate
    raise TypeError(f"{type(optimizer).__name__} is not a torch optimizer and has none as its attribute `optimizer`")


def update_lr(param_groups: Sequence[dict[str, Any]], lrs: Sequence[float]) -> list[float]:
    """Write one learning rate per group (in place where the group holds a tensor) and return them."""
    if len(param_groups) != len(lrs):
        raise ValueError(
            f"the optimizer has {len(param_groups)} parameter groups, but the schedule was built for {len(lrs)}; "
            "build it anew"
        )
    for group, lr in zip(param_groups, lrs, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    return [float(lr) for lr in lrs]


def per_group(name: str, value: PerGroup, num_groups: int) -> list[float]:
    """One float per group from a number or a list of them."""
    if isinstance(value, (list, tuple)):
        if len(value) != num_groups:
            raise ValueError(
                f"{name} has {len(value)} values, but the optimizer has {num_groups} parameter groups; give one "
                "value, or one per group"
            )
        return [float(v) for v in value]
    return [float(value)] * num_groups  # type: ignore[arg-type]


def positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


class Schedule(ABC):
    """What the five have in common: t, writing the groups, and the torch-like surface (`optimizer`, `step`,
    `get_last_lr`, state).
    """

    optimizer: Optimizer
    last_batch_iteration: int

    def __init__(self, optimizer: Any, last_batch_iteration: int) -> None:
        self.optimizer = get_torch_optimizer(optimizer)
        self.last_batch_iteration = last_batch_iteration
        self._last_lr: list[float] | None = None

    @abstractmethod
    def _lrs(self, t: int) -> list[float]:
        """The learning rate of each group after step t >= 0."""

    @abstractmethod
    def _starting_lrs(self) -> list[float]:
        """The learning rate of each group before the first step."""

    def _write_start(self) -> None:
        if self.last_batch_iteration == -1:
            update_lr(self.optimizer.param_groups, self._starting_lrs())

    def _group_lrs(self) -> list[float]:
        """The lr each group was given by the user; when resuming, what a torch schedule left as `initial_lr` if
        there is one.
        """
        resumed = self.last_batch_iteration >= 0
        return [
            float(group.get("initial_lr", group["lr"]) if resumed else group["lr"])
            for group in self.optimizer.param_groups
        ]

    def get_lr(self) -> list[float]:
        """Learning rate per group at the current t. Before the first step it warns and returns the starting values."""
        if self.last_batch_iteration < 0:
            _logger.warning(
                "%s: attempting to get a learning rate before the schedule has started", type(self).__name__
            )
            return self._starting_lrs()
        return self._lrs(self.last_batch_iteration)

    def get_last_lr(self) -> list[float]:
        """Learning rates that the last `step` wrote, one per group. AssertionError if there was none."""
        assert self._last_lr is not None, "need to call step() first"
        return list(self._last_lr)

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Go to the next t, or to the given one, and write the groups."""
        self.last_batch_iteration = (
            self.last_batch_iteration + 1 if last_batch_iteration is None else last_batch_iteration
        )
        self._last_lr = update_lr(self.optimizer.param_groups, self.get_lr())

    def state_dict(self) -> dict[str, Any]:
        """t is all there is to keep."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore t. The groups are not written: their lr comes back with the optimizer's own state."""
        self.last_batch_iteration = state_dict["last_batch_iteration"]
        self._last_lr = self._lrs(self.last_batch_iteration) if self.last_batch_iteration >= 0 else None
