"""The classes against torch.optim: a thousand steps, groups, resume, dtypes of states, bad input."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_kernels import KernelArgumentError
from ds_kernels.optim import SGD, Adagrad, Adam, AdamW, FlatOptimizer, Lamb, Lion, Muon

TORCH: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "adam": (Adam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9)}),
    "adamw": (AdamW, torch.optim.AdamW, {"lr": 0.01}),
    "amsgrad": (AdamW, torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "maximize": True}),
    "adagrad": (Adagrad, torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1}),
    "sgd": (SGD, torch.optim.SGD, {"lr": 0.01, "weight_decay": 0.1}),
    "momentum": (SGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "dampening": 0.2}),
    "nesterov": (SGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "maximize": True}),
}


class PlainLion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv:2302.06675."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "wd": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                c = 0.9 * m + 0.1 * p.grad
                p -= group["lr"] * (c.sign() + group["wd"] * p)
                self.state[p]["m"] = 0.99 * m + 0.01 * p.grad


class PlainLamb(torch.optim.Optimizer):
    """Algorithm 2 of arXiv:1904.00962 with phi bounded."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "wd": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                t = state["t"] = state.get("t", 0) + 1
                m = state["m"] = 0.9 * state.get("m", torch.zeros_like(p)) + 0.1 * p.grad
                v = state["v"] = 0.999 * state.get("v", torch.zeros_like(p)) + 0.001 * p.grad**2
                u = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8) + group["wd"] * p
                p -= group["lr"] * (p.norm() / u.norm()).clamp(0.01, 10) * u


PLAIN = TORCH | {
    "lion": (Lion, PlainLion, {"lr": 0.001, "weight_decay": 0.1}),
    "lamb": (Lamb, PlainLamb, {"lr": 0.001, "weight_decay": 0.1}),
}


def model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(net.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 7, generator=generator, dtype=torch.float64).to(dtype)
        (net(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()


def groups(net: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": net[0].parameters()}, {"params": [net[2].weight], "lr": 0.003}, {"params": [net[2].bias]}]


@pytest.mark.parametrize("name", PLAIN)
def test_a_thousand_steps_in_fp64(name: str) -> None:
    kind, plain, options = PLAIN[name]
    ours, theirs = model(), model()
    train(ours, kind(groups(ours), **options), 1000)
    train(theirs, plain(groups(theirs), **options), 1000)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", PLAIN)
def test_fifty_steps_in_fp32_stay_near(name: str) -> None:
    kind, plain, options = PLAIN[name]
    ours, theirs = model(torch.float32), model()
    train(ours, kind(groups(ours), **options), 50)
    train(theirs, plain(groups(theirs), **options), 50)
    # a sign that flips in Lion moves a weight by 2 lr; everything else is fp32 rounding over 50 steps
    atol = 0.005 if name == "lion" else 5e-5
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=atol)


def everything() -> dict[str, Callable[[nn.Module], FlatOptimizer]]:
    made: dict[str, Callable[[nn.Module], FlatOptimizer]] = {
        name: (lambda net, kind=kind, options=options: kind(net.parameters(), **options))
        for name, (kind, _, options) in PLAIN.items()
    }
    made["muon"] = lambda net: Muon(
        [
            {"params": [p for p in net.parameters() if p.dim() > 1]},
            {"params": [p for p in net.parameters() if p.dim() < 2], "use_muon": False},
        ],
        lr=0.01,
    )
    made["bf16 states"] = lambda net: AdamW(net.parameters(), state_dtype=torch.bfloat16, stochastic_rounding=True)
    return made


@pytest.mark.parametrize("name", everything())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_is_exact(name: str, dtype: torch.dtype) -> None:
    make = everything()[name]
    straight, first, second = model(dtype), model(dtype), model(dtype)
    train(straight, whole := make(straight), 3)
    train(straight, whole, 3, seed=2)
    train(first, before := make(first), 3)
    second.load_state_dict(first.state_dict())
    resumed = make(second)
    resumed.load_state_dict(copy.deepcopy(before.state_dict()))
    train(second, resumed, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))
    for p in second.parameters():
        for key, value in resumed.state[p].items():
            assert key == "step" or value.dtype == resumed.state_dtype


def test_strides_of_parameter_and_gradient() -> None:
    values, grads = torch.randn(6, 4), torch.randn(6, 4)
    for make in (AdamW, Lamb, Muon):
        plain, strided = nn.Parameter(values.clone()), nn.Parameter(values.t().contiguous().t())
        assert not strided.is_contiguous()
        plain.grad, strided.grad = grads.clone(), grads.t().contiguous().t()
        for p in (plain, strided):
            optimizer = make([p])
            optimizer.step()
            optimizer.step()
        assert torch.equal(plain, strided)


def test_stochastic_rounding_keeps_small_updates() -> None:
    found = {}
    for stochastic in (False, True):
        p = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
        optimizer = SGD([p], lr=2**-12, stochastic_rounding=stochastic, seed=3)
        for _ in range(64):
            p.grad = torch.ones_like(p)
            optimizer.step()
        found[stochastic] = float(p.detach().float().mean())
    assert found[False] == 1.0  # each update is less than half a unit in the last place
    assert abs(found[True] - (1 - 64 * 2**-12)) < 3e-4


def test_grad_scale_and_parameters_without_gradient() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 8.0)
    SGD([p, q], lr=1.0).step(grad_scale=0.125)
    assert p.tolist() == [0.0] * 3 and q.tolist() == [1.0] * 3


