"""PipelineEngine: the bits of the plain engine on as many replicas, at every ZeRO stage; and clear errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pipelines import check_equal, make_config, train_pipeline, train_unsplit

from ds_comm.testing import run_ranks

STEPS, NUM = 3, 4


CHUNKS = {
    "1f1b": {},
    "gpipe": {},
    "zb_h1": {},
    "interleaved": {"num_chunks": 2},
    "zb_v": {"num_chunks": 2, "placement": "v"},
}


def both(
    layers: str, stage: int, dtype: str, schedule: str = "1f1b", steps: int = STEPS, **changes: Any
) -> list[float]:
    """Two stages x two replicas against two ranks without a pipeline; the gradient norms."""
    config = make_config(stage, dtype, NUM, pipeline={"schedule": schedule}, **changes)
    pipelined = run_ranks(train_pipeline, 4, layers, config, steps, 2, CHUNKS[schedule])
    unsplit = run_ranks(train_unsplit, 2, layers, config, steps)
    check_equal(pipelined, unsplit[0])
    return unsplit[0][1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("layers", ["plain", "tied"])
def test_two_stages_on_two_replicas_equal_two_ranks(layers: str, stage: int, dtype: str) -> None:
    both(layers, stage, dtype)


@pytest.mark.parametrize(
    ("layers", "stage", "dtype"), [("tied", 0, "bf16"), ("tied", 3, "bf16"), ("tied", 2, "fp32"), ("plain", 3, "fp32")]
)
@pytest.mark.parametrize("schedule", ["gpipe", "zb_h1", "interleaved", "zb_v"])
def test_every_schedule(schedule: str, layers: str, stage: int, dtype: str) -> None:
    both(layers, stage, dtype, schedule)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("layers", ["plain", "tied"])
def test_fp16_scales_skips_and_grows_alike(layers: str, stage: int) -> None:
    """A scale that overflows at first: steps are skipped on all stages, and the scale falls and grows on all."""
    scaling = {"enabled": True, "initial_scale_power": 19, "loss_scale_window": 2, "hysteresis": 1}
    finite = [math.isfinite(norm) for norm in both(layers, stage, "fp16", steps=8, fp16=scaling)]
    assert not finite[0] and True in finite and False in finite[finite.index(True) :]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_stage_that_trains_nothing(stage: int) -> None:
    both("half_frozen", stage, "bf16")


def test_three_stages_and_four() -> None:
    config = make_config(1, "fp32", NUM)
    unsplit = run_ranks(train_unsplit, 1, "tied", config, STEPS)[0]
    for stages in (1, 3, 4):
        check_equal(run_ranks(train_pipeline, stages, "tied", config, STEPS, stages), unsplit)


@pytest.mark.parametrize(("stage", "schedule"), [(0, "1f1b"), (3, "1f1b"), (3, "zb_v")])
def test_gloo(stage: int, schedule: str) -> None:
    """At stage 3 a gather copies there, is collective, and is started ahead where the order is known."""
    config = make_config(stage, "bf16", NUM)
    pipelined = run_ranks(train_pipeline, 4, "tied", config, STEPS, 2, CHUNKS[schedule], transport="gloo")
    check_equal(pipelined, run_ranks(train_unsplit, 2, "tied", config, STEPS)[0])


@pytest.mark.parametrize(("stage", "schedule"), [(0, "1f1b"), (3, "1f1b"), (3, "zb_h1")])
def test_recomputing_activations_changes_no_bit(stage: int, schedule: str) -> None:
    config = make_config(stage, "bf16", NUM, pipeline={"schedule": schedule, "activation_checkpoint_interval": 2})
    pipelined = run_ranks(train_pipeline, 4, "tied", config, STEPS)
    check_equal(pipelined, run_ranks(train_unsplit, 2, "tied", config, STEPS)[0])


def test_one_micro_batch_and_a_gradient_dtype() -> None:
    """Nothing accumulates: means, not sums, are what the holders of a tied weight exchange."""
    for stage in (0, 2):
        config = make_config(stage, "bf16", 1, data_types={"grad_accum_dtype": "fp32"})
        pipelined = run_ranks(train_pipeline, 4, "tied", config, STEPS)
        check_equal(pipelined, run_ranks(train_unsplit, 2, "tied", config, STEPS)[0])


@pytest.mark.parametrize(("stage", "schedule"), [(0, "1f1b"), (3, "1f1b"), (3, "zb_h1")])
def test_a_tied_weight_that_a_micro_batch_leaves_out(stage: int, schedule: str) -> None:
    """At stage 3 the weight is not even gathered then, and still its other use's gradient counts."""
    both("leaves_out", stage, "fp32", schedule)
