"""LRRangeTest and OneCycle: schedules after L. N. Smith. See `lr_schedules` for vocabulary and invariants."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from deepspeed._lr_base import PerGroup, Schedule, per_group, positive_int

__all__ = ["LRRangeTest", "OneCycle"]

_logger = logging.getLogger("DeepSpeed")


class LRRangeTest(Schedule):
    """Raise the lr from step to step to find the range that trains: min_lr * (1 + step_rate * i), i = (t + 1) /
    step_size.

    `lr_range_test_staircase` rounds i down. ValueError for a step size that is no positive int, or a list of another
    length than the groups.
    """

    def __init__(
        self,
        optimizer: Any,
        lr_range_test_min_lr: PerGroup = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.min_lr = per_group("lr_range_test_min_lr", lr_range_test_min_lr, len(self.optimizer.param_groups))
        self.step_size = positive_int("lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        self._write_start()

    def _starting_lrs(self) -> list[float]:
        return list(self.min_lr)

    def _lrs(self, t: int) -> list[float]:
        interval = (t + 1) / self.step_size
        growth = 1 + self.step_rate * (math.floor(interval) if self.staircase else interval)
        return [lr * growth for lr in self.min_lr]


class OneCycle(Schedule):
    """One cycle up and down between two bounds, then decay; optionally with the momentum (Adam's beta1) moving the
    other way.

    With total = first + second, b = t + 1 and x = (b mod total) / total while t < total:
    up (x <= first/total) s = x / (first/total), down s = (x - 1) / (first/total - 1); lr = min + (max - min) * s;
    beta1 = max_mom - (max_mom - min_mom) * s. A stair count c > 0 of a phase rounds its s down to a multiple of 1/c.
    Afterwards, with n = t - total + 1 and d = n / decay_step_size:
    lr = min / (1 + decay_lr_rate * d), beta1 = max_mom * (1 + decay_mom_rate * d); a rate or step size of 0 means no
    decay. Bounds are per group where given as lists. beta2 is 0.99 throughout and beta1 starts at its minimum, as
    upstream has it.
    """

    def __init__(
        self,
        optimizer: Any,
        cycle_min_lr: PerGroup,
        cycle_max_lr: PerGroup,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: PerGroup = 0.8,
        cycle_max_mom: PerGroup = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        num_groups = len(self.optimizer.param_groups)
        first = positive_int("cycle_first_step_size", cycle_first_step_size)
        second = (
            first if cycle_second_step_size is None else positive_int("cycle_second_step_size", cycle_second_step_size)
        )
        self.first_size, self.second_size, self.total_size = first, second, first + second
        second_stairs = cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        self.stair_counts = (cycle_first_stair_count, second_stairs)
        self.decay_step_size = decay_step_size
        self.decay_rates = (decay_lr_rate, decay_mom_rate)
        self.min_lrs = per_group("cycle_min_lr", cycle_min_lr, num_groups)
        self.max_lrs = per_group("cycle_max_lr", cycle_max_lr, num_groups)
        self.cycle_momentum = cycle_momentum
        if cycle_momentum and "betas" not in self.optimizer.defaults:
            _logger.warning("OneCycle: %s has no betas, so cycle_momentum is off", type(self.optimizer).__name__)
            self.cycle_momentum = False
        self.min_moms = per_group("cycle_min_mom", cycle_min_mom, num_groups)
        self.max_moms = per_group("cycle_max_mom", cycle_max_mom, num_groups)
        self._write_start()
        if last_batch_iteration == -1 and self.cycle_momentum:
            self._write_momentum([(mom, 0.99) for mom in self.min_moms])

    def _starting_lrs(self) -> list[float]:
        return list(self.min_lrs)

    def _height(self, t: int) -> float:
        """s: how far up the cycle t is, from 0 to 1. Whole numbers keep a stair's edge where it belongs."""
        position = (t + 1) % self.total_size
        up = position <= self.first_size
        done, size = (position, self.first_size) if up else (self.total_size - position, self.second_size)
        stairs = self.stair_counts[0 if up else 1]
        return done * stairs // size / stairs if stairs > 0 else done / size

    def _decay(self, t: int, rate: float) -> float:
        return (
            1 + rate * (t - self.total_size + 1) / self.decay_step_size
            if self.decay_step_size > 0 and rate != 0
            else 1.0
        )

    def _lrs(self, t: int) -> list[float]:
        if t < self.total_size:
            height = self._height(t)
            return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]
        return [low / self._decay(t, self.decay_rates[0]) for low in self.min_lrs]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """Betas per group at the current t, None when momentum is not cycled."""
        if not self.cycle_momentum:
            return None
        t = self.last_batch_iteration
        if t < 0:
            return [(mom, 0.99) for mom in self.min_moms]
        if t < self.total_size:
            height = self._height(t)
            return [
                (high - (high - low) * height, 0.99) for low, high in zip(self.min_moms, self.max_moms, strict=True)
            ]
        return [(high * self._decay(t, self.decay_rates[1]), 0.99) for high in self.max_moms]

    def _write_momentum(self, betas: Sequence[tuple[float, float]]) -> None:
        for group, pair in zip(self.optimizer.param_groups, betas, strict=True):
            group["betas"] = pair

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Go to the next t, or to the given one, and write lr and betas of the groups."""
        super().step(last_batch_iteration)
        betas = self.get_mom()
        if betas is not None:
            self._write_momentum(betas)
