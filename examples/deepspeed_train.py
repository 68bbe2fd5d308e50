"""The classic DeepSpeed script: arguments, a JSON config, and the engine's loop.

Quick run: deepspeed --num_gpus 2 examples/deepspeed_train.py --deepspeed_config examples/deepspeed_train.json

Learns to classify points on spirals. Everything about batch sizes, precision, optimizer, schedule and ZeRO is in the
JSON file; changing the stage there changes what each rank keeps, and not one loss.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import nn

import deepspeed


class Spirals(torch.utils.data.Dataset):
    """Points on two interleaved spirals, and which one they are on."""

    def __init__(self, num_points: int = 4096) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(0, 2, (num_points,), generator=generator)
        turn = torch.rand(num_points, generator=generator) * 3 * math.pi
        angle = turn + math.pi * self.labels
        self.points = torch.stack((turn * angle.cos(), turn * angle.sin()), dim=1) / 5

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.points[index], self.labels[index]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A classifier of spirals.")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    engine, _, loader, _ = deepspeed.initialize(
        args=args, model=model, model_parameters=model.parameters(), training_data=Spirals()
    )
    first = engine.global_rank == 0
    for epoch in range(args.epochs):
        right = torch.zeros((), device=engine.device)
        for points, labels in loader:
            logits = engine(points.to(engine.device, torch.bfloat16)).float()
            loss = nn.functional.cross_entropy(logits, labels.to(engine.device))
            engine.backward(loss)
            engine.step()  # acts at the boundary of gradient accumulation
            right += (logits.argmax(dim=1) == labels.to(engine.device)).sum()
        deepspeed.comm.all_reduce(right)
        if first:
            print(
                f"epoch {epoch}: {right.item() / len(Spirals()):.1%} right, last loss {loss.item():.3f}, "
                f"step {engine.global_steps}, lr {engine.get_lr()[0]:.1e}, norm {engine.get_global_grad_norm():.2f}"
            )
    engine.destroy()
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
