"""Upstream's module of quantised layers; see `ds_inference.quantization`."""

from ds_inference import QuantizedLinear

__all__ = ["QuantizedLinear"]
