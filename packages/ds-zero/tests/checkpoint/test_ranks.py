"""Real ranks and the real optimizer: train, save, load at another world size and stage, train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ds_zero
from ds_comm.testing import run_ranks
from ds_zero.checkpoint import full_state_dict, load, save, state_keys


def make_model() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(13, 17), torch.nn.Tanh(), torch.nn.Linear(17, 17), torch.nn.Tanh(), torch.nn.Linear(17, 5)
    )


def start(stage: int, dtype: str, accumulation: int, kind: str = "adamw") -> tuple[torch.nn.Module, Any]:
    model = make_model()
    if kind == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    else:
        optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.9)
    config = ds_zero.ZeroConfig(stage=stage, dtype=dtype, gradient_accumulation_steps=accumulation)
    return ds_zero.shard(model, optimizer, config=config)


def train(model: Any, optimizer: Any, steps: range, world: int, rank: int) -> list[float]:
    """Two micro-batches per step in all, whatever the number of ranks."""
    losses = []
    for step in steps:
        for micro in range(rank, 2, world):
            generator = torch.Generator().manual_seed(10 * step + micro)
            inputs = torch.randn(4, 13, generator=generator).to(next(model.parameters()).dtype)
            loss = model(inputs).float().pow(2).mean()
            optimizer.backward(loss)
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def run_and_save(directory: str, stage: int, dtype: str, kind: str = "adamw") -> list[float]:
    import ds_comm

    rank, world = ds_comm.get_rank(), ds_comm.get_world_size()
    model, optimizer = start(stage, dtype, 2 // world, kind)
    train(model, optimizer, range(3), world, rank)
    save(
        directory,
        "three",
        optimizer.export_state(),
        shard_map=optimizer.shard_map,
        extra={"client_state": {"step": 3}},
        rank_extra={"rank": rank},
        asynchronous=False,
    )
    return train(model, optimizer, range(3, 6), world, rank)


def resume(directory: str, stage: int, dtype: str, kind: str = "adamw") -> list[float]:
    import ds_comm

    rank, world = ds_comm.get_rank(), ds_comm.get_world_size()
    model, optimizer = start(stage, dtype, 2 // world, kind)
    targets = optimizer.import_targets(state_keys(directory))
    loaded = load(directory, targets, shard_map=optimizer.shard_map)
    assert loaded is not None
    assert loaded.extra == {"client_state": {"step": 3}}
    assert loaded.rank_extra is None or loaded.rank_extra == {"rank": rank}
    optimizer.finish_import(targets)
    return train(model, optimizer, range(3, 6), world, rank)


def flat(results: list[list[float]]) -> list[float]:
    """Losses in order of (step, micro-batch)."""
    return [loss for step in zip(*results, strict=True) for loss in step] if len(results) > 1 else results[0]


@pytest.mark.parametrize(
    ("stage", "world", "to_stage", "to_world"), [(3, 2, 3, 2), (3, 2, 0, 1), (0, 2, 3, 2), (1, 1, 2, 2)]
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_is_exact(tmp_path: Path, stage: int, world: int, to_stage: int, to_world: int, dtype: str) -> None:
    expected = flat(run_ranks(run_and_save, world, str(tmp_path), stage, dtype))
    assert flat(run_ranks(resume, to_world, str(tmp_path), to_stage, dtype)) == expected


def test_resume_an_optimizer_without_a_fast_path(tmp_path: Path) -> None:
    expected = flat(run_ranks(run_and_save, 2, str(tmp_path), 3, "fp32", "rmsprop"))
    assert flat(run_ranks(resume, 2, str(tmp_path), 2, "fp32", "rmsprop")) == expected


def test_the_whole_model(tmp_path: Path) -> None:
    run_ranks(run_and_save, 2, str(tmp_path), 3, "fp32")
    state = full_state_dict(tmp_path)
    model = make_model()
    assert {name: value.shape for name, value in state.items()} == {n: p.shape for n, p in model.state_dict().items()}
    assert not torch.equal(state["0.weight"], model.state_dict()["0.weight"])


def save_on_one_rank(directory: str) -> str:
    import ds_comm

    _, optimizer = start(3, "fp32", 1)
    if ds_comm.get_rank() == 0:
        save(directory, "t", optimizer.export_state(), shard_map=optimizer.shard_map)
    else:
        ds_comm.barrier(label="next")
    return "no error"


def test_save_on_one_rank_only(tmp_path: Path) -> None:
    """Every rank raises, and the text says who was in save_checkpoint."""
    from ds_comm.testing import RankFailure

    with pytest.raises(RankFailure, match="save_checkpoint"):
        run_ranks(save_on_one_rank, 2, str(tmp_path), timeout=60)
    assert not (tmp_path / "t").exists()
