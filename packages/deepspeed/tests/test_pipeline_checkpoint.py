"""One checkpoint for all stages: resuming is exact, also at another (stages x replicas) and ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import (
    LAYERS,
    VOCABULARY,
    Trained,
    Unsplit,
    check_equal,
    data,
    finish_unsplit,
    loss_fn,
    make_config,
    make_pipeline,
    micro_batch,
    train_pipeline,
    weights_of,
)
from torch.utils.data import Dataset

import deepspeed
import ds_comm
import ds_zero
from deepspeed.pipe import PipelineModule
from ds_comm.testing import run_ranks
from ds_zero.checkpoint import full_state_dict

NUM = 4
V_SHAPE = {"num_chunks": 2, "placement": "v"}


def save(layers: str, config: dict[str, Any], folder: Path, steps: int, num_stages: int, options: Any) -> None:
    engine = make_pipeline(layers, config, num_stages, **options)
    source = data(engine.get_data_parallel_rank(), range(steps), NUM)
    for _ in range(steps):
        engine.train_batch(source)
    engine.save_checkpoint(folder, client_state={"epoch": 3})
    engine.train_batch(data(7, range(1), NUM))  # what is saved does not change any more
    engine.destroy()


def resume(
    layers: str, config: dict[str, Any], folder: Path, steps: range, num_stages: int, options: Any, replicas: int
) -> Trained:
    """Go on, with the data of `replicas` (those before, seen as micro-batches of fewer)."""
    engine = make_pipeline(layers, config, num_stages, **options)
    with torch.no_grad():  # nothing but the checkpoint may decide
        for parameter in engine.module.parameters():
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                parameter.add_(1.0)
    path, state = engine.load_checkpoint(folder)
    assert state["epoch"] == 3 and engine.global_steps == steps.start and path is not None
    losses, norms = [], []
    for step in steps:
        share = replicas // engine.dp_world_size
        first = engine.get_data_parallel_rank() * share
        batches = [micro_batch(r, step, i) for r in range(first, first + share) for i in range(NUM)]
        losses.append(engine.train_batch(iter(batches)).item())
        norms.append(engine.get_global_grad_norm())
    found = losses, norms, weights_of(engine)
    engine.destroy()
    return found


def tail(trained: Trained, start: int) -> Trained:
    return trained[0][start:], trained[1][start:], trained[2]


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("layers", ["tied", "half_frozen"])
def test_resuming_is_exact(layers: str, stage: int, tmp_path: Path) -> None:
    config = make_config(stage, "bf16", NUM)
    whole = run_ranks(train_pipeline, 4, layers, config, 4)
    run_ranks(save, 4, layers, config, tmp_path, 2, 2, {})
    again = run_ranks(resume, 4, layers, config, tmp_path, range(2, 4), 2, {}, 2)
    for before, after in zip(whole, again, strict=True):
        check_equal([(*after[:2], after[2])], (*tail(before, 2)[:2], before[2]))


@pytest.mark.parametrize(
    ("num_ranks", "num_stages", "stage", "options"),
    [
        pytest.param(2, 1, 3, {}, id="no stages"),
        pytest.param(2, 2, 1, {}, id="no replicas"),
        pytest.param(4, 4, 0, {}, id="four stages"),
        pytest.param(4, 2, 2, V_SHAPE, id="two chunks"),
    ],
)
def test_another_layout_goes_on_alike(
    num_ranks: int, num_stages: int, stage: int, options: dict[str, Any], tmp_path: Path
) -> None:
    """Two stages x two replicas at ZeRO 2, resumed elsewhere. With one replica it has the micro-batches of two, in
    their order; the sums over ranks and over micro-batches then differ in order, so the bits may."""
    whole = run_ranks(train_pipeline, 4, "tied", make_config(2, "fp32", NUM), 4)
    run_ranks(save, 4, "tied", make_config(2, "fp32", NUM), tmp_path, 2, 2, {})
    replicas = num_ranks // num_stages
    config = make_config(stage, "fp32", NUM * 2 // replicas, pipeline={"schedule": "auto"})
    again = run_ranks(resume, num_ranks, "tied", config, tmp_path, range(2, 4), num_stages, options, 2)
    weights = {name: value for trained in whole for name, value in trained[2].items()}
    if replicas == 2:
        check_equal(again, (*tail(whole[0], 2)[:2], weights))
        return
    for losses, norms, found in again:
        assert losses == pytest.approx(whole[0][0][2:], rel=1e-6)
        assert norms == pytest.approx(whole[0][1][2:], rel=1e-5)
        for name, value in found.items():
            torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-5)


def resume_unsplit(config: dict[str, Any], folder: Path, steps: range) -> Trained:
    module = Unsplit(LAYERS["tied"](), base_seed=99)
    engine = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)[0]
    engine.load_checkpoint(folder)

    def loss_of(step: int, index: int) -> torch.Tensor:
        inputs, labels = micro_batch(ds_comm.get_rank(), step, index)
        return loss_fn(engine(inputs), labels)

    return finish_unsplit(engine, steps, loss_of)


def test_the_unsplit_model_goes_on_from_a_pipelines_checkpoint(tmp_path: Path) -> None:
    config = make_config(2, "bf16", NUM)
    whole = run_ranks(train_pipeline, 4, "tied", config, 4)
    run_ranks(save, 4, "tied", config, tmp_path, 2, 2, {})
    again = run_ranks(resume_unsplit, 2, make_config(3, "bf16", NUM), tmp_path, range(2, 4))
    weights = {name: value for trained in whole for name, value in trained[2].items()}
    check_equal(again, (*tail(whole[0], 2)[:2], weights))


def export(folder: Path) -> dict[str, torch.Tensor]:
    engine = make_pipeline("tied", make_config(3, "fp32", NUM))
    for name, buffer in engine.module.named_buffers():
        buffer.fill_(10 * int(name.partition(".")[0]))
    engine.train_batch(data(engine.get_data_parallel_rank(), range(1), NUM))
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()
    assert engine.save_16bit_model(folder, "whole.bin") is False  # as without stages: the gather key is not set
    state = engine._consolidated_16bit_state_dict()
    assert (state is not None) == (ds_comm.get_rank() == 0)
    weights = weights_of(engine)
    engine.destroy()
    return weights if state is None else state


def test_the_whole_model_comes_out_of_a_checkpoint(tmp_path: Path) -> None:
    """zero_to_fp32 and the state dict that rank 0 collects: all layers, ties once, the buffers of all stages."""
    collected, *others = run_ranks(export, 4, tmp_path)
    expected = Unsplit(LAYERS["tied"]()).state_dict()
    stored = full_state_dict(tmp_path)
    assert set(stored) == set(expected) == set(collected)
    for weights in others:
        for name, value in weights.items():
            assert torch.equal(stored[name], value) and torch.equal(collected[name], value), name
    for index in (1, 2, 3):
        assert stored[f"{index}.seen"].item() == collected[f"{index}.seen"].item() == 10 * index


class Tokens(Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(VOCABULARY, (5,), generator=torch.Generator().manual_seed(index))
        return tokens, tokens.roll(1)


def with_loader(folder: Path, load: bool, steps: int) -> tuple[list[float], list[float]]:
    module = PipelineModule(LAYERS["tied"](), num_stages=2, loss_fn=loss_fn, seed_layers=True)
    engine, _, loader, scheduler = deepspeed.initialize(
        model=module, training_data=Tokens(), config=make_config(1, "fp32", 2)
    )
    assert loader is engine.training_dataloader and scheduler is engine.lr_scheduler
    if load:
        engine.load_checkpoint(folder)
    losses = [engine.train_batch().item() for _ in range(steps)]
    rates = engine.get_lr()
    if not load:
        engine.save_checkpoint(folder)
        losses += [engine.train_batch().item() for _ in range(steps)]
        rates = engine.get_lr()
    engine.destroy()
    return losses, rates


def test_data_and_learning_rate_go_on(tmp_path: Path) -> None:
    """24 samples are 3 steps of 2 replicas x 2 micro-batches x 2 samples: the cursor crosses an epoch."""
    whole = run_ranks(with_loader, 4, tmp_path, False, 2)
    again = run_ranks(with_loader, 4, tmp_path, True, 2)
    for before, after in zip(whole, again, strict=True):
        assert before[0][2:] == after[0] and before[1] == after[1]
        assert before[0] == whole[0][0]


def refuse(folder: Path) -> str:
    engine = make_pipeline("plain", make_config(1, "fp32", NUM))
    try:
        engine.load_checkpoint(folder)
    except ds_zero.CheckpointError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def test_a_checkpoint_of_another_model_is_refused_on_all_ranks(tmp_path: Path) -> None:
    run_ranks(save, 2, "tied", make_config(1, "fp32", NUM), tmp_path, 1, 2, {})
    texts = run_ranks(refuse, 4, tmp_path)
    assert all("is a checkpoint of another model" in text and "tied_modules" in text for text in texts)
    manifest = json.loads((tmp_path / "global_step1" / "manifest.json").read_text())
    assert list(manifest["params"]).count("tied_modules.embed.weight") == 1
