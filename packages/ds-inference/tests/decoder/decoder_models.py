"""Small models of every family with odd sizes and random weights, and a driver of decoders over scattered blocks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_inference import Batch, Decoder, KVCache

VOCABULARY = 99
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_WIDE = {**_SIZES, "head_dim": 16}
"""Heads times their dimension is more than hidden."""
_PLAIN = {**_SIZES, "hidden_size": 48, "num_key_value_heads": 3}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_OPT = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "ffn_dim": 60, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 256, **_ENDS,
}  # fmt: skip
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**_WIDE, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaForCausalLM", {**_PLAIN, "tie_word_embeddings": True, "num_key_value_heads": 6}),
    "mistral": ("MistralForCausalLM", {**_WIDE, "sliding_window": 5}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {**_PLAIN, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {**_WIDE, "attention_bias": True}),
    "smollm3": ("SmolLM3ForCausalLM", {**_PLAIN, "no_rope_layers": [1, 0, 1]}),
    "gemma": ("GemmaForCausalLM", _WIDE),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            **_WIDE, "sliding_window": 5, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0, "layer_types": _ALTERNATING,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {**_WIDE, "sliding_window": 5, "query_pre_attn_scalar": 20, "layer_types": _ALTERNATING},
    ),
    "phi": ("PhiForCausalLM", _PLAIN),
    "phi-norms": ("PhiForCausalLM", {**_PLAIN, "qk_layernorm": True, "hidden_act": "gelu"}),
    "phi3": ("Phi3ForCausalLM", {**_PLAIN, "sliding_window": 6}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256, **_ENDS},
    ),
    "opt": ("OPTForCausalLM", _OPT),
    "opt-untied": ("OPTForCausalLM", {**_OPT, "tie_word_embeddings": False, "enable_bias": False}),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model in evaluation, its weights random everywhere (norms and biases too)."""
    import transformers

    kind, sizes = MODELS[name]
    made = getattr(transformers, kind)
    torch.manual_seed(0)
    model = made(made.config_class(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None  # tokens are counted, not ended
    return model.to(dtype).eval()


class Sequences:
    """Sequences in a cache, whose blocks are handed out in a random order."""

    def __init__(self, decoder: Decoder, block_size: int, num_blocks: int) -> None:
        self.decoder = decoder
        self.cache = KVCache(decoder, num_blocks, block_size)
        self.free = list(range(num_blocks))
        random.Random(0).shuffle(self.free)
        self.blocks: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def step(self, new: Mapping[int, Sequence[int]], *, last: bool = True) -> Tensor:
        """Compute tokens of each sequence; logits of each one's last, or of all."""
        size = self.cache.block_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for sequence, more in new.items():
            begin = self.lengths.get(sequence, 0)
            self.lengths[sequence] = begin + len(more)
            blocks = self.blocks.setdefault(sequence, [])
            while len(blocks) * size < self.lengths[sequence]:
                blocks.append(self.free.pop())
            tokens += more
            positions += range(begin, begin + len(more))
            slots += (blocks[place // size] * size + place % size for place in range(begin, begin + len(more)))
            starts.append(len(tokens))
        width = max(len(self.blocks[sequence]) for sequence in new)
        tables = [self.blocks[sequence] + [0] * (width - len(self.blocks[sequence])) for sequence in new]
        longest = max(map(len, new.values()))
        batch = Batch(
            torch.tensor(tokens), torch.tensor(positions), torch.tensor(slots),
            torch.tensor(tables, dtype=torch.int32),
            torch.tensor([self.lengths[sequence] for sequence in new], dtype=torch.int32),
            None if longest == 1 else torch.tensor(starts, dtype=torch.int32),
            torch.tensor(starts[1:]) - 1 if last else None,
            longest,
        )  # fmt: skip
        return self.decoder.forward(batch, self.cache)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens, none of them special."""
    return random.Random(f"{length} {seed}").choices(range(3, VOCABULARY), k=length)


@torch.no_grad()
def logits_of(model: Any, tokens: Sequence[int]) -> Tensor:
    """The model's own, fp32 [tokens, vocabulary]."""
    found: Tensor = model(torch.tensor([list(tokens)])).logits[0].float()
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())
