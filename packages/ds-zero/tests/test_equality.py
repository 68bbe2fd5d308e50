"""A layout never changes the mathematics: stages, ranks against accumulation, and plain torch, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zero_helpers as z

from ds_comm.testing import run_ranks

STEPS = 4


def check(name: str, ranks: int, *, total: int | None = None, exact_torch: bool = False, **options: Any) -> None:
    """Stages 0-3 on `ranks` ranks == one rank that accumulates; and == plain torch where the kernel is the same."""
    total = total or ranks
    many = run_ranks(z.all_stages, ranks, name, total=total, **options)
    for rank, (_, found) in enumerate(many):
        assert not found, (rank, found)
    (single, found) = run_ranks(z.all_stages, 1, name, (0, 3), total=total, **options)[0]
    assert not found, found
    results = [result for result, _ in many]
    if total == ranks and name != "CheckpointedTwice":
        assert not z.differences(results[0], single)
        assert z.merged_losses(results, STEPS) == single["losses"]
    else:  # ranks and accumulation (the sum over ranks of each micro-batch is one term), or two sums per backward
        bound = 2e-5 if options.get("dtype") is None else 2e-2
        for name_, value in single["values"].items():
            torch.testing.assert_close(results[0]["values"][name_], value, rtol=bound, atol=bound)
        torch.testing.assert_close(z.merged_losses(results, STEPS), single["losses"], rtol=bound, atol=bound)
    if exact_torch:
        plain = z.reference(
            name,
            total=total,
            optimizer=options.get("optimizer", "adamw"),
            grouped=options.get("grouped", False),
            schedule=options.get("schedule", False),
            clip=options.get("gradient_clipping", 0.0),
        )
        assert not z.differences(plain, single, ("norms", "losses", "values"))


@pytest.mark.parametrize("name", sorted(set(z.ZOO) - {"Mixed"}))
def test_every_model_fp32(name: str) -> None:
    check(name, 2, exact_torch=name != "CheckpointedTwice")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["Frozen", "Unused", "Tied", "Checkpointed", "Sparse", "Attention"])
def test_low_precision(name: str, dtype: str) -> None:
    check(name, 2, dtype=dtype)


def test_mixed_dtypes() -> None:
    check("Mixed", 2)
    check("Mixed", 3, optimizer="sgd")


@pytest.mark.parametrize("dtype", [None, "bf16", "fp16"])
def test_three_ranks_and_accumulation(dtype: str | None) -> None:
    check("Net", 3, total=6, dtype=dtype, gradient_clipping=0.3, grouped=True, schedule=True, exact_torch=not dtype)


def test_four_ranks() -> None:
    check("Tied", 4, exact_torch=True, gradient_clipping=0.05)


@pytest.mark.parametrize("optimizer", sorted(z.OPTIMIZERS))
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_every_optimizer(optimizer: str, dtype: str | None) -> None:
    check("Net", 3, optimizer=optimizer, grouped=True, dtype=dtype)


@pytest.mark.parametrize("optimizer", sorted(z.OPTIMIZERS))
def test_every_optimizer_against_torch(optimizer: str) -> None:
    single = run_ranks(z.train, 1, "Net", 0, total=2, optimizer=optimizer)[0]
    plain = z.reference("Net", total=2, optimizer=optimizer)
    for name, value in plain["values"].items():
        torch.testing.assert_close(single["values"][name], value, rtol=2e-5, atol=2e-6)
