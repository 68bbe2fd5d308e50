"""A small model with experts, its data, and plain torch's training of it, for the tests of deepspeed.moe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepspeed.moe.layer import MoE

WIDTH = 6


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 10)
        self.down = nn.Linear(10, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.moe = MoE(WIDTH, Expert(), **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, aux, _ = self.moe(self.norm(x))
        return x + out, aux


class Net(nn.Module):
    """Blocks of experts in a ModuleList; `flat` has one layer of experts outside of any, each expert a unit then."""

    def __init__(self, flat: bool = False, depth: int = 2, **options: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(**options) for _ in range(depth)) if not flat else None
        self.block = Block(**options) if flat else None
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x, total = torch.tanh(self.inner(x)), x.new_zeros(())
        for block in self.blocks if self.blocks is not None else [self.block]:
            x, aux = block(x)
            total = total + aux
        return (self.head(x).float() - target.float()).square().mean() + 0.01 * total


def make(**options: Any) -> Net:
    """Every expert has weights of its own."""
    torch.manual_seed(3)
    net = Net(**{"num_experts": 4, "use_rts": False, "top2_2nd_expert_sampling": False, "min_capacity": 1, **options})
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net


def batch(step: int, index: int, tokens: int = 3) -> tuple[Tensor, Tensor]:
    """So few tokens that some experts get none."""
    x = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(100 * step + index))
    return x, x.sum(-1, keepdim=True)


def train_plainly(net: Net, steps: range, num_micro_batches: int, clip: float) -> dict[str, Any]:
    """One process: the mean gradient of the micro-batches, clipped; losses and norms by step, and the weights."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.01)
    losses, norms = [], []
    for step in steps:
        optimizer.zero_grad()
        parts = [net(*batch(step, index)) / num_micro_batches for index in range(num_micro_batches)]
        torch.stack(parts).sum().backward()
        losses.append(sum(float(part.detach()) for part in parts))
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), clip)))
        optimizer.step()
    return {"losses": losses, "norms": norms, "weights": {k: v.clone() for k, v in net.state_dict().items()}}
