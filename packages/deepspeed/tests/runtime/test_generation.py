"""One rank may use the whole model alone between training steps."""

from __future__ import annotations

import torch
from torch import nn

import deepspeed
import ds_comm
from ds_comm.testing import run_ranks


def generate_on_rank_0() -> tuple[bool, bool, list[int]]:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)])
    x = torch.ones(1, 8)
    expected = net(x).detach()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), config=config)
    alone = True
    with deepspeed.zero.unwrap_model_for_generation(engine) as model, torch.no_grad():
        assert model is net
        if ds_comm.get_rank() == 0:
            alone = all(torch.equal(model(x), expected) for _ in range(3))
    together = torch.equal(engine(x).detach(), expected)
    return alone, together, [p.ds_numel for p in net.parameters()]


def test_rank_0_generates_alone() -> None:
    assert run_ranks(generate_on_rank_0, 2, timeout=60) == [(True, True, [64, 8] * 3)] * 2
