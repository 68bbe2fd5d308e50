"""Checkpoints that DeepSpeed 0.19.8 wrote load into an engine, after the opt-in, and training goes on.

The files and the true values are ds-zero's fixtures (made by upstream itself); outside the repository they are absent.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import deepspeed
import ds_zero

DATA = Path(__file__).parents[2] / "ds-zero" / "tests" / "checkpoint" / "data"
if not DATA.is_dir():
    pytest.skip("ds-zero's fixtures are not here", allow_module_level=True)


class Tiny(torch.nn.Module):
    """The model of the fixtures (see make_upstream_fixtures.py)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 7)
        self.norm = torch.nn.LayerNorm(7)
        self.frozen = torch.nn.Linear(7, 7)
        self.inner = torch.nn.Linear(7, 13)
        self.outer = torch.nn.Linear(13, 7, bias=False)
        self.head = torch.nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.zeros(3))
        self.frozen.requires_grad_(False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.embed(ids))
        hidden = hidden + self.outer(torch.tanh(self.inner(self.frozen(hidden))))
        return torch.nn.functional.cross_entropy(self.head(hidden).float().flatten(0, 1), labels.flatten())


def make_engine(stage: int, dtype: str) -> Any:
    torch.manual_seed(99)
    model = Tiny()
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1.0}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == "bf16"},
    }
    groups = [{"params": decay}, {"params": plain}]
    return deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("written", "loaded"), [(1, 0), (2, 3), (3, 2)])
def test_weights_state_and_settings_come_over(written: int, loaded: int, dtype: str, tmp_path: Path) -> None:
    with tarfile.open(DATA / f"upstream_{written}_{dtype}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    engine = make_engine(loaded, dtype)
    with pytest.raises(ds_zero.CheckpointError, match="allow_pickle"):
        engine.load_checkpoint(tmp_path)
    path, state = engine.load_checkpoint(tmp_path, allow_pickle=True)
    assert Path(path).name == "step3" and engine.global_steps == 3
    assert state["note"] == "tiny" and state["numbers"] == [1, 2, 3] and state["ds_version"].startswith("0.19")
    assert [group["lr"] for group in engine.optimizer.param_groups] == [1e-2, 5e-3]
    assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [0.1, 0.0]
    assert engine.get_mom() == [(0.9, 0.95)] * 2
    assert engine.module.scale.tolist() == [0.5, 2.0, 3.25]
    with safe_open(tmp_path / "truth.safetensors", framework="pt") as truth:
        for key in truth.keys():  # noqa: SIM118
            kind, _, name = key.partition("/")
            parameter = engine.module.get_parameter(name)
            if kind == "param":
                with deepspeed.zero.GatheredParameters(parameter):
                    value = parameter.detach().clone()
            elif kind == "master":
                value = ds_zero.safe_get_full_fp32_param(parameter)
            else:
                value = ds_zero.safe_get_full_optimizer_state(parameter, kind)
            assert torch.equal(value, truth.get_tensor(key)), key
    assert all(float(state["step"]) == 3 for state in engine.optimizer.state.values())
    ids = torch.arange(10).reshape(2, 5)
    losses = []
    for _ in range(3):
        loss = engine(ids, ids.roll(-1, 1))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_environment_may_opt_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(DATA / "upstream_2_fp32.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.setenv("DEEPSPEED_ALLOW_PICKLE", "1")
    engine = make_engine(3, "fp32")
    assert engine.load_checkpoint(tmp_path)[0] is not None
