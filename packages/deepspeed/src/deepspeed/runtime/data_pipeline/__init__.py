"""Upstream's paths of curriculum schedules, indexed data and batches of bounded length; imported on first use."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(__name__, {}, ("curriculum_scheduler", "data_sampling"))
