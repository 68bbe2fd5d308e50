"""The engine's side of a curriculum: the section `curriculum_learning` becomes an argument of the model's forward.

With curriculum_type "seqlen" a training forward gets `curriculum_seqlen`, the difficulty of the step that it belongs to
(steps count from 1), and the model cuts its sequences to it. Another type only moves the difficulty, which the loop
reads from `engine.curriculum_scheduler_legacy`. Nothing is saved with a checkpoint: the step says it all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deepspeed.config import ResolvedConfig
from deepspeed.errors import DeepSpeedConfigError
from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

__all__ = ["CurriculumMethods", "curriculum_of"]

SEQUENCE_LENGTH = "seqlen"


def curriculum_of(config: ResolvedConfig) -> CurriculumScheduler | None:
    """The scheduler that the config asks for, if any; DeepSpeedConfigError when its keys make none."""
    section = config.curriculum_learning
    if not section.enabled:
        return None
    try:
        return CurriculumScheduler(section.model_dump())
    except ValueError as problem:
        raise DeepSpeedConfigError(f"curriculum_learning: {problem} ({config.origin})") from None


class CurriculumMethods:
    """What an engine can do about the samples it is given; see `DeepSpeedEngine`."""

    _config: ResolvedConfig
    curriculum_scheduler_legacy: CurriculumScheduler | None
    training_dataloader: Any
    training: bool
    global_steps: int

    def curriculum_arguments(self) -> dict[str, Any]:
        """Move the difficulty to the present step; what its forwards get besides the caller's arguments."""
        if self.curriculum_scheduler_legacy is None or not self.training:
            return {}
        difficulty = self.curriculum_scheduler_legacy.update_difficulty(self.global_steps + 1)
        wanted = self._config.curriculum_learning.curriculum_type == SEQUENCE_LENGTH
        return {"curriculum_seqlen": difficulty} if wanted else {}

    def set_custom_curriculum_learning_schedule(self, schedule_func_dict: Mapping[str, Callable[[int], int]]) -> None:
        """The function of a custom curriculum: {curriculum_type: number of the step -> difficulty}.

        DeepSpeedConfigError when the config has no curriculum of that type.
        """
        scheduler, kind = self.curriculum_scheduler_legacy, self._config.curriculum_learning.curriculum_type
        if scheduler is None or kind is None or kind not in schedule_func_dict:
            raise DeepSpeedConfigError(
                f"there is no curriculum for {', '.join(map(repr, schedule_func_dict)) or 'an empty dict'}: the config "
                f"has curriculum_learning.enabled {scheduler is not None} and curriculum_type {kind!r}"
            )
        scheduler.set_custom_get_difficulty(schedule_func_dict[kind])

    def set_data_post_process_func(self, post_process_func: Callable[[Any, dict[str, Any]], Any]) -> None:
        """Pass every batch of the engine's own loader through `function(batch, state of its sampler)`.

        ValueError without such a loader.
        """
        if self.training_dataloader is None:
            raise ValueError(
                "set_data_post_process_func needs the engine's own loader; give deepspeed.initialize training_data"
            )
        self.training_dataloader.post_process_func = post_process_func
