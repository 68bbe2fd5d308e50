"""Small causal language models with weights far from uniform, their data, and the loop that a rollout is part of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY = 67
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SIZES),
    "llama-odd": ("LlamaForCausalLM", {**SIZES, "hidden_size": 24, "head_dim": 6, "intermediate_size": 27}),  # gaps
    "qwen2-tied": ("Qwen2ForCausalLM", {**SIZES, "tie_word_embeddings": True}),  # biases between the projections
    "gemma": ("GemmaForCausalLM", {**SIZES, "head_dim": 8}),  # norms of 1 + w, tied
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0,
            "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
    ),
    "gptneox": ("GPTNeoXForCausalLM", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),  # no decoder
}  # fmt: skip


def make(name: str, seed: int = 0) -> Any:
    """The same weights at every call, in fp32."""
    import transformers

    kind, sizes = MODELS[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


def with_lora(model: Any, kind: str) -> Any:
    """A model with adapters whose product is not zero: PEFT's, or layers such as DeepSpeed-Chat's."""
    torch.manual_seed(5)
    if kind == "peft":
        import peft

        config = peft.LoraConfig(
            r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, config)
    else:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.q_proj = ChatLora(layer.self_attn.q_proj)
            layer.mlp.up_proj = ChatLora(layer.mlp.up_proj)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_left" in name:
                parameter.normal_(std=0.2)
    return model


class ChatLora(nn.Module):
    """A linear layer with an adapter, as the training scripts of DeepSpeed-Chat have it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.lora_right_weight = nn.Parameter(torch.randn(layer.in_features, 3) * 0.2)
        self.lora_left_weight = nn.Parameter(torch.zeros(3, layer.out_features))
        self.lora_scaling = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta = x @ self.lora_right_weight @ self.lora_left_weight * self.lora_scaling
        return nn.functional.linear(x, self.weight, self.bias) + delta


def prompts(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, mask): two prompts of different lengths, padded on the left; other ones for each rank and step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    width = 4 + rank
    tokens = torch.randint(3, VOCABULARY, (2, width), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, : 1 + rank] = 0
    return tokens * mask, mask


def answers(model: Any, rank: int, step: int, **kwargs: Any) -> torch.Tensor:
    """What the model says: greedily at even steps, else drawn with a seed of the rank's and step's own."""
    tokens, mask = prompts(rank, step)
    torch.manual_seed(77 + 10 * step + rank)
    choice = {"do_sample": True, "temperature": 0.9, "top_k": 20} if step % 2 else {"do_sample": False}
    return model.generate(tokens, attention_mask=mask, max_new_tokens=9 + 2 * rank, **choice, **kwargs)


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """As if the answers were what is to be learned."""
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss
