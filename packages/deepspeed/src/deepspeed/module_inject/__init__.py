"""Kernel injection under upstream's path; it lives in `ds_inference.inject`. Names are imported on first use."""

from deepspeed._lazy import attach

_VERBS = ("InjectionPolicy", "generic_injection", "policies", "replace_transformer_layer", "revert_transformer_layer")

__getattr__, __dir__ = attach(__name__, {name: f"ds_inference.inject:{name}" for name in _VERBS}, ("replace_module",))
