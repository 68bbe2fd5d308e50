"""Qwen2 and Qwen2.5."""

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
    "qwen2",
    (
        Rule("norm", "Qwen2RMSNorm", rms_norm_with("variance_epsilon", 0.0)),
        Rule("mlp", "Qwen2MLP", gated_mlp, not_gated),
        Rule("rope", "Qwen2Attention", rotary_attention, no_rope),
        Rule("attention", "Qwen2Attention", flash_interface, no_interface),
        Rule("loss", "Qwen2ForCausalLM", causal_lm("model", "CausalLMOutputWithPast"), causal_unfit),
    ),
)
