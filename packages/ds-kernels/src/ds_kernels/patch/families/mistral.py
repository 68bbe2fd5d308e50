"""Mistral."""

from __future__ import annotations

from ds_kernels.patch.forwards import (
    flash_interface,
    gated_mlp,
    no_interface,
    no_rope,
    not_gated,
    rms_norm_with,
    rotary_attention,
)
from ds_kernels.patch.losses import causal_lm, causal_unfit
from ds_kernels.patch.rules import Family, Rule

__all__ = ["FAMILY"]

FAMILY = Family(
    "mistral",
    (
        Rule("norm", "MistralRMSNorm", rms_norm_with("variance_epsilon", 0.0)),
        Rule("mlp", "MistralMLP", gated_mlp, not_gated),
        Rule("rope", "MistralAttention", rotary_attention, no_rope),
        Rule("attention", "MistralAttention", flash_interface, no_interface),
        Rule("loss", "MistralForCausalLM", causal_lm("model", "CausalLMOutputWithPast"), causal_unfit),
    ),
)
