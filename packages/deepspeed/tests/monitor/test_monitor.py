"""Monitors: what is written where, by whom, and when a package is missing."""

from __future__ import annotations

import importlib.machinery
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import ds_comm
from deepspeed.monitor import MonitorMaster
from deepspeed.monitor.csv_monitor import csvMonitor
from ds_comm.testing import run_ranks


def csv_section(folder: Path, **extra: Any) -> dict[str, Any]:
    return {"csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "job", **extra}}


def engine(**values: Any) -> Any:
    defaults = {"global_samples": 8, "get_lr": lambda: [0.5], "get_global_grad_norm": lambda: None}
    return SimpleNamespace(**{**defaults, "optimizer": SimpleNamespace(), **values})


def test_csv_layout(tmp_path: Path) -> None:
    master = MonitorMaster(csv_section(tmp_path))
    assert master.enabled
    master.write_events([("Train/Samples/train loss", torch.tensor([0.25]), 4), ("lr", 1, 4)])
    master.write_events([("Train/Samples/train loss", 0.125, 8)])
    assert (tmp_path / "job" / "Train_Samples_train_loss.csv").read_text() == "step,train loss\n4,0.25\n8,0.125\n"
    assert (tmp_path / "job" / "lr.csv").read_text() == "step,lr\n4,1.0\n"


def test_csv_goes_on_in_the_files_of_an_earlier_run(tmp_path: Path) -> None:
    for step in (1, 2):
        MonitorMaster(csv_section(tmp_path)).write_events([("a/b", step, step)])
    assert (tmp_path / "job" / "a_b.csv").read_text() == "step,b\n1,1.0\n2,2.0\n"


def test_default_folder_is_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    MonitorMaster(SimpleNamespace(csv_monitor=SimpleNamespace(enabled=True))).write_events([("x", 1, 1)])
    assert (tmp_path / "csv_monitor" / "DeepSpeedJobName" / "x.csv").exists()


@pytest.mark.parametrize("config", [None, {}, {"csv_monitor": {"enabled": False}}, SimpleNamespace(tensorboard=None)])
def test_nothing_enabled_writes_nothing(config: Any) -> None:
    master = MonitorMaster(config)
    master.write_events([("x", 1, 1)])
    assert not master.enabled and master.monitors == []


def test_as_callback_it_writes_the_mean_loss_of_a_step(tmp_path: Path) -> None:
    monitor = csvMonitor(csv_section(tmp_path)["csv_monitor"])
    for loss in (1.0, 2.0):
        monitor.after_backward(engine(), torch.tensor(loss, requires_grad=True))
    scaled = SimpleNamespace(loss_scale=16.0)
    monitor.after_step(engine(optimizer=scaled, get_global_grad_norm=lambda: torch.tensor(3.0)))
    monitor.after_backward(engine(), torch.tensor(5.0, dtype=torch.bfloat16))
    monitor.after_step(engine(global_samples=16))
    rows = {path.stem.removeprefix("Train_Samples_"): path.read_text().split() for path in (tmp_path / "job").iterdir()}
    assert rows == {
        "train_loss": ["step,train_loss", "8,1.5", "16,5.0"],
        "lr": ["step,lr", "8,0.5", "16,0.5"],
        "loss_scale": ["step,loss_scale", "8,16.0"],
        "grad_norm": ["step,grad_norm", "8,3.0"],
    }


def write_on_every_rank(folder: str) -> bool:
    master = MonitorMaster(csv_section(Path(folder), job_name=f"rank{ds_comm.get_rank()}"))
    master.write_events([("x", ds_comm.get_rank(), 1)])
    return master.enabled


def test_only_rank_0_writes(tmp_path: Path) -> None:
    assert run_ranks(write_on_every_rank, 2, str(tmp_path)) == [True, True]
    assert os.listdir(tmp_path) == ["rank0"]


@pytest.mark.parametrize(
    ("section", "package", "pip"),
    [("wandb", "wandb", "wandb"), ("comet", "comet_ml", "comet-ml"), ("tensorboard", "tensorboard", "tensorboard")],
)
def test_a_missing_package_is_named(section: str, package: str, pip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == package else real(name, *args))
    with pytest.raises(ImportError, match=f"pip install {pip}$"):
        MonitorMaster({section: {"enabled": True}})


class Recorder:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def fake_package(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


def test_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    run, opened = Recorder(), []
    fake_package(monkeypatch, "wandb", init=lambda **kwargs: opened.append(kwargs) or run)
    master = MonitorMaster({"wandb": {"enabled": True, "team": "us", "group": "g", "project": "p"}})
    master.write_events([("loss", 2, 3)])
    master.close()
    master.write_events([("loss", 2, 4)])
    assert opened == [{"project": "p", "group": "g", "entity": "us"}]
    assert run.calls == [("log", ({"loss": 2.0},), {"step": 3}), ("finish", (), {})]


def test_comet_keeps_the_interval_per_name(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, opened = Recorder(), []
    fake_package(monkeypatch, "comet_ml", start=lambda **kwargs: opened.append(kwargs) or experiment)
    section = {"enabled": True, "samples_log_interval": 10, "project": "p", "experiment_name": "n", "mode": None}
    master = MonitorMaster({"comet": section})
    for step in (4, 8, 14, 23, 24):
        master.write_events([("loss", step, step)])
    master.write_events([("lr", 1, 25)])
    assert opened == [{"project": "p"}]
    assert experiment.calls[0] == ("set_name", ("n",), {})
    logged = [(kwargs["name"], kwargs["step"]) for name, _, kwargs in experiment.calls[1:] if name == "log_metric"]
    assert logged == [("loss", 4), ("loss", 14), ("loss", 24), ("lr", 25)]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    master = MonitorMaster({"tensorboard": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}})
    master.write_events([("Train/loss", 0.5, 7)])
    master.close()
    events = EventAccumulator(str(tmp_path / "job"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("Train/loss")] == [(7, 0.5)]
