"""Lamb, Lion and Muon from the config: equal to the unsharded optimizer at every stage, resumed at another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engines as e
import pytest
import torch
from torch import nn

import deepspeed
import ds_comm
from deepspeed.errors import DeepSpeedConfigError
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion
from deepspeed.optimizers import build_optimizer
from deepspeed.runtime.zero.muon import MuonWithAuxAdam
from deepspeed.runtime.zero.muon.original_muon import muon_update, zeropower_via_newtonschulz5
from ds_comm.testing import run_ranks

SECTIONS: dict[str, dict[str, Any]] = {
    "Lamb": {"lr": 0.05, "weight_decay": 0.1},
    "Lion": {"lr": 0.003, "weight_decay": 0.1},
    "Muon": {"muon_lr": 0.05, "adam_lr": 0.01, "weight_decay": 0.1, "momentum": 0.9},
}


def config(name: str, stage: int, dtype: str = "fp32", **changes: Any) -> dict[str, Any]:
    return e.make_config(stage, dtype, optimizer={"type": name, "params": SECTIONS[name]}, **changes)


def trained(
    name: str, stage: int, dtype: str, micro_batches: int, init: bool = False
) -> tuple[dict[str, torch.Tensor], set[str]]:
    steps = micro_batches // ds_comm.get_world_size()
    settings = config(name, stage, dtype, gradient_accumulation_steps=steps)
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=init):
        net = e.make_net()
    engine = e.make_engine(settings, net)
    e.train(engine, range(4), micro_batches)
    keys = {key for state in engine.optimizer.optimizer.state.values() for key in state}
    return e.weights(engine), keys


def unsharded(name: str, micro_batches: int) -> dict[str, torch.Tensor]:
    """The optimizer on the model's own parameters: mean gradients, clipped by the same formula."""
    net = e.make_net()
    params = list(net.parameters())
    groups = {
        "Lamb": lambda: FusedLamb(params, **SECTIONS["Lamb"]),
        "Lion": lambda: DeepSpeedCPULion(params, **SECTIONS["Lion"]),
        "Muon": lambda: MuonWithAuxAdam(
            [
                {"params": [p for p in params if p.dim() > 1], "use_muon": True, "lr": 0.05, "momentum": 0.9},
                {"params": [p for p in params if p.dim() < 2], "use_muon": False, "lr": 0.01},
            ]
        ),
    }
    optimizer = groups[name]()
    if name == "Muon":
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1
    for step in range(4):
        total = [torch.zeros_like(p) for p in params]
        for index in range(micro_batches):
            for sum_, grad in zip(total, torch.autograd.grad(net(*e.micro_batch(step, index)), params), strict=True):
                sum_.add_(grad)
        for p, sum_ in zip(params, total, strict=True):
            p.grad = sum_ * (1.0 / micro_batches)
        norm = float(torch.stack([p.grad.double().square().sum() for p in params]).sum().sqrt().float())
        clip = min(1.0, 1.0 / (norm + 1e-6))
        optimizer.step(scale=1 / clip) if name == "Lamb" else optimizer.step(grad_scale=clip)
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def differences(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, tuple[int, float]]:
    """What a failure has to say: parameter -> how many elements differ, and the largest difference."""
    apart = {name: (weights[name] - expected[name]).abs() for name in expected}
    return {name: (int((d != 0).sum()), float(d.max())) for name, d in apart.items() if d.any()}


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_stage_and_number_of_ranks_has_the_same_bits(name: str, dtype: str) -> None:
    for ranks, stages in ((1, (0, 3)), (2, (0, 1, 2, 3)), (3, (1, 2, 3))):
        expected = run_ranks(trained, 1, name, 1, dtype, ranks)[0][0]
        for stage in stages:
            for weights, _ in run_ranks(trained, ranks, name, stage, dtype, ranks):
                assert e.same(weights, expected), (ranks, stage)
    if dtype != "fp32":  # zero.Init makes 16-bit parameters, and the masters from them
        return
    built_in_shards = run_ranks(trained, 3, name, 3, dtype, 3, True)[0][0]
    assert e.same(built_in_shards, expected)


@pytest.mark.parametrize("name", SECTIONS)
def test_the_sharded_optimizer_is_the_unsharded(name: str) -> None:
    found = run_ranks(trained, 2, name, 3, "fp32", 2)[0][0]
    expected = unsharded(name, 2)
    for key, value in expected.items():
        if name == "Lamb":  # 1 / (1 / clip) rounds differently
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)
        else:
            assert torch.equal(found[key], value), key


