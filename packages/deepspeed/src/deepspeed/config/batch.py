"""The batch triangle, as a pure function of the three numbers and the number of data-parallel ranks.

    train_batch_size T = train_micro_batch_size_per_gpu M  x  gradient_accumulation_steps G  x  data-parallel ranks W

Any two of T, M, G give the third; T or M alone gives G = 1. The number of ranks is an argument and never guessed.
Every error shows the four values and where each came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deepspeed.errors import ConfigConflictError

__all__ = ["BATCH_KEYS", "Batch", "solve_batch"]

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Batch:
    """Three numbers whose product law holds, and where each came from."""

    train_batch_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int
    sources: Mapping[str, str]
    """Key -> "derived: ..." for each number that was not given."""


def solve_batch(
    train_batch_size: int | None,
    train_micro_batch_size_per_gpu: int | None,
    gradient_accumulation_steps: int | None,
    dp_world_size: int,
    sources: Mapping[str, str] | None = None,
) -> Batch:
    """Complete the triangle. `sources` says where the given numbers came from (for the error text).

    Raises ConfigConflictError (a ValueError and an AssertionError) when neither T nor M is given or T != M * G * W.
    """
    total, micro, steps, ranks = (
        train_batch_size,
        train_micro_batch_size_per_gpu,
        gradient_accumulation_steps,
        dp_world_size,
    )
    how: dict[str, str] = {}
    if total is None and micro is None:
        raise ConfigConflictError(
            "Check batch related parameters. Either train_batch_size or train_micro_batch_size_per_gpu needs to "
            "be provided" + (f" (only gradient_accumulation_steps={steps} is)" if steps is not None else "")
        )
    if steps is None:
        if total is None or micro is None:
            steps, how[BATCH_KEYS[2]] = 1, "derived: 1, since it is not given"
        else:
            steps, how[BATCH_KEYS[2]] = total // micro // ranks, "derived: train_batch_size / (micro-batch x ranks)"
    if micro is None and total is not None:
        micro, how[BATCH_KEYS[1]] = (
            total // ranks // steps if steps else 0,
            "derived: train_batch_size / (ranks x accumulation steps)",
        )
    if total is None and micro is not None:
        total, how[BATCH_KEYS[0]] = micro * steps * ranks, "derived: micro-batch x accumulation steps x ranks"
    assert total is not None and micro is not None
    if min(total, micro, steps) < 1 or total != micro * steps * ranks:
        raise ConfigConflictError(_contradiction((total, micro, steps), ranks, {**(sources or {}), **how}, how))
    return Batch(total, micro, steps, how)


def _contradiction(
    values: tuple[int, int, int], ranks: int, sources: Mapping[str, str], derived: Mapping[str, str]
) -> str:
    total, micro, steps = values
    lines = [
        f"    {key} = {value}  ({sources.get(key, 'given')})" for key, value in zip(BATCH_KEYS, values, strict=True)
    ]
    fit = micro * steps * ranks
    if derived:
        given = " x ".join(str(v) for k, v in zip(BATCH_KEYS[1:], values[1:], strict=True) if k not in derived)
        unit = f"{given} x {ranks} ranks" if given else f"{ranks} ranks"
        fix = f"train_batch_size must be a multiple of {unit}; change it, or give another number"
    else:
        fix = f"set train_batch_size to {fit}, or remove one of the three and it is derived"
    return (
        "Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * "
        "gradient_acc_step * world_size: "
        f"{total} != {micro} * {steps} * {ranks}\n"
        + "\n".join(lines)
        + f"\n    data-parallel ranks = {ranks}\nFix: {fix}."
    )
