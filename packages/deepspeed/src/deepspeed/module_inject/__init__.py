"""Kernel injection and tensor parallelism under upstream's path; they live in `ds_inference`."""

from ds_inference.inject import (
    InjectionPolicy,
    generic_injection,
    policies,
    replace_transformer_layer,
    revert_transformer_layer,
)

__all__ = [
    "InjectionPolicy",
    "generic_injection",
    "policies",
    "replace_transformer_layer",
    "revert_transformer_layer",
]
