"""Small causal language models: those of transformers where it is installed, and one of the same shape without it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH = 50, 7


@dataclass
class Config:
    num_hidden_layers: int = 4
    width: int = 16
    tied: bool = True
    soft_cap: float = 5.0


class Block(nn.Module):
    def __init__(self, width: int, index: int) -> None:
        super().__init__()
        self.kind = "even" if index % 2 == 0 else "odd"
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)

    def forward(
        self, hidden_states: Tensor, scale: Tensor, attention_mask: Tensor | None = None, past: Any = None
    ) -> Any:
        assert past is None
        mixed = self.mix(self.norm(hidden_states)) * scale
        if attention_mask is not None:
            mixed = mixed * attention_mask
        return (hidden_states + mixed.cumsum(dim=1),)


class Decoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(VOCABULARY, config.width)
        self.positions = nn.Embedding(LENGTH, config.width)
        self.layers = nn.ModuleList(Block(config.width, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.width)
        self.register_buffer("scales", torch.tensor([0.5, 0.25]), persistent=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
    ) -> Any:
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = hidden + self.positions(torch.arange(hidden.shape[1]))
        mask = None if attention_mask is None else attention_mask[..., None].to(hidden.dtype)
        scales = {"even": self.scales[0], "odd": self.scales[1]}
        for layer in self.layers:
            found = layer(hidden, scales[layer.kind], attention_mask=mask)
            hidden = found[0] if isinstance(found, tuple) else found
        return (self.norm(hidden),)


class Model(nn.Module):
    """As transformers' models are made, with a soft cap on its logits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.width, VOCABULARY, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids=input_ids, **kwargs)[0]
        cap = self.config.soft_cap
        return SimpleNamespace(logits=torch.tanh(self.lm_head(hidden) / cap) * cap)


def _transformers(kind: str, **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **options)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
GROUPED = {**SMALL, "num_key_value_heads": 1, "pad_token_id": None}
SLIDING = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"] * 2, "use_sliding_window": True}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

TRANSFORMERS = {
    "llama": ("Llama", GROUPED | {"tie_word_embeddings": False}),
    "llama tied": ("Llama", GROUPED | {"tie_word_embeddings": True}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 3}),
    "qwen2 sliding": ("Qwen2", GROUPED | SLIDING | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 8}),
    "gemma2": ("Gemma2", GROUPED | {"head_dim": 8, "sliding_window": 3, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 16, **NO_DROPOUT}),
    "gpt_neox": ("GPTNeoX", {**SMALL, "tie_word_embeddings": False}),
}
OWN = {"own": Config(tied=False), "own tied": Config()}


def make(name: str) -> nn.Module:
    """A model in fp32 with the same weights whenever it is made."""
    torch.manual_seed(11)
    model = Model(OWN[name]) if name in OWN else _transformers(TRANSFORMERS[name][0], **TRANSFORMERS[name][1])
    return model.float().train()


def tokens(num: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(12)
    return [torch.randint(VOCABULARY, (2, LENGTH), generator=generator) for _ in range(num)]
