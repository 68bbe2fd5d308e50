"""Upstream's module of the inference configuration; see `ds_inference.config`."""

from deepspeed._lazy import explain_absent
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

explain_absent(__name__)
