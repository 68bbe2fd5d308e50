"""PipelineEngine: the bits of the plain engine on as many replicas, at every ZeRO stage; and clear errors."""

from __future__ import annotations

from typing import Any

import pytest
from pipelines import check_equal, make_config, train_pipeline, train_unsplit

from ds_comm.testing import run_ranks

STEPS, NUM = 3, 4


def both(layers: str, stage: int, dtype: str, **changes: Any) -> None:
    """Two stages x two replicas against two ranks without a pipeline."""
    config = make_config(stage, dtype, NUM, **changes)
    pipelined = run_ranks(train_pipeline, 4, layers, config, STEPS)
    unsplit = run_ranks(train_unsplit, 2, layers, config, STEPS)
    check_equal(pipelined, unsplit[0])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("layers", ["plain", "tied"])
def test_two_stages_on_two_replicas_equal_two_ranks(layers: str, stage: int, dtype: str) -> None:
    both(layers, stage, dtype)
