"""A pipeline through `deepspeed.initialize`: two stages x two replicas, ZeRO-2 along the replicas, bf16, clipping.

Quick run: deepspeed --num_gpus 4 examples/deepspeed_pipeline.py

On two processes it is two stages with one replica; the split into stages never changes the results.
"""

from __future__ import annotations

import torch
from torch import nn

import deepspeed
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

VOCABULARY, WIDTH, LENGTH = 64, 32, 24
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 4,  # micro-batches per step and replica
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
}


class Block(nn.Module):
    """A residual stream in, the same out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.mlp(self.norm(hidden))


def logits(embedding: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return hidden @ embedding.get_parameter("weight").T


def loss_fn(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.float().flatten(0, 1), labels.flatten())


def main() -> None:
    deepspeed.init_distributed()
    starts = torch.randint(VOCABULARY, (512, 1), generator=torch.Generator().manual_seed(0))
    tokens = (starts + torch.arange(LENGTH + 1)) % VOCABULARY  # sequences that count up
    samples = [(row[:-1], row[1:]) for row in tokens]
    layers = [
        TiedLayerSpec("embedding", nn.Embedding, VOCABULARY, WIDTH),
        *(LayerSpec(Block) for _ in range(4)),
        TiedLayerSpec("embedding", nn.Embedding, VOCABULARY, WIDTH, forward_fn=logits),
    ]
    module = PipelineModule(layers, num_stages=2, loss_fn=loss_fn, seed_layers=True)
    engine, _, _, _ = deepspeed.initialize(model=module, config=CONFIG, training_data=samples)

    losses = [float(engine.train_batch()) for _ in range(12)]  # pulls its micro-batches from training_data
    if deepspeed.comm.get_rank() == 0:
        print(f"layers of the stages: {module.parts}, replicas: {engine.dp_world_size}")
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0]
    engine.destroy()
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
