"""WarmupLR, WarmupDecayLR and WarmupCosineLR. See `lr_schedules` for vocabulary and invariants."""

from __future__ import annotations

import logging
import math
from typing import Any

from deepspeed._lr_base import PerGroup, Schedule, per_group

__all__ = ["WARMUP_LINEAR_RATE", "WARMUP_LOG_RATE", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]

WARMUP_LOG_RATE = "log"
WARMUP_LINEAR_RATE = "linear"

_logger = logging.getLogger("DeepSpeed")


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


def _warmup_steps(steps: Any) -> int:
    """N. 0 is what clients send that want no warmup; like 1, it is the shortest there is."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"warmup_num_steps must be an integer of at least 0, got {steps!r}")
    return max(2, steps)


class WarmupLR(Schedule):
    """Go up from `warmup_min_lr` to `warmup_max_lr` in N steps, logarithmically or linearly, and stay there.

    `warmup_max_lr` None is each group's own lr at construction. N is at least 2 (0 and 1 count as 2);
    ValueError unless `warmup_num_steps` is an int of at least 0.
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
        self.warmup_num_steps = _warmup_steps(warmup_num_steps)
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
        self.warmup_num_steps = _warmup_steps(warmup_num_steps)
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
