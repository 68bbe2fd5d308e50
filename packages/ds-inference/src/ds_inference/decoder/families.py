"""The families of Hugging Face causal language models that are known: where each keeps what, and what it computes.

A family is data: names of modules within the trunk (the model without its head) and within a layer, and the choices
that shapes and configuration do not show. What a configuration may say otherwise is read from it (`reader`), or has to
have one value (`demands`). Names are dotted paths.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

__all__ = ["FAMILIES", "Family", "LayerParts", "family_of"]


@dataclasses.dataclass(frozen=True)
class LayerParts:
    """Where a layer keeps what.

    Attributes:
        attention: the module that has head_dim and scaling.
        qkv: one fused projection, or queries, keys and values.
        output: what attention ends with.
        up: one projection; gated: gate and up, or both fused in this order.
        attention_norm: before attention.
        mlp_norm: before the MLP; None: it reads what attention_norm gave, beside attention.
        head_norms: of queries and keys; they may be missing in a model.
        out_norms: of attention's and the MLP's results.
    """

    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    head_norms: tuple[str, str] | None = None
    out_norms: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """What the models of one model_type have in common.

    Attributes:
        trunk, embedding, layers, final_norm: where the model keeps them.
        parts: where a layer keeps its own.
        norm: rms or layer.
        norm_offset: added to the norms' weights.
        gated: whether the MLP multiplies by a gate.
        activation: the configuration's key.
        positions: where learned positions are; None: rotary.
        position_offset: rows in front of position 0.
        window: "none"; "config": the configuration's sliding_window for all layers; "layers": by its layer_types.
        rope_layers: the configuration's key of the flags that say which layers have a rotary embedding.
        attention_softcap, logit_softcap: whether the configuration's are applied.
        demands: configuration values without which it computes something else; keys that are missing are right.
    """

    trunk: str = "model"
    embedding: str = "embed_tokens"
    layers: str = "layers"
    final_norm: str = "norm"
    parts: LayerParts = LayerParts()
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    gated: bool = True
    activation: str = "hidden_act"
    positions: str | None = None
    position_offset: int = 0
    window: Literal["none", "config", "layers"] = "none"
    rope_layers: str | None = None
    attention_softcap: bool = False
    logit_softcap: bool = False
    demands: tuple[tuple[str, Any], ...] = ()


_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_SANDWICH = LayerParts(
    mlp_norm="pre_feedforward_layernorm", out_norms=("post_attention_layernorm", "post_feedforward_layernorm")
)
_GEMMA = Family(norm_offset=1.0, demands=(("use_bidirectional_attention", False),))
_GEMMA2 = dataclasses.replace(
    _GEMMA, parts=_SANDWICH, activation="hidden_activation", window="layers", logit_softcap=True
)

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(window="config"),
    "qwen2": Family(window="layers"),
    "qwen3": Family(parts=LayerParts(head_norms=_HEAD_NORMS), window="layers"),
    "smollm3": Family(window="layers", rope_layers="no_rope_layers"),
    "gemma": _GEMMA,
    "gemma2": dataclasses.replace(_GEMMA2, attention_softcap=True),
    "gemma3_text": dataclasses.replace(_GEMMA2, parts=dataclasses.replace(_SANDWICH, head_norms=_HEAD_NORMS)),
    "phi3": Family(parts=LayerParts(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)), window="config"),
    "phi": Family(
        final_norm="final_layernorm",
        parts=LayerParts(
            output="self_attn.dense",
            up=("mlp.fc1",),
            down="mlp.fc2",
            mlp_norm=None,
            head_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        ),
        norm="layer",
        gated=False,
    ),
    "gpt2": Family(
        trunk="transformer",
        embedding="wte",
        layers="h",
        final_norm="ln_f",
        parts=LayerParts(
            attention="attn",
            qkv=("attn.c_attn",),
            output="attn.c_proj",
            up=("mlp.c_fc",),
            down="mlp.c_proj",
            attention_norm="ln_1",
            mlp_norm="ln_2",
        ),
        norm="layer",
        gated=False,
        activation="activation_function",
        positions="wpe",
        demands=(("add_cross_attention", False),),
    ),
    "opt": Family(
        trunk="model.decoder",
        final_norm="final_layer_norm",
        parts=LayerParts(
            output="self_attn.out_proj",
            up=("fc1",),
            down="fc2",
            attention_norm="self_attn_layer_norm",
            mlp_norm="final_layer_norm",
        ),
        norm="layer",
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
