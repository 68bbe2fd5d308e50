"""Upstream's module of the inference engine; see `ds_inference.engine`."""

from ds_inference.engine import InferenceEngine

__all__ = ["InferenceEngine"]
