"""How hard the samples of a step may be: upstream's curriculum schedules (Li et al. 2021, arXiv 2108.06084).

A *difficulty* is an integer, such as a sequence length; a *schedule* maps the number of a step, counted from 1, to it.
With p = step / total_curriculum_step and the bounds of the config:

    fixed_root       d = floor(p^(1/root_degree) * (max - min) + min), less d mod difficulty_step, at most max
    fixed_linear     the same with root_degree 1
    fixed_discrete   the first entry of `difficulty` whose `max_step` is at least the step; the last one afterwards
    custom           a function of the step, see `set_custom_get_difficulty`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deepspeed._lazy import explain_absent

__all__ = ["CurriculumScheduler"]

_KEYS = {
    "fixed_discrete": ("difficulty", "max_step"),
    "fixed_linear": ("total_curriculum_step", "difficulty_step"),
    "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
    "custom": (),
}


class CurriculumScheduler:
    """One schedule and the difficulty that was computed last.

    Args:
        config: the keys min_difficulty, max_difficulty, schedule_type and, but for custom, schedule_config.

    Raises:
        ValueError: a key is missing or unknown, or values contradict each other.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.minimum = self._bound(config, "min_difficulty")
        self.maximum = self._bound(config, "max_difficulty")
        self.schedule_type = config.get("schedule_type")
        if self.schedule_type not in _KEYS:
            raise ValueError(
                f"curriculum: schedule_type is {self.schedule_type!r}; expected one of {', '.join(sorted(_KEYS))}"
            )
        self.schedule = dict(config.get("schedule_config") or {})
        missing = [key for key in _KEYS[self.schedule_type] if self.schedule.get(key) is None]
        if missing:
            raise ValueError(
                f"curriculum: schedule_config of {self.schedule_type} lacks {', '.join(missing)}; it has "
                f"{', '.join(self.schedule) or 'no keys'}"
            )
        self._check_values()
        self.current_difficulty = self.minimum
        self._custom: Callable[[int], int] | None = None

    @staticmethod
    def _bound(config: Mapping[str, Any], key: str) -> int:
        if config.get(key) is None:
            raise ValueError(f"curriculum: {key} is missing; give the section one")
        return int(config[key])

    def _check_values(self) -> None:
        if self.maximum < self.minimum:
            raise ValueError(
                f"curriculum: max_difficulty {self.maximum} is below min_difficulty {self.minimum}; exchange them"
            )
        if self.schedule_type == "fixed_discrete":
            difficulties, steps = self.schedule["difficulty"], self.schedule["max_step"]
            if len(difficulties) != len(steps) + 1 or not difficulties:
                raise ValueError(
                    f"curriculum: {len(difficulties)} difficulties with {len(steps)} max_step; expected one difficulty "
                    "more than steps, the one that stays"
                )
        for key in ("total_curriculum_step", "difficulty_step", "root_degree"):
            if key in _KEYS[str(self.schedule_type)] and self.schedule[key] < 1:
                raise ValueError(f"curriculum: schedule_config.{key} is {self.schedule[key]}; expected at least 1")

    def get_difficulty(self, global_steps: int) -> int:
        """The difficulty of a step, counted from 1; RuntimeError for custom without a function."""
        if self.schedule_type == "custom":
            if self._custom is None:
                raise RuntimeError(
                    "curriculum: schedule_type custom has no function yet; call set_custom_get_difficulty(function), or"
                    " engine.set_custom_curriculum_learning_schedule({curriculum_type: function})"
                )
            return int(self._custom(global_steps))
        if self.schedule_type == "fixed_discrete":
            reached = sum(global_steps > step for step in self.schedule["max_step"])
            return int(self.schedule["difficulty"][reached])
        degree = self.schedule.get("root_degree", 1) if self.schedule_type == "fixed_root" else 1
        share = (global_steps / self.schedule["total_curriculum_step"]) ** (1.0 / degree)
        difficulty = int(share * (self.maximum - self.minimum) + self.minimum)
        difficulty -= difficulty % int(self.schedule["difficulty_step"])
        return min(difficulty, self.maximum)

    def update_difficulty(self, global_steps: int) -> int:
        """Compute the difficulty of a step, keep and return it; one that reached max_difficulty stays there."""
        if self.schedule_type == "custom" or self.current_difficulty < self.maximum:
            self.current_difficulty = self.get_difficulty(global_steps)
        return self.current_difficulty

    def get_current_difficulty(self) -> int:
        """The difficulty that was computed last; min_difficulty before."""
        return self.current_difficulty

    def set_current_difficulty(self, difficulty: int) -> None:
        """Go on from another difficulty."""
        self.current_difficulty = int(difficulty)

    def set_custom_get_difficulty(self, schedule_function: Callable[[int], int]) -> None:
        """The function of a custom schedule: number of the step -> difficulty."""
        self._custom = schedule_function

    def get_state(self) -> dict[str, Any]:
        """What `set_state` takes: the last difficulty and what made it."""
        return {
            "min_difficulty": self.minimum,
            "max_difficulty": self.maximum,
            "current_difficulty": self.current_difficulty,
            "schedule_type": self.schedule_type,
            "schedule": dict(self.schedule),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `get_state`; ValueError where its schedule is another."""
        if state["schedule_type"] != self.schedule_type or dict(state["schedule"]) != self.schedule:
            raise ValueError(
                f"curriculum: the state is of {state['schedule_type']} with {dict(state['schedule'])}, this schedule "
                f"is {self.schedule_type} with {self.schedule}; make the scheduler with the saved config"
            )
        self.current_difficulty = int(state["current_difficulty"])


explain_absent(__name__)
