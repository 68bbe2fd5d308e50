"""ds-pipe alone: a small language model on two stages, with the embedding as its head and plain AdamW.

Quick run: torchrun --standalone --nproc-per-node 2 examples/ds_pipe_train.py

Any number of processes up to the number of layers works; each is one stage. The losses do not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich.console import Console
from torch import Tensor, nn

import ds_comm
from ds_pipe import LayerSpec, PipelineModule, TiedLayerSpec, pipeline, simulate, to_text

VOCABULARY, WIDTH, LENGTH, MICRO_BATCHES = 64, 32, 24, 4


class Block(nn.Module):
    """What a transformer block is to a pipeline: a residual stream in, the same out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mix(self.norm(hidden))[0]


def logits(embedding: nn.Module, hidden: Tensor) -> Tensor:
    return hidden @ embedding.get_parameter("weight").T


def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten())


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences that count up from a random token: (inputs, labels)."""
    generator = torch.Generator().manual_seed(0)
    while True:
        start = torch.randint(VOCABULARY, (8, 1), generator=generator)
        tokens = (start + torch.arange(LENGTH + 1)) % VOCABULARY
        yield tokens[:, :-1], tokens[:, 1:]


def main() -> None:
    ds_comm.init_distributed()
    layers = [
        TiedLayerSpec("embedding", nn.Embedding, VOCABULARY, WIDTH),
        *(LayerSpec(Block) for _ in range(4)),
        TiedLayerSpec("embedding", nn.Embedding, VOCABULARY, WIDTH, forward_fn=logits),
    ]
    module = PipelineModule(layers, loss_fn=loss_fn, seed_layers=True, partition_method="parameters")
    pipe = pipeline(module, schedule="1f1b", num_micro_batches=MICRO_BATCHES)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)

    data = batches()  # the same on every rank; the first stage takes the inputs, the last the labels
    losses = [pipe.train_batch(data, optimizer).item() for _ in range(12)]
    final = pipe.eval_batch(data).item()

    if pipe.is_first_stage:
        console = Console(width=100)
        console.print(f"layers of the stages: {module.parts}")
        console.print(to_text(simulate(pipe.schedule)), markup=False)
        console.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, held out {final:.3f}")
    assert final < losses[0]
    ds_comm.destroy_process_group()


if __name__ == "__main__":
    main()
