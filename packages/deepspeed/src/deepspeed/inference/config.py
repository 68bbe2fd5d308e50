"""Upstream's module of the inference configuration; see `ds_inference.config`."""

from ds_inference.config import (
    ActivationQuantConfig,
    DeepSpeedInferenceConfig,
    DeepSpeedMoEConfig,
    DeepSpeedTPConfig,
    InferenceCheckpointConfig,
    QKVQuantConfig,
    QuantizationConfig,
    WeightQuantConfig,
)

__all__ = [
    "ActivationQuantConfig",
    "DeepSpeedInferenceConfig",
    "DeepSpeedMoEConfig",
    "DeepSpeedTPConfig",
    "InferenceCheckpointConfig",
    "QKVQuantConfig",
    "QuantizationConfig",
    "WeightQuantConfig",
]
