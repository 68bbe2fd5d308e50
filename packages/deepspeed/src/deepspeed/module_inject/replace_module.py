"""Upstream's module of the injection verbs; see `ds_inference.inject`."""

from deepspeed._lazy import explain_absent
from ds_inference.inject import generic_injection, replace_transformer_layer, revert_transformer_layer

__all__ = ["generic_injection", "replace_transformer_layer", "revert_transformer_layer"]

explain_absent(__name__)
