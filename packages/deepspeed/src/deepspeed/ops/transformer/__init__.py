"""The BERT-style training layer under upstream's path; it lives in `ds_kernels.transformer`."""

from deepspeed.ops.transformer.transformer import (
    DeepSpeedTransformerConfig,
    DeepSpeedTransformerLayer,
    TransformerConfig,
)

__all__ = ["DeepSpeedTransformerConfig", "DeepSpeedTransformerLayer", "TransformerConfig"]
