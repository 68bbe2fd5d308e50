"""The layer in one process: outputs and gradients by the dense formula; parameter groups; tokens of tensor-parallel
ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import expert_models
import pytest
import torch
from expert_models import WIDTH, Expert
from torch import Tensor, nn

import ds_comm
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE
from deepspeed.moe.mappings import drop_tokens, gather_tokens
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from deepspeed.moe.utils import (
    configure_moe_param_groups,
    has_moe_layers,
    is_moe_param,
    is_moe_param_group,
    split_params_grads_into_shared_and_expert_params,
    split_params_into_different_moe_groups_for_optimizer,
)
from deepspeed.utils import groups
from ds_comm.testing import run_ranks


def layer(**options: Any) -> MoE:
    return expert_models.make(flat=True, **options).block.moe


def dense(moe: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Every token through every expert, mixed by the gate's dense answer."""
    tokens = x.reshape(-1, WIDTH)
    aux, combine, _, _ = moe.deepspeed_moe.gate(tokens)
    outputs = torch.stack([expert(tokens) for expert in moe.deepspeed_moe.experts.deepspeed_experts], 1)
    out = torch.einsum("se,sem->sm", combine.sum(2), outputs).view(x.shape)
    if moe.use_residual:
        share = torch.softmax(moe.coefficient(x), -1)
        out = out * share[..., :1] + moe.mlp(x) * share[..., 1:]
    return out, aux


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize(
    "options", [{"k": 1}, {"k": 2, "use_residual": True}, {"k": 3, "noisy_gate_policy": "RSample"}]
)
def test_outputs_and_gradients(options: dict[str, Any], drop: bool) -> None:
    x = torch.randn(3, 7, WIDTH)
    found = []
    for function in (lambda moe, value: moe(value)[:2], dense):
        moe = layer(capacity_factor=0.7, drop_tokens=drop, **options)
        value = x.clone().requires_grad_()
        out, aux = function(moe, value)
        (out.square().sum() + aux).backward()
        grads = {name: parameter.grad for name, parameter in moe.named_parameters()}
        found.append((out.detach(), aux.detach(), value.grad, grads))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_capacities_noise_and_counts() -> None:
    moe = layer(k=1, capacity_factor=0.5, eval_capacity_factor=4.0, noisy_gate_policy="Jitter")
    x = torch.randn(16, WIDTH)
    torch.manual_seed(0)
    one, aux, counts = moe(x)
    assert int(counts.sum()) == 16 and counts.shape == (4,) and aux is moe.deepspeed_moe.l_aux
    assert (one.abs().sum(1) == 0).sum() == int((counts - 2).clamp_min(0).sum())
    assert not torch.equal(moe(x)[1], aux)  # the router's inputs are jittered anew
    moe.eval()
    assert (moe(x)[0].abs().sum(1) > 0).all() and torch.equal(moe(x)[1], moe(x)[1])
    moe.deepspeed_moe.gate.eval_capacity_factor = 0.0
    assert (moe(x)[0].abs().sum(1) > 0).sum() <= 4


def test_without_tokens_every_parameter_has_a_gradient() -> None:
    moe = layer(k=1)
    out, aux, counts = moe(torch.randn(2, 3, WIDTH), torch.zeros(2, 3))
    (out.sum() + aux).backward()
    assert out.abs().max() == 0 and counts.tolist() == [0] * 4
    assert all(parameter.grad is not None for parameter in moe.parameters())
    assert moe(torch.randn(0, WIDTH))[0].shape == (0, WIDTH)


def test_dtypes() -> None:
    x = torch.randn(5, WIDTH)
    moe = layer(k=2).bfloat16()
    out, aux, _ = moe(x.bfloat16())
    assert out.dtype is torch.bfloat16 and aux.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(k=2)
        torch.testing.assert_close(plain(x)[1], layer(k=2)(x)[1])
    torch.testing.assert_close(plain(x)[1], plain.deepspeed_moe.l_aux)


