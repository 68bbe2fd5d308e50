"""Small models of transformers with random weights that are far from uniform, so that a wrong token shows."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 67
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _SIZES),
    "mistral": ("MistralForCausalLM", {**_SIZES, "sliding_window": 6}),
    "qwen3": ("Qwen3ForCausalLM", {**_SIZES, "head_dim": 16, "tie_word_embeddings": True}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **_ENDS},
    ),
}


def make(name: str, seed: int = 0) -> Any:
    """The same weights at every call."""
    import transformers

    kind, sizes = MODELS[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


def padded(lengths: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, mask) of random prompts of these lengths."""
    torch.manual_seed(len(lengths))
    width = max(lengths)
    tokens, mask = torch.randint(3, VOCABULARY, (len(lengths), width)), torch.zeros(len(lengths), width)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1 if side == "left" else 0
        if side == "right":
            mask[row, :length] = 1
    mask = mask.long()
    return tokens * mask, mask
