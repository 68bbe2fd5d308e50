"""ds-kernels alone: a small language model made of its operations, trained with Muon, then quantised to 4 bits.

Quick run: python examples/ds_kernels_lm.py

The loss never holds its logits, attention never holds its scores; the bits of a weight are a matter of one call.
"""

from __future__ import annotations

import pydoc_data.topics

import torch
from torch import Tensor, nn

import ds_kernels as dk
from ds_kernels.nn import GatedMLP, RMSNorm, RotaryEmbedding
from ds_kernels.optim import Muon

VOCABULARY, WIDTH, HEADS, LENGTH, STEPS = 256, 128, 4, 128, 60


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(WIDTH), RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = GatedMLP(WIDTH, 2 * WIDTH)
        self.rotary = RotaryEmbedding(WIDTH // HEADS, LENGTH)

    def forward(self, x: Tensor) -> Tensor:
        split = (
            self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        )  # [3, batch, heads, len, dim]
        q, k = self.rotary(split[0], split[1])
        attended = dk.flash_attention(q, k, split[2], causal=True)
        y, x = self.norm2(self.out(attended.transpose(1, 2).flatten(2)), residual=x)
        return x + self.mlp(y)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, WIDTH), RMSNorm(WIDTH)
        nn.init.normal_(self.embed.weight, std=0.02)  # it is the head as well
        self.blocks = nn.Sequential(*[Block() for _ in range(2)])

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.blocks(self.embed(tokens[:, :-1])))
        return dk.linear_cross_entropy(hidden, self.embed.weight, tokens[:, 1:])


def main() -> None:
    torch.manual_seed(0)
    text = "".join(pydoc_data.topics.topics.values()).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    held_out = data[-16 * LENGTH :].view(16, LENGTH)
    model = Model()
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizer = Muon([{"params": matrices, "lr": 0.02}, {"params": rest, "lr": 3e-3, "use_muon": False}])
    for step in range(STEPS):
        starts = torch.randint(len(data) - 17 * LENGTH, (8, 1))
        loss = model(data[starts + torch.arange(LENGTH)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step:3}  loss {loss.item():.3f}")
    with torch.no_grad():
        exact = model(held_out).item()
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                packed = dk.quantize_weight(module.weight, bits=4, group_size=32, symmetric=False)
                module.weight.copy_(packed.dequantize())
        print(f"held-out loss {exact:.3f}, with weights of 4 bits {model(held_out).item():.3f}")


if __name__ == "__main__":
    main()
