"""Upstream's path of the pipeline engine."""

from deepspeed._lazy import explain_absent
from deepspeed.pipeline_engine import PipelineEngine
from ds_pipe import PipelineError

__all__ = ["PipelineEngine", "PipelineError"]

explain_absent(__name__)
