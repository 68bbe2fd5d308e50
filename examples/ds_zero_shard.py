"""ds-zero alone: one verb shards any torch module with any elementwise torch optimizer, without an engine.

Quick run: torchrun --standalone --nproc-per-node 2 examples/ds_zero_shard.py

Trains a small causal language model at every ZeRO stage and prints what each rank keeps and sends. The losses are the
same to the bit: a stage is a layout, not another algorithm.
"""

from __future__ import annotations

import torch
from torch import nn

import ds_comm
import ds_zero

VOCABULARY, WIDTH, LENGTH, STEPS = 256, 128, 64, 5


class TinyGPT(nn.Module):
    def __init__(self, num_layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(  # the members of a ModuleList become units: gathered and released together
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True) for _ in range(num_layers)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(
            tokens.shape[1] - 1, tokens.device, self.head.weight.dtype
        )
        x = self.embed(tokens[:, :-1])
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(stage: int) -> list[float]:
    torch.manual_seed(0)
    model = TinyGPT()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = ds_zero.ZeroConfig(stage=stage, dtype="bf16", gradient_clipping=1.0, param_persistence_threshold=0)
    model, optimizer = ds_zero.shard(model, optimizer, config=config)  # the same model object, used as before
    ledger = optimizer.comm.ledger
    ledger.reset()

    torch.manual_seed(1 + ds_comm.get_rank())  # each rank has its own data
    losses = []
    for _ in range(STEPS):
        tokens = torch.arange(LENGTH + 1).remainder(17) + torch.randint(0, 200, (8, 1))  # counting from anywhere
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    masters = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    if ds_comm.get_rank() == 0:
        print(
            f"stage {stage}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, {num_parameters:,} parameters, this rank "
            f"optimises {masters:,}, sends {ledger.wire_elements / STEPS:,.0f} elements per step"
        )
    optimizer.close()
    return losses


def main() -> None:
    ds_comm.init_distributed()
    runs = [train(stage) for stage in range(4)]
    assert all(run == runs[0] for run in runs), "the stages disagree"
    ds_comm.destroy_process_group()


if __name__ == "__main__":
    main()
