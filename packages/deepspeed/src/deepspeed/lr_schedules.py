"""The five learning rate schedules of DeepSpeed, as closed forms of the number of steps taken.

Vocabulary: t = `last_batch_iteration`, -1 before the first `step()`, 0 after it. A schedule computes the learning
rate of every parameter group from t alone, so resuming needs t only. Bounds may be one number for all groups or a
list with one per group; groups never share a value by accident.

Invariants
- Building a schedule at t = -1 writes the starting learning rate into the groups; at t >= 0 (resuming) it leaves
  them alone.
- A group's lr that is a tensor is filled in place (fused and captured optimizers hold on to it).
- `get_last_lr()` is an AssertionError ("need to call step() first") until a step was taken: clients tell warm-up by
  that text.

Sources: LRRangeTest and OneCycle from L. N. Smith, "Cyclical Learning Rates for Training Neural Networks" (2017) and
"A Disciplined Approach to Neural Network Hyper-Parameters" (2018); cosine decay from I. Loshchilov and F. Hutter,
"SGDR" (2017).
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from deepspeed._lr_base import PerGroup, Schedule, get_torch_optimizer, per_group, positive_int, update_lr

__all__ = [
    "LR_RANGE_TEST",
    "ONE_CYCLE",
    "VALID_LR_SCHEDULES",
    "WARMUP_COSINE_LR",
    "WARMUP_DECAY_LR",
    "WARMUP_LINEAR_RATE",
    "WARMUP_LOG_RATE",
    "WARMUP_LR",
    "LRRangeTest",
    "OneCycle",
    "Schedule",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "get_torch_optimizer",
    "make_schedule",
    "update_lr",
]

LR_RANGE_TEST = "LRRangeTest"
ONE_CYCLE = "OneCycle"
WARMUP_LR = "WarmupLR"
WARMUP_DECAY_LR = "WarmupDecayLR"
WARMUP_COSINE_LR = "WarmupCosineLR"
VALID_LR_SCHEDULES = [LR_RANGE_TEST, ONE_CYCLE, WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR]

WARMUP_LOG_RATE = "log"
WARMUP_LINEAR_RATE = "linear"

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
    decay. Bounds are per group where given as lists. beta2 is 0.99 throughout, as upstream has it.
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
            self._write_momentum([(mom, 0.99) for mom in self.max_moms])

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
            return [(mom, 0.99) for mom in self.max_moms]
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


def _warmup_gamma(t: int, num_steps: int, warmup_type: str) -> float:
    """Share of the way up at t: log(t + 1) / log(N) or t / N below N, else 1."""
    if t >= num_steps:
        return 1.0
    return math.log(t + 1) / math.log(num_steps) if warmup_type == WARMUP_LOG_RATE else t / num_steps


def _warmup_kind(warmup_type: str) -> str:
    if warmup_type in (WARMUP_LOG_RATE, WARMUP_LINEAR_RATE):
        return warmup_type
    _logger.warning(
        "unknown warmup_type %r; using the default, %r (the other is %r)",
        warmup_type,
        WARMUP_LOG_RATE,
        WARMUP_LINEAR_RATE,
    )
    return WARMUP_LOG_RATE


class WarmupLR(Schedule):
    """Go up from `warmup_min_lr` to `warmup_max_lr` in N steps, logarithmically or linearly, and stay there.

    `warmup_max_lr` None is each group's own lr at construction. N is at least 2; ValueError unless
    `warmup_num_steps` is a positive int.
    """

    def __init__(
        self,
        optimizer: Any,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = WARMUP_LOG_RATE,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        num_groups = len(self.optimizer.param_groups)
        self.min_lrs = per_group("warmup_min_lr", warmup_min_lr, num_groups)
        self.max_lrs = (
            self._group_lrs() if warmup_max_lr is None else per_group("warmup_max_lr", warmup_max_lr, num_groups)
        )
        self.warmup_num_steps = max(2, positive_int("warmup_num_steps", warmup_num_steps))
        self.warmup_type = _warmup_kind(warmup_type)
        self._write_start()

    def _starting_lrs(self) -> list[float]:
        return list(self.min_lrs)

    def _gamma(self, t: int) -> float:
        return _warmup_gamma(t, self.warmup_num_steps, self.warmup_type)

    def _lrs(self, t: int) -> list[float]:
        gamma = self._gamma(t)
        return [low + (high - low) * gamma for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]


class WarmupDecayLR(WarmupLR):
    """WarmupLR, then linear decay to `warmup_min_lr` at `total_num_steps`: gamma = max(0, (total - t) / max(1, total
    - N)).
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = WARMUP_LOG_RATE,
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = total_num_steps
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)
        if total_num_steps < warmup_num_steps:
            _logger.warning("total_num_steps %s is less than warmup_num_steps %s", total_num_steps, warmup_num_steps)

    def _gamma(self, t: int) -> float:
        if t < self.warmup_num_steps:
            return super()._gamma(t)
        return max(0.0, (self.total_num_steps - t) / max(1.0, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(Schedule):
    """Multiply each group's own lr by a ratio: up from `warmup_min_ratio` in N steps, then a cosine down to
    `cos_min_ratio` at `total_num_steps`.

    After warm-up, p = min(1, (t - N + 1) / max(1, total - N)) and ratio = cos_min + (1 - cos_min) * (1 + cos(pi p))
    / 2. Before the first step the lr is 0, as upstream has it.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = WARMUP_LOG_RATE,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.total_num_steps = total_num_steps
        self.warmup_min_ratio = warmup_min_ratio
        self.cos_min_ratio = cos_min_ratio
        self.warmup_num_steps = max(2, positive_int("warmup_num_steps", warmup_num_steps))
        self.warmup_type = _warmup_kind(warmup_type)
        self.org_lrs = self._group_lrs()
        if total_num_steps < warmup_num_steps:
            _logger.warning("total_num_steps %s is less than warmup_num_steps %s", total_num_steps, warmup_num_steps)
        self._write_start()

    def _starting_lrs(self) -> list[float]:
        return [0.0] * len(self.org_lrs)

    def get_lr_ratio(self) -> float:
        """The factor on every group's own lr at the current t; 0 before the first step, with a warning."""
        if self.last_batch_iteration < 0:
            _logger.warning("WarmupCosineLR: attempting to get a learning rate before the schedule has started")
            return 0.0
        return self._ratio(self.last_batch_iteration)

    def _ratio(self, t: int) -> float:
        if t < self.warmup_num_steps:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * _warmup_gamma(
                t, self.warmup_num_steps, self.warmup_type
            )
        done = min(1.0, (t - self.warmup_num_steps + 1) / max(1, self.total_num_steps - self.warmup_num_steps))
        return max(0.0, self.cos_min_ratio + (1 - self.cos_min_ratio) * (1 + math.cos(math.pi * done)) / 2)

    def _lrs(self, t: int) -> list[float]:
        ratio = self._ratio(t)
        return [lr * ratio for lr in self.org_lrs]


_SCHEDULES: dict[str, type[Schedule]] = {
    cls.__name__: cls for cls in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}


def make_schedule(name: str, optimizer: Any, params: dict[str, Any]) -> Any:
    """The schedule of a `scheduler` section: one of the five, or a class of torch.optim.lr_scheduler, built as
    `cls(optimizer, **params)`.

    Raises ValueError naming the schedule and its parameters when they do not fit its signature.
    """
    cls = _SCHEDULES[name] if name in _SCHEDULES else getattr(torch.optim.lr_scheduler, name, None)
    if not callable(cls):
        raise ValueError(
            f"there is no schedule {name!r}; known: {', '.join(VALID_LR_SCHEDULES)} and the classes of "
            "torch.optim.lr_scheduler"
        )
    try:
        inspect.signature(cls).bind(optimizer, **params)
    except TypeError as error:
        raise ValueError(
            f"scheduler {name}: {error}; its parameters are {inspect.signature(cls)}, given were {sorted(params)}"
        ) from None
    return cls(optimizer, **params)
