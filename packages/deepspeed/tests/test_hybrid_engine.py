"""The hybrid engine around models that are not transformers': what it refuses; it trains as any engine does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import make_config, make_engine, make_net, same, train, weights
from torch import nn

import deepspeed
from deepspeed.runtime.hybrid_engine import DeepSpeedHybridEngine
from ds_comm.testing import run_ranks

ON = {"enabled": True}


def trained(stage: int, **config: Any) -> dict[str, torch.Tensor]:
    engine = make_engine(make_config(stage, **config))
    for step in range(3):
        train(engine, [step])
        engine.eval()
        engine.train()
    return weights(engine)


@pytest.mark.parametrize("stage", [1, 3])
def test_it_trains_as_the_engine_does(stage: int) -> None:
    plain, hybrid = run_ranks(trained, 2, stage), run_ranks(trained, 2, stage, hybrid_engine=ON)
    assert all(same(a, b) for a, b in zip(plain, hybrid, strict=True))


def test_the_config_chooses_it() -> None:
    engine = make_engine(make_config(3, hybrid_engine=ON))
    assert type(engine) is deepspeed.DeepSpeedHybridEngine is DeepSpeedHybridEngine
    with pytest.raises(AttributeError, match="Net has no generate"):
        engine.generate(torch.zeros(1, 2, dtype=torch.long))
    engine.destroy()
    engine = make_engine(make_config(3))
    assert type(engine) is deepspeed.DeepSpeedEngine
    engine.destroy()


class Speaker(nn.Module):
    """A model with a generate of its own, which transformers knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def generate(self, *inputs: Any, **kwargs: Any) -> torch.Tensor:
        assert not self.net.training
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters()])

    def forward(self, *inputs: Any) -> torch.Tensor:
        return self.net(*inputs)


def test_any_generate_sees_the_whole_model() -> None:
    expected = Speaker().eval().generate()
    engine = make_engine(make_config(3, hybrid_engine=ON), Speaker())
    found = engine.generate()
    assert torch.equal(found, expected) and engine.module.net.training
    engine.eval()
    assert torch.equal(engine.module.generate(), expected)
    engine.destroy()


def test_where_the_seconds_went(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(make_config(3, hybrid_engine=ON, steps_per_print=2), Speaker())
    with caplog.at_level("INFO", logger="DeepSpeed"):
        for step in range(4):
            if step < 2:
                engine.generate()
            train(engine, [step])
    engine.destroy()
    lines = [record.message for record in caplog.records if record.message.startswith("hybrid engine, until step")]
    assert len(lines) == 1 and "until step 2" in lines[0]  # nothing was generated for step 4


def test_what_is_refused() -> None:
    with pytest.raises(deepspeed.DeepSpeedConfigError, match=r"hybrid_engine\.inference_tp_size.*leave it at 1"):
        make_engine(make_config(3, hybrid_engine={**ON, "inference_tp_size": 2}))
    stages = deepspeed.PipelineModule([nn.Linear(2, 2)], num_stages=1, loss_fn=nn.MSELoss())
    with pytest.raises(deepspeed.DeepSpeedConfigError, match="PipelineModule"):
        make_engine(make_config(1, hybrid_engine=ON), stages)
