"""What a module's name says: the rules by which tensor parallelism knows its role without knowing the model.

These are the names that upstream's AutoTP goes by, and those of further families. A role is only a guess; `plan` checks
every guess against the shapes. The layout of a fused query/key/value projection cannot be seen in shapes, and a wrong
one would give wrong text: it is known by model type or not at all.
"""

from __future__ import annotations

import re

__all__ = [
    "block_of",
    "collapsed",
    "fused_layout",
    "is_fused_pair",
    "is_head_norm",
    "is_key_or_value",
    "is_layer_norm",
    "is_position",
    "is_query",
    "is_qkv",
    "is_replicated",
    "is_row",
    "last",
]

_QUERY = {"q_proj", "query", "wq", "q_lin", "q_b_proj", "kv_b_proj", "q"}
_KEY_VALUE = {"k_proj", "v_proj", "key", "value", "wk", "wv", "k_lin", "v_lin", "k", "v"}
_QKV = {"query_key_value", "qkv_proj", "c_attn", "Wqkv", "W_pack", "wqkv", "qkv"}
_PAIR = {"gate_up_proj", "dense_h_to_4h", "Wi"}
_ROW = {
    "o_proj",
    "out_proj",
    "down_proj",
    "dense_4h_to_h",
    "w2",
    "c_proj",
    "wo",
    "Wo",
    "fc2",
    "fc_out",
    "lin2",
    "out_lin",
}
_ROW_ENDS = ("attention.dense", "self_attention.dense", "self_attn.dense", "output.dense", "SelfAttention.o")
_REPLICATED_ENDS = (
    "mlp.gate",
    "block_sparse_moe.gate",
    "shared_expert_gate",
    "router",
    "router.layer",
    "q_a_proj",
    "kv_a_proj_with_mqa",
)
_LAYER_NORMS = {"LayerNorm", "layer_norm", "ln_1", "ln_2"}

_LAYOUTS = {
    "qkv": {"gpt2", "phi3", "phi4_multimodal", "mpt", "baichuan", "chatglm", "qwen", "dbrx"},
    "groups": {"gpt_neox", "bloom", "falcon", "internlm2", "persimmon", "gpt_bigcode"},
}


def last(name: str) -> str:
    return name.rpartition(".")[2]


def block_of(name: str) -> str:
    """The repeated block that a module is in, such as model.layers.3: up to the first number; "" outside of any."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
    return found.group() if found else ""


def collapsed(name: str) -> str:
    """The name with its numbers as stars, the same for all blocks."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def is_query(name: str) -> bool:
    return last(name) in _QUERY


def is_key_or_value(name: str) -> bool:
    return last(name) in _KEY_VALUE


def is_qkv(name: str) -> bool:
    return last(name) in _QKV


def fused_layout(model_type: str) -> str | None:
    """How a fused projection is laid out: "qkv" one after the other, "groups" per key/value head; None: not known."""
    return next((layout for layout, types in _LAYOUTS.items() if model_type in types), None)


def is_fused_pair(name: str) -> bool:
    """Whether gate and up may be one matrix here; whether they are, the sizes say."""
    return last(name) in _PAIR


def is_row(name: str) -> bool:
    return last(name) in _ROW or "down_proj" in last(name) or name.endswith(_ROW_ENDS)


def is_replicated(name: str) -> bool:
    return any(name == end or name.endswith("." + end) for end in _REPLICATED_ENDS)


def is_layer_norm(name: str) -> bool:
    return last(name) in _LAYER_NORMS


def is_head_norm(name: str) -> bool:
    """A norm of queries or keys."""
    return re.fullmatch(r"[qk](uery|ey)?_?(layer)?_?(norm|layernorm|ln)", last(name)) is not None


def is_position(name: str) -> bool:
    return re.search(r"position|wpe|token_type", name) is not None
