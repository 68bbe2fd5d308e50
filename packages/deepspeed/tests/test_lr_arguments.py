"""Flags of the schedules: to the command line and back into a `scheduler` section that builds."""

from __future__ import annotations

import argparse

import pytest
import torch

from deepspeed.lr_arguments import (
    add_tuning_arguments,
    get_config_from_args,
    get_lr_from_config,
    override_params,
    parse_arguments,
)
from deepspeed.lr_schedules import VALID_LR_SCHEDULES, OneCycle, make_schedule


def parsed(*flags: str) -> argparse.Namespace:
    return add_tuning_arguments(argparse.ArgumentParser()).parse_args(list(flags))


@pytest.mark.parametrize("name", VALID_LR_SCHEDULES)
def test_defaults_build(name: str) -> None:
    section, error = get_config_from_args(parsed("--lr_schedule", name))
    assert error is None and section is not None
    adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
    assert type(make_schedule(section["type"], adam, section["params"])).__name__ == name


def test_values_arrive() -> None:
    flags = [
        "--lr_schedule",
        "OneCycle",
        "--cycle_min_lr",
        "0.5",
        "--cycle_max_lr",
        "2",
        "--cycle_first_step_size",
        "4",
    ]
    section, _ = get_config_from_args(parsed(*flags, "--cycle_momentum"))
    assert section is not None
    params = section["params"]
    assert (params["cycle_min_lr"], params["cycle_max_lr"], params["cycle_first_step_size"]) == (0.5, 2.0, 4)
    assert params["cycle_momentum"] is True
    assert "cycle_second_step_size" not in params and "warmup_min_lr" not in params
    schedule = OneCycle(torch.optim.Adam([torch.nn.Parameter(torch.ones(1))]), **params)
    assert schedule.total_size == 8


def test_no_and_unknown_schedule() -> None:
    assert get_config_from_args(parsed()) == (None, "--lr_schedule not specified on command line")
    section, error = get_config_from_args(argparse.Namespace(lr_schedule="Nope"))
    assert section is None and error is not None and "Nope is not a supported LR schedule" in error


def test_override_params() -> None:
    params = {"warmup_min_lr": 1.0, "other": 2}
    override_params(argparse.Namespace(warmup_min_lr=0.5, warmup_num_steps=7), params)
    assert params == {"warmup_min_lr": 0.5, "other": 2, "warmup_num_steps": 7}


def test_parse_arguments_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--lr_schedule", "WarmupLR", "--model", "x"])
    args, rest = parse_arguments()
    assert args.lr_schedule == "WarmupLR" and rest == ["--model", "x"]


def test_lr_from_config() -> None:
    assert get_lr_from_config({"type": "WarmupLR", "params": {"warmup_max_lr": 0.5}}) == (0.5, "")
    assert get_lr_from_config({"type": "OneCycle", "params": {"cycle_max_lr": 0.25}}) == (0.25, "")
    assert get_lr_from_config({"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 0.1}}) == (0.1, "")
    for bad in ({"type": "WarmupLR"}, {"type": "Nope", "params": {}}, {"type": "WarmupCosineLR", "params": {}}):
        lr, why = get_lr_from_config(bad)
        assert lr is None and why
