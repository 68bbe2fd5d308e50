"""Upstream's module of the training layer; see `ds_kernels.transformer`."""

from ds_kernels.transformer import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer, TransformerConfig

__all__ = ["DeepSpeedTransformerConfig", "DeepSpeedTransformerLayer", "TransformerConfig"]
