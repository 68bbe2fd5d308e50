"""The batch triangle against its law, T == M * G * W."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed.config import resolve, solve_batch
from deepspeed.errors import ConfigConflictError

SIZES = st.integers(1, 64)


@given(micro=SIZES, steps=SIZES, ranks=st.integers(1, 1024))
def test_any_two_give_the_third(micro: int, steps: int, ranks: int) -> None:
    total = micro * steps * ranks
    for given_values in ((total, micro, None), (total, None, steps), (None, micro, steps), (total, micro, steps)):
        batch = solve_batch(*given_values, ranks)
        got = (batch.train_batch_size, batch.train_micro_batch_size_per_gpu, batch.gradient_accumulation_steps)
        assert got == (total, micro, steps)


@given(total=st.integers(1, 4096), ranks=st.integers(1, 64))
def test_total_alone(total: int, ranks: int) -> None:
    if total % ranks:
        with pytest.raises(ConfigConflictError):
            solve_batch(total, None, None, ranks)
    else:
        batch = solve_batch(total, None, None, ranks)
        assert (batch.train_micro_batch_size_per_gpu, batch.gradient_accumulation_steps) == (total // ranks, 1)


def test_micro_alone() -> None:
    batch = solve_batch(None, 4, None, 8)
    assert (batch.train_batch_size, batch.gradient_accumulation_steps) == (32, 1)


@given(total=SIZES, micro=SIZES, steps=SIZES, ranks=SIZES)
def test_a_contradiction_never_passes(total: int, micro: int, steps: int, ranks: int) -> None:
    if total != micro * steps * ranks:
        with pytest.raises(AssertionError, match="Check batch related parameters"):
            solve_batch(total, micro, steps, ranks)


@pytest.mark.parametrize("steps", [None, 4])
def test_nothing_to_start_from(steps: int | None) -> None:
    text = "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided"
    with pytest.raises(AssertionError, match=text):
        solve_batch(None, None, steps, 2)


def test_error_shows_values_origins_and_the_fix(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4}')
    with pytest.raises(ValueError) as caught:
        resolve(path, dp_world_size=2)
    text = str(caught.value)
    assert "10 != 4 * 1 * 2" in text
    assert f"train_batch_size = 10  (file {path}: train_batch_size)" in text
    assert "gradient_accumulation_steps = 1  (derived: train_batch_size / (micro-batch x ranks))" in text
    assert "data-parallel ranks = 2" in text
    assert "must be a multiple of 4 x 2 ranks" in text
    with pytest.raises(ValueError, match="set train_batch_size to 16"):
        resolve(
            {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
            dp_world_size=2,
        )


@pytest.mark.parametrize("ranks", [0, -1, 1.5, True])
def test_impossible_numbers_of_ranks(ranks: float) -> None:
    with pytest.raises(ConfigConflictError, match="whole number of at least 1"):
        resolve({"train_batch_size": 8}, dp_world_size=ranks)  # type: ignore[arg-type]


def test_whole_float_number_of_ranks() -> None:
    config = resolve({"train_batch_size": 8}, dp_world_size=2.0)  # type: ignore[arg-type]
    assert config.dp_world_size == 2 and isinstance(config.dp_world_size, int)


def test_another_batch_at_run_time() -> None:
    config = resolve({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}, dp_world_size=2)
    more = config.with_batch(train_batch_size=32)
    assert (more.gradient_accumulation_steps, more.train_micro_batch_size_per_gpu) == (4, 4)
    assert more.sources["gradient_accumulation_steps"] == "set at run time"
    assert more.raw is config.raw and config.gradient_accumulation_steps == 2
    micro = config.with_batch(train_micro_batch_size_per_gpu=8)
    assert (micro.train_batch_size, micro.gradient_accumulation_steps) == (32, 2)
    with pytest.raises(ValueError, match="not divisible"):
        config.with_batch(train_batch_size=12)