def test_closure_and_hooks() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = Lion([p], lr=0.5)
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    assert calls == ["post"] and p.tolist() == [0.5, 0.5]


def test_schedulers_take_them() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = AdamW([p], lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    p.grad = torch.ones(2)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_lamb_tells_its_ratios() -> None:
    big, small = nn.Parameter(torch.full((4,), 100.0)), nn.Parameter(torch.full((4,), 1e-4))
    lamb = Lamb([big, small])
    assert lamb.get_lamb_coeffs() == []
    for p in (big, small):
        p.grad = torch.ones(4)
    lamb.step()
    assert lamb.get_lamb_coeffs() == [10.0, 0.01]


def test_bad_input() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(KernelArgumentError, match="lr is -1"):
        AdamW([p], lr=-1)
    with pytest.raises(KernelArgumentError, match=r"betas are \(0.9, 1.0\)"):
        Lion([p], betas=(0.9, 1.0))
    with pytest.raises(KernelArgumentError, match=r"state_dtype is torch.float16; supported are float32 and bfloat16"):
        SGD([p], state_dtype=torch.float16)
    with pytest.raises(KernelArgumentError, match="nesterov with momentum 0"):
        SGD([p], nesterov=True)
    with pytest.raises(KernelArgumentError, match="min_coeff is 2"):
        Lamb([p], min_coeff=2, max_coeff=1)
    with pytest.raises(KernelArgumentError, match=r"shape \(2,\) is no matrix"):
        Muon([p])
    with pytest.raises(KernelArgumentError, match="ns_method is 'svd'; supported are gram, classic"):
        Muon([nn.Parameter(torch.ones(2, 2))], ns_method="svd")
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(KernelArgumentError, match="sparse"):
        Adagrad(table.parameters()).step()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
@pytest.mark.parametrize("kind", [Adam, AdamW, Adagrad, Lion, SGD, Lamb, Muon])
def test_copies_and_pickles_go_on_alike(kind: type[FlatOptimizer], again: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 5).bfloat16())
    optimizer = kind([p], state_dtype=torch.bfloat16, stochastic_rounding=True, seed=3)
    p.grad = torch.randn(6, 5).bfloat16()
    optimizer.step()
    twin = again(optimizer)
    (q,) = twin.param_groups[0]["params"]
    q.grad = p.grad.clone()
    optimizer.step()
    twin.step()
    assert torch.equal(p, q)
    twin.add_param_group({"params": [nn.Parameter(torch.randn(3, 3))]})
