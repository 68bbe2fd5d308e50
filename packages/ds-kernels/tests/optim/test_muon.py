"""Newton-Schulz against its formula in fp64; Muon against the published algorithm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_kernels import KernelArgumentError
from ds_kernels.optim import Muon, newton_schulz


def classic(matrix: Tensor, steps: int = 5) -> Tensor:
    """As published, in fp64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.double()
    if matrix.size(-2) > matrix.size(-1):
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.size(-2) > matrix.size(-1) else x


SHAPES = [(1, 1), (1, 9), (16, 16), (16, 24), (33, 100), (100, 33), (3, 8, 40), (3, 40, 8)]


@pytest.mark.parametrize("method", ["gram", "classic"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_is_the_formula(shape: tuple[int, ...], method: str) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    torch.testing.assert_close(newton_schulz(matrix, method=method).double(), classic(matrix), rtol=0, atol=5e-5)
    wide = matrix.double()
    torch.testing.assert_close(newton_schulz(wide, method=method), classic(wide), rtol=0, atol=1e-11)
    coarse = newton_schulz(matrix, method=method, dtype=torch.bfloat16)
    torch.testing.assert_close(coarse.double(), classic(matrix), rtol=0, atol=0.05)


@pytest.mark.parametrize("method", ["gram", "classic"])
def test_singular_values_come_out_near_one(method: str) -> None:
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(32, 80, dtype=torch.float64), full_matrices=False)
    spectrum = torch.logspace(-2, 0, 32, dtype=torch.float64)
    singular = torch.linalg.svdvals(newton_schulz((u * spectrum @ v).float(), method=method).double())
    assert float(singular.min()) > 0.3 and float(singular.max()) < 1.3


def test_rank_deficient_matrices_stay_finite() -> None:
    matrix = torch.outer(torch.randn(40), torch.randn(100)) * 1e-3
    for method in ("gram", "classic"):
        result = newton_schulz(matrix, method=method)
        torch.testing.assert_close(result.double(), classic(matrix), rtol=0, atol=1e-2)
        assert not newton_schulz(torch.zeros(4, 9), method=method).any()


def published(p: Tensor, grads: list[Tensor], lr: float, decay: float, nesterov: bool) -> Tensor:
    """MomentumBuffer, Newton-Schulz and update as in the reference implementation's text, in fp64."""
    p, momentum = p.double(), torch.zeros_like(p, dtype=torch.float64)
    for grad in grads:
        momentum = 0.95 * momentum + 0.05 * grad.double()
        update = 0.05 * grad.double() + 0.95 * momentum if nesterov else momentum
        matrix = update.flatten(1) if update.dim() > 3 else update
        direction = classic(matrix) * max(1, matrix.size(-2) / matrix.size(-1)) ** 0.5
        p = p * (1 - lr * decay) - lr * direction.view_as(p)
    return p


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (8, 3, 2, 2), (2, 6, 10)], ids=str)
def test_muon_is_the_published_algorithm(shape: tuple[int, ...], nesterov: bool) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    grads = [torch.randn(shape) for _ in range(3)]
    expected = published(p.detach(), grads, 0.1, 0.2, nesterov)
    muon = Muon([p], lr=0.1, weight_decay=0.2, nesterov=nesterov)
    for grad in grads:
        p.grad = grad.clone()
        muon.step()
        assert torch.equal(p.grad, grad)
    torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=1e-4)


def test_groups_choose_the_rule() -> None:
    matrix, bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))
    muon = Muon([{"params": [matrix], "lr": 0.5}, {"params": [bias], "use_muon": False}], adam_lr=0.25)
    assert muon.param_groups[0]["lr"] == 0.5 and muon.param_groups[0]["momentum"] == 0.95
    assert muon.param_groups[1]["lr"] == 0.25 and muon.param_groups[1]["betas"] == (0.9, 0.95)
    matrix.grad, bias.grad = torch.randn(4, 6), torch.ones(6)
    before = bias.detach().clone()
    muon.step()
    assert set(muon.state[matrix]) == {"step", "momentum_buffer"}
    assert set(muon.state[bias]) == {"step", "exp_avg", "exp_avg_sq"}
    torch.testing.assert_close(bias.detach(), before - 0.25)


def test_bad_input() -> None:
    with pytest.raises(KernelArgumentError, match=r"shape \(3,\)"):
        newton_schulz(torch.ones(3))
    arguments: dict[str, Any] = {"method": "fast"}
    with pytest.raises(KernelArgumentError, match="'fast'; supported are gram, classic"):
        newton_schulz(torch.ones(3, 3), **arguments)
