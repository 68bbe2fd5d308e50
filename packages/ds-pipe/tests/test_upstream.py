"""Upstream's instruction lists, literally and by their rules."""

from __future__ import annotations

import pytest

from ds_pipe import (
    BufferOpInstruction,
    DataParallelSchedule,
    ForwardPass,
    InferenceSchedule,
    OptimizerStep,
    PipeSchedule,
    ReduceGrads,
    TrainSchedule,
)


def _codes(schedule: PipeSchedule) -> list[str]:
    """A line per step; Name(buffer) for each instruction."""
    return [
        " ".join(f"{op.name}{op.buffer_id}" if isinstance(op, BufferOpInstruction) else op.name for op in step)
        for step in schedule
    ]


# What upstream 0.19 yields, as printed by it.
KNOWN = {
    (TrainSchedule, 3, 3, 1): [
        "",
        "RecvActivation0 ForwardPass0",
        "SendActivation0",
        "RecvActivation1 ForwardPass1",
        "RecvGrad0 SendActivation1 BackwardPass0",
        "SendGrad0 RecvActivation0 ForwardPass0",
        "RecvGrad1 SendActivation0 BackwardPass1",
        "SendGrad1",
        "RecvGrad0 BackwardPass0",
        "SendGrad0 ReduceTiedGrads ReduceGrads OptimizerStep",
    ],
    (TrainSchedule, 2, 2, 1): [
        "",
        "RecvActivation0 LoadMicroBatch0 ForwardPass0",
        "BackwardPass0",
        "SendGrad0 RecvActivation1 LoadMicroBatch1 ForwardPass1",
        "BackwardPass1",
        "SendGrad1 ReduceTiedGrads ReduceGrads OptimizerStep",
    ],
    (InferenceSchedule, 4, 2, 0): [
        "LoadMicroBatch0 ForwardPass0",
        "LoadMicroBatch1 SendActivation0 ForwardPass1",
        "LoadMicroBatch0 SendActivation1 ForwardPass0",
        "LoadMicroBatch1 SendActivation0 ForwardPass1",
        "SendActivation1",
    ],
    (InferenceSchedule, 3, 3, 1): [
        "",
        "RecvActivation0 ForwardPass0",
        "RecvActivation1 SendActivation0 ForwardPass1",
        "RecvActivation0 SendActivation1 ForwardPass0",
        "SendActivation0",
    ],
    (DataParallelSchedule, 2, 1, 0): [
        "LoadMicroBatch0 ForwardPass0 BackwardPass0",
        "LoadMicroBatch0 ForwardPass0 BackwardPass0 ReduceGrads OptimizerStep",
    ],
}


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: f"{case[0].__name__}-{case[1]}-{case[2]}-{case[3]}")
def test_known_lists(case: tuple[type[PipeSchedule], int, int, int]) -> None:
    kind, micro_batches, stages, stage_id = case
    assert _codes(kind(micro_batches, stages, stage_id)) == KNOWN[case]


@pytest.mark.parametrize(("m", "p"), [(1, 1), (1, 4), (4, 1), (5, 3), (8, 4), (3, 6)])
def test_training_rules(m: int, p: int) -> None:
    for stage in range(p):
        schedule = TrainSchedule(m, p, stage)
        steps = list(schedule)
        flat = [op.name for step in steps for op in step]
        assert len(steps) == 2 * (m + p - 1)
        assert schedule.num_pipe_buffers() == max(2, min(p - stage, m))
        counts = {"ForwardPass": m, "BackwardPass": m, "LoadMicroBatch": m * (stage in (0, p - 1))}
        counts |= {"RecvActivation": m * (stage > 0), "SendGrad": m * (stage > 0)}
        counts |= {"SendActivation": m * (stage < p - 1), "RecvGrad": m * (stage < p - 1)}
        assert {name: flat.count(name) for name in counts} == counts
        assert flat[-3:] == ["ReduceTiedGrads", "ReduceGrads", "OptimizerStep"]
        assert (schedule.is_first_stage, schedule.is_last_stage) == (stage == 0, stage == p - 1)
        assert (schedule.stage, schedule.num_stages, schedule.num_micro_batches) == (stage, p, m)


def test_instructions_carry_their_arguments() -> None:
    op = ForwardPass(3, tag="x")
    assert (op.name, op.kwargs, op.buffer_id, op.tag) == (  # type: ignore[attr-defined]
        "ForwardPass",
        {"buffer_id": 3, "tag": "x"},
        3,
        "x",
    )
    assert repr(op) == "ForwardPass(buffer_id=3, tag='x')" and repr(OptimizerStep()) == "OptimizerStep()"
    assert ForwardPass(3) != ForwardPass(3) and type(ReduceGrads()) is ReduceGrads


def test_a_custom_schedule_has_a_buffer_per_micro_batch() -> None:
    class Mine(PipeSchedule):
        def steps(self):  # type: ignore[no-untyped-def]
            yield [ForwardPass(self._buffer_idx(2))]

    assert Mine(4, 2, 0).num_pipe_buffers() == 4
    assert _codes(Mine(4, 2, 0)) == ["ForwardPass2"]
    with pytest.raises(TypeError, match="abstract"):
        PipeSchedule(1, 1, 0)  # type: ignore[abstract]
