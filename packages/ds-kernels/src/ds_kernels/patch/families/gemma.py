"""Gemma (1): norm weights are stored around zero, the MLP is gated by gelu."""

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
    "gemma",
    (
        Rule("norm", "GemmaRMSNorm", rms_norm_with("eps", 1.0)),
        Rule("mlp", "GemmaMLP", gated_mlp, not_gated),
        Rule("rope", "GemmaAttention", rotary_attention, no_rope),
        Rule("attention", "GemmaAttention", flash_interface, no_interface),
        Rule("loss", "GemmaForCausalLM", causal_lm("model", "CausalLMOutputWithPast"), causal_unfit),
    ),
)
