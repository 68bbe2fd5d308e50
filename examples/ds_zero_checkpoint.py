"""Checkpoints that load at any number of ranks and any stage: save on two ranks at stage 3, go on alone at stage 1.

Quick run: torchrun --standalone --nproc-per-node 2 examples/ds_zero_checkpoint.py save
Quick run: python examples/ds_zero_checkpoint.py load

A checkpoint is a folder of safetensors shards and a JSON manifest, without pickle. Here two ranks save and take one
more step; one process then loads, takes the same step on both ranks' data, and arrives at the same bits: the sum over
ranks and the sum over accumulated micro-batches are one and the same, in rank order.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from torch import nn

import ds_comm
import ds_zero
from ds_zero import checkpoint

FOLDER = Path("runs/ds_zero_checkpoint")
NUM_RANKS = 2


def build(stage: int) -> tuple[nn.Module, ds_zero.ZeroOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    micro_batches = NUM_RANKS // ds_comm.get_world_size()
    config = ds_zero.ZeroConfig(stage=stage, dtype="bf16", gradient_accumulation_steps=micro_batches)
    model, optimizer = ds_zero.shard(model, torch.optim.AdamW(model.parameters(), lr=1e-2), config=config)
    assert optimizer is not None
    return model, optimizer


def take_step(model: nn.Module, optimizer: ds_zero.ZeroOptimizer, step: int) -> str:
    """One optimizer step over the data of all NUM_RANKS ranks; a digest of the weights after it."""
    for data_rank in range(ds_comm.get_rank(), NUM_RANKS, ds_comm.get_world_size()):
        generator = torch.Generator().manual_seed(1000 * step + data_rank)
        x = torch.randn(32, 64, generator=generator).bfloat16()
        optimizer.backward((model(x) - x.sin()).float().square().mean())
    optimizer.step()
    digest = hashlib.sha256()
    for parameter in model.parameters():
        with ds_zero.GatheredParameters(parameter):
            digest.update(parameter.detach().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save() -> None:
    model, optimizer = build(stage=3)
    for step in range(3):
        take_step(model, optimizer, step)
    pending = checkpoint.save(
        FOLDER, "step3", optimizer.export_state(), shard_map=optimizer.shard_map, extra={"next_step": 3}
    )
    digest = take_step(model, optimizer, 3)  # training goes on while the checkpoint becomes durable
    pending.wait()
    if ds_comm.get_rank() == 0:
        (FOLDER / "digest.txt").write_text(digest)
        print(f"saved {FOLDER / 'step3'} on {ds_comm.get_world_size()} ranks; weights one step later: {digest[:16]}")


def load() -> None:
    report = checkpoint.verify(FOLDER)
    model, optimizer = build(stage=1)
    targets = optimizer.import_targets()
    loaded = checkpoint.load(FOLDER, targets, shard_map=optimizer.shard_map)
    assert loaded is not None
    optimizer.finish_import(targets)
    digest = take_step(model, optimizer, loaded.extra["next_step"])
    print(f"{report.path}: {len(report.files)} files, {'intact' if report.ok else report.errors}")
    print(f"loaded by {ds_comm.get_world_size()} rank; weights one step later: {digest[:16]}")
    assert digest == (FOLDER / "digest.txt").read_text(), "the weights differ"


if __name__ == "__main__":
    ds_comm.init_distributed()
    {"save": save, "load": load}[sys.argv[1]]()
    ds_comm.destroy_process_group()
