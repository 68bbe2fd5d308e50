"""The config section `kernels`: fused operations put into a Hugging Face model by `initialize`, out by `destroy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed import DeepSpeedConfigError
from ds_comm.testing import run_ranks
from ds_kernels import PatchError

TOKENS = torch.arange(2, 34).view(2, 16)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def config(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage},
        **more,
    }


def losses(folder: Path, settings: dict[str, Any]) -> tuple[Any, list[float]]:
    engine, *_ = deepspeed.initialize(model=load(folder), config=settings)
    found = []
    for _ in range(3):
        loss = engine(TOKENS, labels=TOKENS).loss
        engine.backward(loss)
        engine.step()
        found.append(float(loss.detach()))
    return engine, found


def fused(folder: Path, stage: int) -> None:
    plain, expected = losses(folder, config(stage))
    engine, found = losses(folder, config(stage, kernels={"enabled": True}))
    assert found == pytest.approx(expected, rel=1e-5)
    assert set(engine.kernels.replaced) == {"norm", "mlp", "rope", "attention", "loss"} and plain.kernels is None
    patched = [module for module in engine.module.modules() if "forward" in vars(module)]
    engine.destroy()
    engine.destroy()
    assert patched and not any("forward" in vars(module) for module in patched)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_same_losses_and_destroy_takes_them_out(folder: Path, stage: int) -> None:
    run_ranks(fused, 2, folder, stage)


def split(folder: Path) -> None:
    _, expected = losses(folder, config(1))
    engine, found = losses(folder, config(1, kernels={"enabled": True}, tensor_parallel={"autotp_size": 2}))
    assert found == pytest.approx(expected, rel=1e-5)
    assert "mlp" in engine.kernels.replaced and "VocabParallelHead" in engine.kernels.skipped[""]


def test_tensor_parallel_layers_keep_what_is_theirs(folder: Path) -> None:
    run_ranks(split, 2, folder)


def recomputed(folder: Path) -> None:
    _, expected = losses(folder, config(3))
    settings = config(3, kernels={"enabled": True}, activation_checkpointing={"policy": "full"})
    engine, *_ = deepspeed.initialize(model=load(folder), config=settings)
    engine.compile(backend="aot_eager")
    loss = engine(TOKENS, labels=TOKENS).loss
    engine.backward(loss)
    engine.step()
    second = engine(TOKENS, labels=TOKENS).loss
    assert [float(loss.detach()), float(second.detach())] == pytest.approx(expected[:2], rel=1e-5)
    engine.destroy()


def test_with_compiled_and_recomputed_blocks(folder: Path) -> None:
    run_ranks(recomputed, 1, folder, timeout=120)


def only_some_or_none(folder: Path) -> None:
    engine, _ = losses(folder, config(0, kernels={"enabled": True, "only": ["norm"]}))
    assert list(engine.kernels.replaced) == ["norm"]
    assert engine(TOKENS, labels=TOKENS).logits is not None
    with pytest.raises(DeepSpeedConfigError, match=r"kernels\.only"):
        losses(folder, config(0, kernels={"enabled": True, "only": ["norms"]}))
    with pytest.raises(PatchError, match="no module of Linear is of a known class"):
        deepspeed.initialize(model=torch.nn.Linear(4, 4), config=config(0, kernels={"enabled": True}))


def test_only_some_and_refusals(folder: Path) -> None:
    run_ranks(only_some_or_none, 1, folder)
