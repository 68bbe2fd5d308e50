"""Upstream's path of the pipeline engine."""

from deepspeed.pipeline_engine import PipelineEngine
from ds_pipe import PipelineError

__all__ = ["PipelineEngine", "PipelineError"]
