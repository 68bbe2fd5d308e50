"""swiglu and geglu against their formulas in fp64: forward, both gradients, awkward shapes, compile, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import DTYPES, check_against
from torch import Tensor

from ds_kernels import KernelArgumentError, geglu, swiglu


def geglu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return geglu(gate, up, "tanh")


OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "swiglu": (swiglu, lambda gate, up: F.silu(gate) * up),
    "geglu": (geglu, lambda gate, up: F.gelu(gate) * up),
    "geglu_tanh": (geglu_tanh, lambda gate, up: F.gelu(gate, approximate="tanh") * up),
}
every_op = pytest.mark.parametrize(("op", "specification"), OPS.values(), ids=OPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 33), (1, 1), (3, 1025), (5,)], ids=str)
@every_op
def test_forward_and_gradients(backend: str, op: Any, specification: Any, shape: Any, dtype: torch.dtype) -> None:
    gate, up = (3 * torch.randn(shape)).to(dtype).requires_grad_(), torch.randn(shape).to(dtype).requires_grad_()
    check_against(op, specification, gate, up)


@every_op
def test_whole_range_of_the_gate(backend: str, op: Any, specification: Any) -> None:
    gate = torch.linspace(-12, 12, 4001).requires_grad_()
    check_against(op, specification, gate, torch.ones(4001, requires_grad=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_op
def test_extreme_values(backend: str, op: Any, specification: Any, dtype: torch.dtype) -> None:
    """Neither overflow nor a residue where the gate is shut: 0 for large negative gates, the gate for positive ones."""
    far = torch.tensor([200.0, 3e4, 0.0] if dtype == torch.float16 else [200.0, 1e13, 1e30, 0.0])
    gate = torch.cat([far, -far]).to(dtype).requires_grad_()
    y = op(gate, torch.ones_like(gate))
    y.sum().backward()
    assert torch.equal(y, gate.clamp(min=0))
    assert gate.grad is not None
    assert torch.equal(gate.grad, torch.where(gate == 0, 0.5, (gate > 0).to(dtype)).to(dtype))


def test_not_a_number_stays_where_it_is(backend: str) -> None:
    gate = torch.randn(40)
    gate[3] = float("nan")
    for op, _ in OPS.values():
        assert torch.equal(op(gate, torch.ones(40)).isnan(), gate.isnan())


@every_op
def test_non_contiguous(backend: str, op: Any, specification: Any) -> None:
    both = torch.randn(6, 2, 40)
    gate, up = (part.t().detach().requires_grad_() for part in both.unbind(1))
    check_against(op, specification, gate, up)


def test_no_elements(backend: str) -> None:
    gate = torch.randn(0, 8, requires_grad=True)
    y = swiglu(gate, torch.randn(0, 8))
    y.sum().backward()
    assert y.shape == (0, 8) and gate.grad is not None


def test_double_precision(backend: str) -> None:
    gate, up = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for op, _ in OPS.values():
        assert torch.autograd.gradcheck(op, (gate, up))


@every_op
def test_compiles_without_graph_break(backend: str, op: Any, specification: Any) -> None:
    gate, up = torch.randn(4, 32, requires_grad=True), torch.randn(4, 32, requires_grad=True)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(op(gate, up).sin().sum(), [gate, up])
    got = torch.autograd.grad(compiled(gate, up).sin().sum(), [gate, up])
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


def test_bad_input() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(KernelArgumentError, match=r"swiglu: up is \(4, 7\) of torch.float32; expected \(4, 8\)"):
        swiglu(x, torch.randn(4, 7))
    with pytest.raises(KernelArgumentError, match=r"up is .* of torch.bfloat16; expected .* torch.float32"):
        swiglu(x, x.bfloat16())
    with pytest.raises(KernelArgumentError, match=r"gate is of dtype torch.int64; supported are float32"):
        swiglu(torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
    with pytest.raises(KernelArgumentError, match="geglu: approximate is 'sigmoid'; supported are 'none'"):
        geglu(x, x, "sigmoid")
    with pytest.raises(KernelArgumentError, match="up is on meta"):
        swiglu(x, x.to("meta"))
