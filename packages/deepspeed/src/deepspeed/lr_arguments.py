"""Command line flags for the learning rate schedules: one `--flag` per parameter, and back from parsed flags to a
`scheduler` section.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from deepspeed.lr_schedules import VALID_LR_SCHEDULES

__all__ = ["add_tuning_arguments", "get_config_from_args", "get_lr_from_config", "override_params", "parse_arguments"]

_WARMUP: dict[str, Any] = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000, "warmup_type": "log"}
_FLAGS: dict[str, dict[str, Any]] = {
    "LRRangeTest": {
        "lr_range_test_min_lr": 0.001,
        "lr_range_test_step_rate": 1.0,
        "lr_range_test_step_size": 1000,
        "lr_range_test_staircase": False,
    },
    "OneCycle": {
        "cycle_first_step_size": 1000,
        "cycle_first_stair_count": -1,
        "cycle_second_step_size": -1,
        "cycle_second_stair_count": -1,
        "decay_step_size": 1000,
        "cycle_min_lr": 0.01,
        "cycle_max_lr": 0.1,
        "decay_lr_rate": 0.0,
        "cycle_momentum": False,
        "cycle_min_mom": 0.8,
        "cycle_max_mom": 0.9,
        "decay_mom_rate": 0.0,
    },
    "WarmupLR": _WARMUP,
    "WarmupDecayLR": {**_WARMUP, "total_num_steps": 0},
    "WarmupCosineLR": {
        "total_num_steps": 0,
        "warmup_min_ratio": 0.0,
        "warmup_num_steps": 1000,
        "cos_min_ratio": 0.0001,
        "warmup_type": "log",
    },
}
"""Schedule -> parameter -> default of its flag. A size or count of -1 stands for "not given"."""

_OPTIONAL_SIZES = ("cycle_second_step_size", "cycle_first_stair_count", "cycle_second_stair_count")
_PEAK = {
    "LRRangeTest": "lr_range_test_min_lr",
    "OneCycle": "cycle_max_lr",
    "WarmupLR": "warmup_max_lr",
    "WarmupDecayLR": "warmup_max_lr",
}


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--lr_schedule NAME` and one flag per parameter of the schedules; returns the parser."""
    group = parser.add_argument_group("Convergence Tuning", "Convergence tuning configurations")
    group.add_argument(
        "--lr_schedule", type=str, default=None, help=f"learning rate schedule: {', '.join(VALID_LR_SCHEDULES)}"
    )
    flags = {name: default for params in _FLAGS.values() for name, default in params.items()}
    for name, default in flags.items():
        users = ", ".join(schedule for schedule, params in _FLAGS.items() if name in params)
        if isinstance(default, bool):
            group.add_argument(f"--{name}", default=default, action="store_true", help=f"parameter of {users}")
        else:
            group.add_argument(
                f"--{name}", type=type(default), default=default, help=f"parameter of {users} (default {default})"
            )
    return parser


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line's schedule flags: (known arguments, the rest)."""
    return add_tuning_arguments(argparse.ArgumentParser()).parse_known_args()


def override_params(args: Any, params: dict[str, Any], schedule: str | None = None) -> None:
    """Write the flags of `args` over `params`, in place: those of `schedule`, or of all schedules."""
    names = _FLAGS[schedule] if schedule is not None else {name: None for flags in _FLAGS.values() for name in flags}
    for name in names:
        value = getattr(args, name, None)
        if value is not None and not (name in _OPTIONAL_SIZES and value < 0):
            params[name] = value


def get_config_from_args(args: Any) -> tuple[dict[str, Any] | None, str | None]:
    """The `scheduler` section that the flags ask for: (section, None), or (None, why there is none)."""
    schedule = getattr(args, "lr_schedule", None)
    if schedule is None:
        return None, "--lr_schedule not specified on command line"
    if schedule not in VALID_LR_SCHEDULES:
        return (
            None,
            f"{schedule} is not a supported LR schedule; the supported ones are {', '.join(VALID_LR_SCHEDULES)}",
        )
    params: dict[str, Any] = {}
    override_params(args, params, schedule)
    return {"type": schedule, "params": params}, None


def get_lr_from_config(config: Mapping[str, Any]) -> tuple[float | None, str]:
    """The learning rate that a `scheduler` section leads to: (its peak, ""), or (None, why it has none)."""
    if "type" not in config or "params" not in config:
        return None, "LR schedule type and params must both be in the scheduler section"
    schedule, params = config["type"], config["params"]
    if schedule not in VALID_LR_SCHEDULES:
        return (
            None,
            f"{schedule} is not a supported LR schedule; the supported ones are {', '.join(VALID_LR_SCHEDULES)}",
        )
    key = _PEAK.get(schedule)
    if key is None or key not in params:
        return None, f"{schedule} takes the optimizer's own learning rate"
    return params[key], ""
