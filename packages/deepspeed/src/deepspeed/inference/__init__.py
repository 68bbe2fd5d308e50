"""Inference under upstream's paths; it lives in `ds_inference`. The engine with ragged batches is its serving half."""

from ds_inference import DeepSpeedInferenceConfig, InferenceEngine, default_inference_config, init_inference
from ds_inference.config import DeepSpeedTPConfig

__all__ = [
    "DeepSpeedInferenceConfig",
    "DeepSpeedTPConfig",
    "InferenceEngine",
    "default_inference_config",
    "init_inference",
]
