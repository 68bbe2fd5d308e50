"""Models, configs, data and training loops that the engine's tests share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import deepspeed
import ds_comm

WIDTH = 8


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """Two residual blocks and a head, with a buffer; `forward` returns the loss."""

    def __init__(self, dropout: float = 0.0, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 1)
        self.register_buffer("seen", torch.zeros(1))
        self.flavour = "plain"

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        for block in self.blocks:
            x = block(x)
        return (self.head(x).float() - target.float()).square().mean()

    def greet(self) -> str:
        return f"{self.flavour} net"


def make_net(**kwargs: Any) -> Net:
    torch.manual_seed(7)
    return Net(**kwargs)


def make_config(stage: int = 0, dtype: str = "fp32", **changes: Any) -> dict[str, Any]:
    """A small config; `changes` replace its top-level keys."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        **({dtype: {"enabled": True}} if dtype != "fp32" else {}),
    }
    return {**config, **changes}


def make_engine(config: dict[str, Any], model: nn.Module | None = None, **kwargs: Any) -> Any:
    model = make_net() if model is None else model
    kwargs.setdefault("model_parameters", model.parameters())
    return deepspeed.initialize(model=model, config=config, **kwargs)[0]


def micro_batch(step: int, index: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Two samples, a function of the step and of the micro-batch's index among all ranks' micro-batches."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    x = torch.randn(2, WIDTH, generator=generator)
    return x.to(dtype), x.sum(dim=1, keepdim=True)


def train(engine: Any, steps: Iterable[int], num_micro_batches: int | None = None) -> list[float]:
    """Train and return this rank's losses. Rank r takes the r-th part of the step's `num_micro_batches` (default: one
    per rank and accumulation step)."""
    losses = []
    world, rank = ds_comm.get_world_size(), ds_comm.get_rank()
    count = num_micro_batches or world * engine.gradient_accumulation_steps()
    share = count // world
    dtype = next(engine.module.parameters()).dtype
    for step in steps:
        for index in range(rank * share, (rank + 1) * share):
            loss = engine(*micro_batch(step, index, dtype))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter in full, on every rank."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            found[name] = parameter.detach().float().clone()
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