class WithBias(nn.Module):
    """As Megatron's layers: the output, and a bias that is another's to add."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        assert x.dim() == 4
        return 2 * x, None


class Uniform(nn.Module):
    """A gate of a script's own: token t to expert t % 2."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        combine = torch.zeros(len(x), 2, len(x))
        for t in range(len(x)):
            combine[t, t % 2, t // 2] = 0.5
        return x.new_zeros(()), combine, combine > 0, torch.tensor([0, 0])


def test_experts_and_gates_of_other_kinds() -> None:
    x = torch.randn(5, WIDTH)
    experts = Experts(WithBias(), 2, "ep_size_1")
    torch.testing.assert_close(MOELayer(Uniform(), experts, "ep_size_1", 1, 2)(x), x)
    torch.testing.assert_close(
        experts(x.view(1, 1, 5, WIDTH).repeat(1, 2, 1, 1)), 2 * x.repeat(1, 2, 1, 1).view(1, 2, 5, WIDTH)
    )
    gate = TopKGate(WIDTH, 2, drop_tokens=False)
    out = MOELayer(gate, experts, "ep_size_1", 1, 2)(x)
    torch.testing.assert_close(out, 2 * x * torch.softmax(gate.wg(x), 1).max(1, keepdim=True).values)


def test_names_and_marks_are_upstreams() -> None:
    moe = MoE(WIDTH, Expert(), num_experts=2, ep_size=2, use_residual=True)
    names = list(moe.state_dict())
    assert names[:2] == ["deepspeed_moe.gate.wg.weight", "deepspeed_moe.experts.deepspeed_experts.0.up.weight"]
    assert names[-2:] == ["coefficient.weight", "coefficient.bias"] and "mlp.down.weight" in names
    marked = {name for name, parameter in moe.named_parameters() if is_moe_param(parameter)}
    assert marked == {name for name in names if "deepspeed_experts" in name}
    assert {parameter.group_name for parameter in moe.parameters() if is_moe_param(parameter)} == {"ep_size_2"}
    assert has_moe_layers(nn.Sequential(moe)) == (True, 2) and has_moe_layers(nn.Linear(1, 1)) == (False, 0)
    first, second = moe.deepspeed_moe.experts.deepspeed_experts
    assert torch.equal(first.up.weight, second.up.weight) and first.up.weight is not second.up.weight


def sizes(param_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: len(value) if key == "params" else value for key, value in group.items()} for group in param_groups]


def test_parameter_groups() -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), MoE(WIDTH, Expert(), num_experts=4))
    dense_params, experts = 3, 12
    both = list(net.parameters())
    split = split_params_into_different_moe_groups_for_optimizer
    assert sizes(split({"params": both, "name": "all", "lr": 0.1})) == [
        {"params": dense_params, "name": "all", "lr": 0.1},
        {"params": experts, "name": "ep_size_1", "lr": 0.1, "moe": True},
    ]
    small = split([{"params": both, "name": "all"}], max_group_size=130)
    assert [len(group["params"]) for group in small] == [3, 3, 3, 3, 3]
    assert [is_moe_param_group(group) for group in small] == [False, True, True, True, True]
    assert sum(len(group["params"]) for group in split({"params": both, "name": "a"}, max_group_size=None)) == 15
    configured = configure_moe_param_groups(both)
    assert [group["name"] for group in configured] == ["dense-params", "ep_size_1"]
    assert configure_moe_param_groups(configured) == configured
    with pytest.raises(ValueError, match=r"no 'name', only \['params'\]"):
        configure_moe_param_groups([{"params": both}])
    net(torch.ones(2, WIDTH))[0].sum().backward()
    shared, others = split_params_grads_into_shared_and_expert_params(both)
    assert (len(shared), len(others)) == (3, 12)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match=r"num_experts 3 is not a multiple of ep_size 2"):
        MoE(WIDTH, Expert(), num_experts=3, ep_size=2)
    with pytest.raises(ValueError, match=r"noisy_gate_policy is 'x'"):
        MoE(WIDTH, Expert(), noisy_gate_policy="x")
    with pytest.raises(ValueError, match=r"k is 2; expected 1 to 1"):
        MoE(WIDTH, Expert(), k=2)


def share_tokens() -> tuple[Tensor, Tensor, Tensor | None, str]:
    group, rank = ds_comm.get_world_group(), ds_comm.get_rank()
    groups.mpu = SimpleNamespace(
        get_tensor_model_parallel_group=lambda: group,
        get_tensor_model_parallel_world_size=lambda: 2,
        get_tensor_model_parallel_rank=lambda: rank,
    )
    try:
        x = torch.arange(8.0).view(2, 4).requires_grad_()
        part = drop_tokens(x, dim=1)
        whole = gather_tokens(part * part, dim=1)
        (whole * torch.arange(8.0).view(2, 4)).sum().backward()
        try:
            drop_tokens(torch.ones(3, 1))
            error = ""
        except ValueError as raised:
            error = str(raised)
    finally:
        groups.mpu = None
    return part.detach(), whole.detach(), x.grad, error


def test_tokens_of_tensor_parallel_ranks() -> None:
    x = torch.arange(8.0).view(2, 4)
    assert drop_tokens(x) is x and gather_tokens(x) is x
    for rank, (part, whole, grad, error) in enumerate(run_ranks(share_tokens, 2)):
        assert torch.equal(part, x.chunk(2, 1)[rank]) and torch.equal(whole, x * x)
        assert grad is not None and torch.equal(grad, 2 * x * x)
        assert "3 tokens, which 2 tensor-parallel ranks cannot share" in error
