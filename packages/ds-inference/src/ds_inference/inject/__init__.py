"""Kernel injection: known models computed by ds-kernels instead of their own modules, with the way back.

Causal language models are read into a decoder (`ds_inference.decoder`) that the engine generates with; their modules
get kernels where ds-kernels knows them. Encoders of BERT's kind get layers of fused projections. Every injection
compares outputs before and after, and a model that it would change is refused and left as it was.
"""

from __future__ import annotations

from ds_inference.inject.injection import Injection, inject, inject_parts, injection_of, revert
from ds_inference.inject.replace import (
    InjectionPolicy,
    generic_injection,
    policies,
    replace_transformer_layer,
    revert_transformer_layer,
)

__all__ = [
    "Injection",
    "InjectionPolicy",
    "generic_injection",
    "inject",
    "inject_parts",
    "injection_of",
    "policies",
    "replace_transformer_layer",
    "revert",
    "revert_transformer_layer",
]