def saved(folder: str, name: str, stage: int) -> None:
    engine = e.make_engine(config(name, stage, "bf16", gradient_accumulation_steps=6 // ds_comm.get_world_size()))
    e.train(engine, range(2), 6)
    engine.save_checkpoint(folder)


def resumed(folder: str, name: str, stage: int) -> tuple[dict[str, torch.Tensor], set[float]]:
    engine = e.make_engine(config(name, stage, "bf16", gradient_accumulation_steps=6 // ds_comm.get_world_size()))
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    e.train(engine, range(2, 4), 6)
    return e.weights(engine), {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}


@pytest.mark.parametrize("name", SECTIONS)
def test_resume_at_another_layout(name: str, tmp_path: Path) -> None:
    run_ranks(saved, 2, str(tmp_path), name, 3)
    here, steps = run_ranks(resumed, 2, str(tmp_path), name, 3)[0]
    assert steps == {4.0}
    straight = run_ranks(trained, 2, name, 3, "bf16", 6)[0][0]
    assert e.same(here, straight)
    for ranks, stage in ((2, 0), (1, 2), (3, 1)):
        there, _ = run_ranks(resumed, ranks, str(tmp_path), name, stage)[0]
        if ranks == 2:
            assert e.same(here, there)
        for key, value in here.items():  # other ranks sum the six gradients in another order
            torch.testing.assert_close(there[key], value, rtol=2**-6, atol=0.02)


def test_flags_say_what_muon_takes() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(4, 4), "body": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4, bias=False)})
    net["body"].bias.use_muon = False
    section = deepspeed.DeepSpeedConfig({"train_batch_size": 1, "optimizer": {"type": "Muon"}})
    deepspeed.set_optimizer_flags(section, net)
    assert [n for n, p in net.named_parameters() if p.use_muon] == ["body.weight"]
    other = nn.Linear(2, 2)
    deepspeed.set_optimizer_flags(deepspeed.DeepSpeedConfig({"train_batch_size": 1}), other)
    assert not hasattr(other.weight, "use_muon")


class Section:
    def __init__(self, type_: str, **params: Any) -> None:
        self.type, self.params = type_, params


def test_muons_section_gives_two_groups() -> None:
    net = e.make_net()
    muon = build_optimizer(Section("muon", lr=0.5, adam_lr=0.25, betas=[0.8, 0.9]), net.parameters(), net)
    one, two = muon.param_groups
    assert (one["use_muon"], one["lr"], one["momentum"]) == (True, 0.5, 0.95)
    assert (two["use_muon"], two["lr"], two["betas"]) == (False, 0.25, (0.8, 0.9))
    assert {p.dim() for p in one["params"]} == {2} and {p.dim() for p in two["params"]} == {1}
    groups = [{"params": net.blocks.parameters(), "weight_decay": 0.5}, {"params": net.head.parameters()}]
    made = build_optimizer(Section("Muon"), groups, net)
    assert [group["weight_decay"] for group in made.param_groups] == [0.5, 0.5, 0.0, 0.0]
    with pytest.raises(DeepSpeedConfigError, match=r"does not take \['momentun'\]"):
        build_optimizer(Section("Muon", momentun=0.9), net.parameters(), net)
    with pytest.raises(ValueError, match=r"param group 0 .* use_muon"):
        MuonWithAuxAdam([{"params": [net.head.weight]}])


def test_muon_update_is_the_direction() -> None:
    torch.manual_seed(0)
    grad, momentum = torch.randn(8, 4), torch.randn(8, 4)
    mixed = 0.95 * momentum + 0.05 * grad
    expected = zeropower_via_newtonschulz5(0.05 * grad + 0.95 * mixed, 5) * 2**0.5
    torch.testing.assert_close(muon_update(grad.clone(), momentum, ns_method="classic"), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(momentum, mixed)


def test_fused_lamb_has_upstreams_interface() -> None:
    p = nn.Parameter(torch.ones(4))
    lamb = FusedLamb([p], lr=0.1, max_grad_norm=1.0)
    p.grad = torch.full((4,), 8.0)
    lamb.step(scale=2.0)
    assert lamb.state[p]["exp_avg"].tolist() == pytest.approx([0.05] * 4, rel=1e-5)  # 8 / 2, then of norm 8: to norm 1
    assert lamb.get_lamb_coeffs() == [pytest.approx(1.0, rel=1e-3)]
    with pytest.raises(RuntimeError, match="AMSGrad"):
        FusedLamb([p], amsgrad=True)
    with pytest.raises(RuntimeError, match="grad_norms"):
        lamb.step(grad_norms=[1.0])
    with pytest.raises(RuntimeError, match="gradient_clipping"):
        lamb.step_pieces([])
