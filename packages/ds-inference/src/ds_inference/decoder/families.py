"""The families of Hugging Face causal language models that are known: where each keeps what, and what it computes.

A family is data: names of modules within the trunk (the model without its head) and within a layer, and the choices
that shapes and configuration do not show. What a configuration may say otherwise is read from it (`reader`), or has to
have one value (`demands`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclasses.dataclass(frozen=True)
class Family:
    """Names are dotted paths; those of a layer's parts start at the layer.

    Attributes:
        trunk, embedding, layers, final_norm: of the model.
        norm: rms or layer.
        norm_offset: added to the norms' weights.
        attention: the module that has head_dim and scaling.
        qkv: one fused projection, or queries, keys and values.
        up: one projection; gated, gate and up, or both fused in this order.
        gated: whether the MLP multiplies by a gate.
        activation: the configuration's key.
        mlp_norm: None: the MLP reads what the attention's norm gave, beside it.
        head_norms: of queries and keys; optional ones may be missing in a model.
        out_norms: of attention's and the MLP's results.
        positions: of learned positions; None: rotary.
        position_offset: rows in front of position 0.
        window: "none"; "config": the configuration's sliding_window for all layers; "layers": by its layer_types.
        rope_layers: the configuration's key of the flags that say which layers have a rotary embedding.
        demands: configuration values without which it computes something else; keys that are missing are right.
    """

    trunk: str = "model"
    embedding: str = "embed_tokens"
    layers: str = "layers"
    final_norm: str = "norm"
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    mlp_norm: str | None = "post_attention_layernorm"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    gated: bool = True
    activation: str = "hidden_act"
    head_norms: tuple[str, str] | None = None
    out_norms: tuple[str, str] | None = None
    positions: str | None = None
    position_offset: int = 0
    window: Literal["none", "config", "layers"] = "none"
    rope_layers: str | None = None
    attention_softcap: bool = False
    logit_softcap: bool = False
    demands: tuple[tuple[str, Any], ...] = ()


_LLAMA = Family()
_GEMMA = dataclasses.replace(_LLAMA, norm_offset=1.0, demands=(("use_bidirectional_attention", False),))
_GEMMA2 = dataclasses.replace(
    _GEMMA,
    mlp_norm="pre_feedforward_layernorm",
    out_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    activation="hidden_activation",
    window="layers",
    logit_softcap=True,
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": dataclasses.replace(_LLAMA, window="config"),
    "qwen2": dataclasses.replace(_LLAMA, window="layers"),
    "qwen3": dataclasses.replace(_LLAMA, window="layers", head_norms=("self_attn.q_norm", "self_attn.k_norm")),
    "smollm3": dataclasses.replace(_LLAMA, window="layers", rope_layers="no_rope_layers"),
    "gemma": _GEMMA,
    "gemma2": dataclasses.replace(_GEMMA2, attention_softcap=True),
    "gemma3_text": dataclasses.replace(_GEMMA2, head_norms=("self_attn.q_norm", "self_attn.k_norm")),
    "phi3": dataclasses.replace(_LLAMA, qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",), window="config"),
    "phi": dataclasses.replace(
        _LLAMA,
        norm="layer",
        final_norm="final_layernorm",
        output="self_attn.dense",
        mlp_norm=None,
        up=("mlp.fc1",),
        down="mlp.fc2",
        gated=False,
        head_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    ),
    "gpt2": Family(
        trunk="transformer",
        embedding="wte",
        layers="h",
        final_norm="ln_f",
        norm="layer",
        attention="attn",
        attention_norm="ln_1",
        qkv=("attn.c_attn",),
        output="attn.c_proj",
        mlp_norm="ln_2",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        gated=False,
        activation="activation_function",
        positions="wpe",
        demands=(("add_cross_attention", False),),
    ),
    "opt": Family(
        trunk="model.decoder",
        final_norm="final_layer_norm",
        norm="layer",
        attention_norm="self_attn_layer_norm",
        output="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        up=("fc1",),
        down="fc2",
        gated=False,
        activation="activation_function",
        positions="embed_positions",
        position_offset=2,
        demands=(("do_layer_norm_before", True), ("_remove_final_layer_norm", False)),
    ),
}
"""By the configuration's model_type."""


def family_of(config: Any) -> Family | None:
    """The family of a transformers configuration, or None."""
    return FAMILIES.get(str(getattr(config, "model_type", "")))
