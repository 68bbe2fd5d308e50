"""Inference under upstream's paths; it lives in `ds_inference`. Names are imported on first use."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "DeepSpeedInferenceConfig": "ds_inference.config:DeepSpeedInferenceConfig",
        "DeepSpeedTPConfig": "ds_inference.config:DeepSpeedTPConfig",
        "InferenceEngine": "ds_inference.engine:InferenceEngine",
        "default_inference_config": "ds_inference.config:default_inference_config",
        "init_inference": "ds_inference.initialize:init_inference",
    },
    ("config", "engine", "quantization"),
)
