"""Optimizers under upstream's names: torch's bits where torch has the method, the written formula elsewhere."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    dtype = next(net.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(4, 7, generator=generator).to(dtype)).square().sum().backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", [DeepSpeedCPUAdam, FusedAdam])
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_has_the_bits_of_torchs_fused_adam(kind: Any, decoupled: bool) -> None:
    mode = {"adamw_mode" if kind is DeepSpeedCPUAdam else "adam_w_mode": decoupled}
    ours, theirs = model(), model()
    torchs = torch.optim.AdamW if decoupled else torch.optim.Adam
    expected = train(theirs, torchs(theirs.parameters(), lr=0.1, betas=(0.8, 0.9), weight_decay=0.2, fused=True))
    assert_equal(train(ours, kind(ours.parameters(), lr=0.1, betas=(0.8, 0.9), weight_decay=0.2, **mode)), expected)


def test_groups_of_another_optimizer_are_taken_over_and_left_alone() -> None:
    ours, theirs = model(), model()
    groups = [{"params": ours[0].parameters(), "lr": 0.3}, {"params": ours[2].parameters(), "weight_decay": 0.5}]
    first = torch.optim.AdamW(groups, lr=0.1)
    before = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in first.param_groups])
    adam = DeepSpeedCPUAdam(first.param_groups, lr=0.1, weight_decay=0.0, adamw_mode=False)
    assert [group["lr"] for group in adam.param_groups] == [0.3, 0.1]
    assert all(group["fused"] and not group["decoupled_weight_decay"] for group in adam.param_groups)
    assert [{k: v for k, v in group.items() if k != "params"} for group in first.param_groups] == before
    like = [{"params": theirs[0].parameters(), "lr": 0.3}, {"params": theirs[2].parameters(), "weight_decay": 0.5}]
    like[0]["weight_decay"] = 0.01  # AdamW's default, which the first optimizer wrote into its group
    assert_equal(train(ours, adam), train(theirs, torch.optim.Adam(like, lr=0.1, fused=True)))


def by_formula(
    weights: list[float],
    grads: list[list[float]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    adamw: bool,
) -> list[float]:
    mean, square = [0.0] * len(weights), [0.0] * len(weights)
    for grad in grads:
        for i, g in enumerate(grad):
            if adamw:
                weights[i] *= 1 - lr * decay
            else:
                g += decay * weights[i]
            mean[i] = betas[0] * mean[i] + (1 - betas[0]) * g
            square[i] = betas[1] * square[i] + (1 - betas[1]) * g * g
            weights[i] -= lr * mean[i] / (math.sqrt(square[i]) + eps)
    return weights


@pytest.mark.parametrize("adamw", [True, False])
def test_adam_without_bias_correction_is_the_formula(adamw: bool) -> None:
    weights, grads = [0.5, -1.0, 2.0], [[0.1, -0.2, 0.3], [0.0, 0.5, -0.1], [1.0, 0.0, 0.2]]
    p = nn.Parameter(torch.tensor(weights, dtype=torch.float64))
    adam = DeepSpeedCPUAdam(
        [p],
        lr=0.1,
        bias_correction=False,
        betas=(0.7, 0.8),
        eps=1e-6,
        weight_decay=0.3,
        adamw_mode=adamw,
        fp32_optimizer_states=False,
    )
    for grad in grads:
        p.grad = torch.tensor(grad, dtype=torch.float64)
        adam.step()
    expected = by_formula(weights, grads, 0.1, (0.7, 0.8), 1e-6, 0.3, adamw)
    assert p.tolist() == pytest.approx(expected, rel=1e-12)
    assert float(adam.state[p]["step"]) == 3 and p.grad is not None


@pytest.mark.parametrize("amsgrad", [False, True])
def test_16_bit_parameters_keep_fp32_moments(amsgrad: bool) -> None:
    ours, single = model().bfloat16(), model().bfloat16().float()
    adam = DeepSpeedCPUAdam(ours.parameters(), lr=0.01, weight_decay=0.1, amsgrad=amsgrad)
    reference = torch.optim.AdamW(single.parameters(), lr=0.01, weight_decay=0.1, amsgrad=amsgrad)
    for step in range(3):
        for a, b in zip(ours.parameters(), single.parameters(), strict=True):
            b.data.copy_(a)
            a.grad = torch.full_like(a, 0.1 * (step + 1))
            b.grad = a.grad.float()
        adam.step()
        reference.step()
        for a, b in zip(ours.parameters(), single.parameters(), strict=True):
            assert adam.state[a]["exp_avg"].dtype == torch.float32
            torch.testing.assert_close(a.float(), b, rtol=2**-8, atol=1e-6)
    plain = DeepSpeedCPUAdam(model().bfloat16().parameters(), fp32_optimizer_states=False)
    net = model().bfloat16()
    plain = DeepSpeedCPUAdam(net.parameters(), fp32_optimizer_states=False)
    train(net, plain, 1)
    assert all(state["exp_avg"].dtype == torch.bfloat16 for state in plain.state.values())


def test_adam_state_survives_saving() -> None:
    straight = model()
    expected = train(straight, DeepSpeedCPUAdam(straight.parameters(), bias_correction=False, lr=0.1), 1)
    first, second = model(), model()
    optimizer = DeepSpeedCPUAdam(first.parameters(), bias_correction=False, lr=0.1)
    train(first, optimizer, 1)
    assert_equal([p.detach() for p in first.parameters()], expected)
    resumed = DeepSpeedCPUAdam(second.parameters())
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["bias_correction"] is False
    assert_equal(train(first, optimizer, 2), train(second, resumed, 2))


@pytest.mark.parametrize("kind", [DeepSpeedCPUAdam, FusedAdam, DeepSpeedCPUAdagrad, DeepSpeedCPULion])
def test_step_hooks_run_once_and_closures_are_returned(kind: Any) -> None:
    for base in (torch.optim.Adam, torch.optim.Adagrad):
        base([nn.Parameter(torch.zeros(1))])  # torch now wraps the base's step as well
    p = nn.Parameter(torch.ones(2))
    optimizer = kind([p])
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    assert calls == ["post"] and not torch.equal(p, torch.ones(2))


def test_fused_adam_keeps_upstreams_refusals() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="AMSGrad"):
        FusedAdam([p], amsgrad=True)
    with pytest.raises(RuntimeError, match="grad_norms"):
        FusedAdam([p]).step(scale=2.0)
    p.grad = torch.ones(2)
    FusedAdam([p], set_grad_none=False).zero_grad()
    assert torch.equal(p.grad, torch.zeros(2))
    FusedAdam([p]).zero_grad()
    assert p.grad is None


def test_adagrad_is_torchs_dense_and_sparse() -> None:
    ours, theirs = model(), model()
    expected = train(theirs, torch.optim.Adagrad(theirs.parameters(), lr=0.1, eps=1e-10, weight_decay=0.1, fused=True))
    assert_equal(
        train(ours, DeepSpeedCPUAdagrad(list(ours.parameters()), lr=0.1, weight_decay=0.1, adamw_mode=False)), expected
    )
    tables = [nn.Embedding(5, 2, sparse=True, _weight=torch.ones(5, 2)) for _ in range(2)]
    optimizers = [DeepSpeedCPUAdagrad(tables[0].parameters()), torch.optim.Adagrad(tables[1].parameters())]
    for table, optimizer in zip(tables, optimizers, strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            table(torch.tensor([1, 3, 3])).sum().backward()
            optimizer.step()
    assert torch.equal(tables[0].weight, tables[1].weight)
    assert torch.equal(tables[0].weight[0], torch.ones(2))


@pytest.mark.parametrize("kind", [DeepSpeedCPULion, FusedLion])
def test_lion_is_the_formula(kind: Any) -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    lion = kind([p], lr=0.25, betas=(0.5, 0.75), weight_decay=0.5)
    weights, momentum = p.tolist(), [0.0] * 3
    for grad in ([1.0, -1.0, 0.0], [-4.0, 0.0, 2.0]):
        p.grad = torch.tensor(grad)
        lion.step()
        for i, g in enumerate(grad):
            c = 0.5 * momentum[i] + 0.5 * g
            weights[i] = weights[i] * (1 - 0.25 * 0.5) - 0.25 * ((c > 0) - (c < 0))
            momentum[i] = 0.75 * momentum[i] + 0.25 * g
    assert p.tolist() == weights  # powers of two: exact in fp32
    assert lion.state[p]["exp_avg"].tolist() == momentum


def test_lion_moments_of_16_bit_parameters() -> None:
    for kind, dtype in ((DeepSpeedCPULion, torch.float32), (FusedLion, torch.bfloat16)):
        p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        p.grad = torch.ones_like(p)
        optimizer = kind([p])
        optimizer.step()
        assert optimizer.state[p]["exp_avg"].dtype == dtype
    with pytest.raises(ValueError, match="betas"):
        DeepSpeedCPULion([p], betas=(1.0, 0.9))


@pytest.mark.parametrize("kind", [DeepSpeedCPUAdam, FusedAdam, FusedLamb, DeepSpeedCPULion, FusedLion])
def test_copies_and_pickles_go_on_alike(kind: Any) -> None:
    net = model()
    optimizer = kind(net.parameters(), lr=0.1)
    train(net, optimizer)
    for net_again, again in (copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))):
        reference = copy.deepcopy((net, optimizer.state_dict()))
        fresh = kind(reference[0].parameters(), lr=0.1)
        fresh.load_state_dict(reference[1])
        assert_equal(train(net_again, again), train(reference[0], fresh))
        again.zero_grad()
