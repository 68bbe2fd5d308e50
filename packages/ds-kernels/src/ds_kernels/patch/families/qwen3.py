"""Qwen3; its attention normalises queries and keys, by the same class of norm."""

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
    "qwen3",
    (
        Rule("norm", "Qwen3RMSNorm", rms_norm_with("variance_epsilon", 0.0)),
        Rule("mlp", "Qwen3MLP", gated_mlp, not_gated),
        Rule("rope", "Qwen3Attention", rotary_attention, no_rope),
        Rule("attention", "Qwen3Attention", flash_interface, no_interface),
        Rule("loss", "Qwen3ForCausalLM", causal_lm("model", "CausalLMOutputWithPast"), causal_unfit),
    ),
)
