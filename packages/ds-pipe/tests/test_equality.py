"""Every schedule on 2, 3 and 4 stages with 1 to 8 micro-batches: losses, weights and gradients of the unsplit model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from pipe_models import train_unsplit
from test_executor import Trained, check_equal, train

from ds_comm.testing import run_ranks

SCHEDULES = ["gpipe", "1f1b", "interleaved", "zb_h1", "zb_v"]
SEED = 77

Case = tuple[str, int, int, str, dict[str, Any]]  # model, steps, micro-batches, schedule, options


@cache
def expected(model: str, num_steps: int, num_micro_batches: int, bf16: bool) -> Trained:
    return train_unsplit(model, num_steps, num_micro_batches, SEED, torch.bfloat16 if bf16 else None)


def cases(num_stages: int) -> list[Case]:
    """Each schedule with each number of micro-batches once, models and options in turn; and one long run each."""
    found: list[Case] = []
    for at, schedule in enumerate(SCHEDULES):
        smallest = num_stages if schedule == "interleaved" else 1
        for num_micro_batches in range(smallest, 9):
            model = "everything" if (at + num_micro_batches) % 3 else "plain"
            options: dict[str, Any] = {"partition_method": "uniform"}
            if num_micro_batches % 4 == 1:
                options["activation_checkpoint_interval"] = 2
            if num_micro_batches == 6:
                options["dtype"] = torch.bfloat16
            found.append((model, 2, num_micro_batches, schedule, options))
        found.append(("everything", 20, num_stages + 1, schedule, {"partition_method": "parameters"}))
    return found


def train_all(listed: list[Case]) -> list[Trained]:
    return [train(*case[:4], {**case[4], "dropout_seed": SEED}) for case in listed]


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_all_schedules_equal_the_unsplit_model(num_stages: int) -> None:
    listed = cases(num_stages)
    ranks = run_ranks(train_all, num_stages, listed, timeout=240)
    for case, *stages in zip(listed, *ranks, strict=True):
        model, num_steps, num_micro_batches, _, options = case
        try:
            check_equal(stages, expected(model, num_steps, num_micro_batches, "dtype" in options))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
