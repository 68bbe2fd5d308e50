"""Modules against torch's own or the formula with the same parameters, forward and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_kernels import KernelArgumentError
from ds_kernels.nn import (
    CrossEntropyLoss,
    GatedMLP,
    LayerNorm,
    LinearCrossEntropyLoss,
    RMSNorm,
    RotaryEmbedding,
    SparseMLP,
)

pytestmark = pytest.mark.cpu_extra


def check(module: nn.Module, formula: Callable[..., Tensor], *inputs: Any) -> None:
    """The module's output and gradients, of its inputs and parameters, equal the formula's autograd."""
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.is_floating_point()] + list(module.parameters())
    for leaf in leaves:
        leaf.requires_grad_()
    actual, expected = module(*inputs), formula(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    pull = torch.randn_like(expected)
    got = torch.autograd.grad(actual, leaves, pull)
    wanted = torch.autograd.grad(expected, leaves, pull)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_norms() -> None:
    rms, gemma, norm = RMSNorm(24), RMSNorm(24, 1e-5, offset=1.0), LayerNorm(24, bias=False)
    x = torch.randn(5, 24)
    check(rms, lambda x: F.rms_norm(x, (24,), rms.weight, 1e-6), x)
    check(gemma, lambda x: F.rms_norm(x, (24,), 1 + gemma.weight, 1e-5), x)
    check(norm, lambda x: F.layer_norm(x, (24,), norm.weight, None, 1e-5), x)
    assert sorted(LayerNorm(8).state_dict()) == ["bias", "weight"]
    for module in (rms, norm):
        y, total = module(x, residual=2 * x)
        torch.testing.assert_close(total, 3 * x)
        torch.testing.assert_close(y, module(3 * x))


@pytest.mark.parametrize(
    ("activation", "function"),
    [("silu", F.silu), ("gelu", F.gelu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))],
)
def test_gated_mlp(activation: str, function: Callable[[Tensor], Tensor]) -> None:
    mlp = GatedMLP(16, 40, activation, bias=True)
    check(mlp, lambda x: mlp.down_proj(function(mlp.gate_proj(x)) * mlp.up_proj(x)), torch.randn(2, 3, 16))


def mixture(mlp: SparseMLP, x: Tensor) -> Tensor:
    """Every expert on every token, weighted by what the gate keeps."""
    tokens = x.flatten(0, -2)
    probs = torch.softmax(mlp.gate(tokens), -1)
    best = probs.topk(mlp.top_k)
    weights = torch.zeros_like(probs).scatter(1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    gate, up = torch.einsum("td,eod->teo", tokens, mlp.gate_up_proj).chunk(2, -1)
    y = torch.einsum("teo,edo->ted", F.silu(gate) * up, mlp.down_proj)
    return torch.einsum("te,ted->td", weights, y).view(x.shape)


def test_sparse_mlp() -> None:
    mlp = SparseMLP(16, 24, 5, top_k=2)
    check(mlp, lambda x: mixture(mlp, x), torch.randn(2, 15, 16))
    assert mlp.routing is not None and mlp.routing.aux_loss.requires_grad
    assert sorted(mlp.state_dict()) == ["down_proj", "gate.weight", "gate_up_proj"]


def test_sparse_mlp_drops_beyond_capacity() -> None:
    mlp = SparseMLP(16, 24, 4, top_k=1, capacity_factor=0.5, min_capacity=1)
    y = mlp(torch.randn(16, 16))
    assert mlp.routing is not None
    dropped = (mlp.routing.slots < 0).flatten()
    assert dropped.any() and not y[dropped].any() and y[~dropped].any(-1).all()
    assert int(mlp.routing.ends.diff(prepend=torch.zeros(1, dtype=torch.int32)).max()) <= 2


def test_sparse_mlp_jitter_follows_its_generator_and_ends_with_training() -> None:
    mlp = SparseMLP(16, 24, 4, top_k=2, jitter=0.5, generator=torch.Generator())
    x = torch.randn(64, 16)
    found = []
    for seed in (3, 3, 4):
        assert mlp.generator is not None
        mlp.generator.manual_seed(seed)
        found.append(mlp(x))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    mlp.eval()
    assert torch.equal(mlp(x), mlp(x))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding(interleaved: bool) -> None:
    rotary = RotaryEmbedding(8, 32, base=100.0, interleaved=interleaved)
    q, k = torch.randn(2, 3, 7, 8), torch.randn(2, 1, 7, 8)
    rotated_q, rotated_k = rotary(q, k)
    angles = torch.arange(7.0).unsqueeze(1) * 100.0 ** (-torch.arange(4.0) / 4)
    turn = torch.polar(torch.ones_like(angles), angles)
    for x, rotated in ((q, rotated_q), (k, rotated_k)):
        pairs = x.unflatten(-1, (4, 2)) if interleaved else torch.stack(x.chunk(2, -1), -1)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        expected = turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1)
        torch.testing.assert_close(rotated, expected)
    with pytest.raises(KernelArgumentError, match="33 tokens; expected at most max_positions, 32"):
        rotary(torch.randn(1, 1, 33, 8), torch.randn(1, 1, 33, 8))


def test_losses() -> None:
    x, weight, target = torch.randn(6, 12), torch.randn(20, 12), torch.tensor([3, 0, -100, 19, 7, 7])
    options = {"label_smoothing": 0.1}
    logits = torch.randn(6, 20)
    check(CrossEntropyLoss(**options), lambda x, target: F.cross_entropy(x, target, **options), logits, target)
    check(
        LinearCrossEntropyLoss(reduction="sum"),
        lambda x, target, weight: F.cross_entropy(x @ weight.t(), target, reduction="sum"),
        x,
        target,
        weight,
    )


def test_bad_input() -> None:
    with pytest.raises(KernelArgumentError, match="activation is 'relu'; supported are silu, gelu, gelu_tanh"):
        GatedMLP(4, 4, "relu")
    with pytest.raises(KernelArgumentError, match="top_k is 3; expected 1 to 2"):
        SparseMLP(4, 4, 2, top_k=3)
    with pytest.raises(KernelArgumentError, match=r"jitter is 1\.5"):
        SparseMLP(4, 4, 2, jitter=1.5)
    with pytest.raises(KernelArgumentError, match="dim is 7; expected an even number"):
        RotaryEmbedding(7)
