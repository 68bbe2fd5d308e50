"""Small transformers models with random weights, one per family, for the tests of tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch

WORDS = 96
_COMMON: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
_LLAMA: dict[str, Any] = {
    **_COMMON,
    "intermediate_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_HEADS: dict[str, Any] = {**_COMMON, "num_attention_heads": 6, "max_position_embeddings": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "tie_word_embeddings": True},
    "mistral": {**_LLAMA, "sliding_window": 8},
    "qwen2": {**_LLAMA},
    "qwen3": {**_LLAMA},
    "gemma": {**_LLAMA},
    "gemma2": {**_LLAMA, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": {**_LLAMA, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "smollm3": {**_LLAMA, "pad_token_id": 0},
    "phi": {**_LLAMA, "partial_rotary_factor": 0.5},
    "phi3": {**_LLAMA, "rope_scaling": None},
    "gpt2": {"vocab_size": WORDS, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64},
    "opt": {
        **_COMMON,
        "ffn_dim": 64,
        "num_attention_heads": 6,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 48,
    },
    "bert": {**_COMMON, "intermediate_size": 64, "num_attention_heads": 6, "max_position_embeddings": 64},
    "gpt_neox": {**_COMMON, "intermediate_size": 64, "num_attention_heads": 6, "max_position_embeddings": 64},
    "falcon": {
        **_COMMON,
        "num_attention_heads": 6,
        "num_kv_heads": 3,
        "new_decoder_architecture": True,
        "alibi": False,
    },
    "bloom": {"vocab_size": WORDS, "hidden_size": 48, "n_layer": 2, "n_head": 6},
    "mpt": {"vocab_size": WORDS, "d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 64, "expansion_ratio": 2},
    "mixtral": {**_LLAMA, "num_local_experts": 4},
    "qwen3_moe": {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


OTHERS: dict[str, dict[str, Any]] = {
    "cohere": _LLAMA,
    "glm4": _LLAMA,
    "granite": _LLAMA,
    "starcoder2": _LLAMA,
    "gptj": {"vocab_size": WORDS, "n_embd": 48, "n_layer": 2, "n_head": 6, "rotary_dim": 4, "n_positions": 64},
    "gpt_bigcode": {"vocab_size": WORDS, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64},
    "roberta": {**_HEADS, "intermediate_size": 64},
}
"""Families that are split by names and shapes alone, and checked on a prompt."""
_EAGER = {"bloom", "gemma2", "gptj", "mpt"}


def build(model_type: str, **changes: Any) -> Any:
    """A causal language model (BERT: a masked one) of this family, in evaluation mode; the same on every rank."""
    import transformers

    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model(model_type, **{**(CONFIGS | OTHERS)[model_type], **changes})
    kind = transformers.AutoModelForMaskedLM if model_type in ("bert", "roberta") else transformers.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager" if model_type in _EAGER else "sdpa")
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are zeros and ones otherwise
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def tokens(rows: int = 2, length: int = 12, seed: int = 3) -> torch.Tensor:
    return torch.randint(1, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))
