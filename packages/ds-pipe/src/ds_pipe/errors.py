"""What ds-pipe raises when a plan cannot be made or is wrong; each class is also the builtin that says as much.

ValueError
 +- ScheduleError      a schedule that breaks a rule, or cannot be generated from these numbers
 +- PartitionError     layers that cannot be split into these stages
RuntimeError
 +- PipelineError      a run that cannot go on: ranks, shapes, data or a peer that failed
"""

from __future__ import annotations

__all__ = ["PartitionError", "PipelineError", "ScheduleError"]


class ScheduleError(ValueError):
    """A schedule, a program or their numbers break a rule; the text names the stage, the action and the rule."""


class PartitionError(ValueError):
    """Layers cannot be split into the stages asked for; the text gives both counts and what to change."""


class PipelineError(RuntimeError):
    """A pipeline cannot be set up or cannot go on; the text names the stage and what to change."""
