"""I and W give the bits, and the layouts, of one whole backward."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pipe_models import WIDTH, Columns, Still, Thrice
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ds_pipe._split import Record, SplitBackward


def data(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(3))


def listed(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def starts(outputs: list[Tensor]) -> list[Tensor | None]:
    return [output.detach() * 0.1 + 0.37 for output in outputs]


def whole(module: nn.Module, inputs: Tensor, rounds: int = 2) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The inputs' gradients per round as they leave the graph, and the accumulated gradients."""
    found: list[Tensor | None] = []
    for _ in range(rounds):
        given = inputs.detach().requires_grad_(inputs.requires_grad)
        outputs = listed(module(given))
        if given.requires_grad:
            found += torch.autograd.grad(outputs, [given], starts(outputs), retain_graph=True)  # type: ignore[arg-type]
        parameters = [p for p in module.parameters() if p.requires_grad]
        if parameters:
            torch.autograd.backward(outputs, starts(outputs), inputs=parameters)  # type: ignore[arg-type]
    return found, take(module)


def halves(
    module: nn.Module, inputs: Tensor, rounds: int = 2, **options: Any
) -> tuple[list[Tensor | None], list[Tensor | None], Record]:
    """The same by all I first, then all W."""
    split = SplitBackward([p for p in module.parameters() if p.requires_grad], **options)
    found: list[Tensor | None] = []
    records = [Record() for _ in range(rounds)]
    deferred = Record()
    for record in records:
        given = inputs.detach().requires_grad_(inputs.requires_grad)
        with split.watching(record):
            outputs = listed(module(given))
        found += split.input_gradients(record, outputs, starts(outputs), [given] if given.requires_grad else [])
    assert all(p.grad is None for p in module.parameters())
    deferred.deferred, deferred.rest = list(records[0].deferred), dict(records[0].rest)
    for record in records:
        split.accumulate(record)
        assert not record.deferred and not record.rest
    return found, take(module), deferred


def take(module: nn.Module) -> list[Tensor | None]:
    found = [p.grad for p in module.parameters()]
    module.zero_grad(set_to_none=True)
    return found


def check(module: nn.Module, inputs: Tensor, num_deferred: int) -> None:
    """`num_deferred` parameters wait for W."""
    expected = whole(module, inputs)
    found = halves(module, inputs)
    for mine, theirs in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert torch.equal(mine, theirs) and mine.stride() == theirs.stride() and mine.dtype == theirs.dtype
    assert sum(len(parameters) for _, parameters in found[2].deferred) == num_deferred


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (1, 1, 48), (3, 5, 48), (2, 3, 5, 48)])
def test_linear(shape: tuple[int, ...], with_gradient: bool, bias: bool, dtype: torch.dtype) -> None:
    module = nn.Linear(48, 33, bias=bias).to(dtype)
    check(module, data(*shape, dtype=dtype).requires_grad_(with_gradient), 1 + bias)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_of_inputs_in_another_order(bias: bool) -> None:
    check(nn.Linear(48, 33, bias=bias), data(5, 3, 48).transpose(0, 1).requires_grad_(), 1 + bias)
    check(nn.Linear(48, 33, bias=bias), data(48, 9).t().requires_grad_(), 1 + bias)
    check(nn.Linear(48, 33, bias=bias), data(48).requires_grad_(), 0)


def test_weights_in_another_order() -> None:
    linear, columns = nn.Linear(48, 33), Columns(48, 33)
    linear.weight = nn.Parameter(data(48, 33).t())
    columns.weight = nn.Parameter(data(33, 48).t())
    check(linear, data(4, 6, 48).requires_grad_(), 2)
    check(columns, data(4, 6, 48).requires_grad_(), 2)


class Calls(nn.Module):
    """A weight and a bias, and a function of (inputs, weight, bias)."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(data(WIDTH, WIDTH)), nn.Parameter(data(WIDTH))
        self.function = function

    def forward(self, inputs: Tensor) -> Any:
        return self.function(inputs, self.weight, self.bias)


class Unseen(torch.autograd.Function):
    """Takes a weight where no torch call shows it."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return inputs * weight.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        inputs, weight = ctx.saved_tensors
        return gradients[0] * weight.sum(), (gradients[0] * inputs).sum() * torch.ones_like(weight)


def halved(hidden: Tensor) -> Tensor:
    hidden[:, 1:].mul_(0.5)
    return hidden


CALLS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], int]] = {
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), 2),
    "addmm of a tensor": (lambda x, w, b: b.addmm(x, w), 2),
    "addmm scaled": (lambda x, w, b: torch.addmm(b, x, w, beta=0.5), 0),
    "matmul": (lambda x, w, b: torch.matmul(x, w) + b, 1),
    "at": (lambda x, w, b: x @ w, 1),
    "mm": (lambda x, w, b: torch.mm(x, w), 1),
    "keyword": (lambda x, w, b: F.linear(x, w, bias=b), 2),
    "keywords only": (lambda x, w, b: F.linear(input=x, weight=w, bias=b), 0),
    "from the left": (lambda x, w, b: w @ x.t(), 0),
    "twice": (lambda x, w, b: F.linear(F.linear(x, w, b).tanh(), w), 1),
    "twice, once by a view": (lambda x, w, b: F.linear(x, w, b) @ w.T, 1),
    "weight and input": (lambda x, w, b: F.linear(w, w, b) + x.sum(), 1),
    "bias twice": (lambda x, w, b: F.linear(x, w, b) * b, 1),
    "bias of its own": (lambda x, w, b: F.linear(x, w, b * 2), 1),
    "shape and dtype read": (lambda x, w, b: F.linear(x.to(w.dtype).view(-1, w.shape[1]), w, b.data), 1),
    "several outputs": (lambda x, w, b: ((y := F.linear(x, w, b)), y.tanh(), y * 2), 2),
    "in a list": (lambda x, w, b: torch.cat([w, F.linear(x, w)]), 0),
    "unused": (lambda x, w, b: x * 2, 0),
    "normalised": (lambda x, w, b: F.layer_norm(F.linear(x, w), (WIDTH,), b), 1),
    "output in place": (lambda x, w, b: F.linear(x, w, b).relu_() * 3, 2),
    "output in place, 3-D": (lambda x, w, b: F.linear(x.view(2, -1, WIDTH), w, b).relu_() * 3, 2),
    "output in place, no bias": (lambda x, w, b: (x.view(2, -1, WIDTH) @ w).mul_(b) * 3, 1),
    "part of the output in place": (lambda x, w, b: halved(F.linear(x.view(2, -1, WIDTH), w, b)), 2),
    "unseen": (lambda x, w, b: F.linear(x, w, b) + Unseen.apply(x, w), 1),
    "output unused": (lambda x, w, b: (F.linear(x, w), x * 2)[1], 0),
    "reshaped": (lambda x, w, b: F.linear(x[:, None], w, b).view(-1)[3:], 2),
    "detached": (lambda x, w, b: F.linear(x, w.detach()) + F.linear(x, w, b), 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    function, num_deferred = CALLS[name]
    check(Calls(function), data(WIDTH, WIDTH).requires_grad_(), num_deferred)


def test_layers() -> None:
    norms = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.RMSNorm(WIDTH))
    check(norms, data(2, 5, WIDTH).requires_grad_(), 2)
    check(nn.Sequential(Still(), nn.Linear(WIDTH, 3)), data(2, 5, WIDTH).requires_grad_(), 2)
    check(Still(), data(2, 5, WIDTH).requires_grad_(), 0)
    check(Thrice(), data(2, 5, WIDTH).requires_grad_(), 1)
    check(nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True), data(2, 5, WIDTH).requires_grad_(), 4)
    check(nn.Sequential(nn.Conv1d(5, 3, 2), nn.Linear(WIDTH - 1, 2)), data(2, 5, WIDTH).requires_grad_(), 2)


def test_embedding_and_no_gradient_for_inputs() -> None:
    check(nn.Sequential(nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH)), torch.arange(8).view(2, 4), 2)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, inputs: Tensor) -> Any:
        def part(hidden: Tensor) -> Tensor:
            hidden = F.dropout(self.second(self.first(hidden).relu()), 0.3)
            return self.norm(hidden + self.second(self.first(hidden)))

        torch.manual_seed(11)
        return checkpoint(part, self.norm(inputs), use_reentrant=False)


def test_checkpointing() -> None:
    module = Checkpointed()
    check(module, data(2, 5, WIDTH).requires_grad_(), 0)
    one = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))
    check(
        Calls(lambda x, w, b: checkpoint(lambda h: F.linear(h.tanh(), w, b), x, use_reentrant=False)), data(4, WIDTH), 2
    )

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = one

        def forward(self, inputs: Tensor) -> Any:
            return checkpoint(self.inner, inputs, use_reentrant=False)

    check(Inside(), data(2, 5, WIDTH).requires_grad_(), 4)


def test_autocast_is_left_to_autograd() -> None:
    class Cast(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(input)

    check(Cast(WIDTH, WIDTH), data(4, WIDTH).requires_grad_(), 0)


def test_hooks_run_once_and_see_the_sum() -> None:
    module = nn.Linear(WIDTH, WIDTH)
    seen: list[str] = []
    module.weight.register_hook(lambda grad: (seen.append("tensor"), grad * 2)[1])
    module.weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    _, (weight, _), _ = halves(module, data(4, WIDTH), rounds=1)
    assert seen == ["tensor", "accumulated"]
    _, (expected, _) = whole(module, data(4, WIDTH), rounds=1)
    assert weight is not None and expected is not None and torch.equal(weight, expected)


def test_an_input_modified_in_place_is_an_error() -> None:
    def spoil(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        hidden = x * 2
        return F.linear(hidden, w, b) + hidden.mul_(2)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        whole(Calls(spoil), data(4, WIDTH))
    with pytest.raises(RuntimeError, match=r"modified (by an inplace operation|in place)"):
        halves(Calls(spoil), data(4, WIDTH))


def test_nothing_deferred_where_told() -> None:
    module = nn.Linear(WIDTH, WIDTH)
    assert not halves(module, data(4, WIDTH), at_once=list(module.parameters()))[2].deferred
    assert not halves(module, data(4, WIDTH), defers=False)[2].deferred


def test_gradients_are_not_copied_and_nothing_outlives_w() -> None:
    module = nn.Linear(WIDTH, WIDTH)
    split, record = SplitBackward(list(module.parameters())), Record()
    inputs = data(4, WIDTH)
    kept = weakref.ref(inputs)
    with split.watching(record):
        outputs = [module(inputs)]
    split.input_gradients(record, outputs, [torch.ones(4, WIDTH)], [])
    made: list[int] = []
    ((make, parameters),) = record.deferred

    def noting(make: Any = make) -> Any:
        found = make()
        made.extend(gradient.data_ptr() for gradient in found if gradient is not None)
        return found

    record.deferred = [(noting, parameters)]
    split.accumulate(record)
    assert [p.grad.data_ptr() for p in module.parameters() if p.grad is not None] == made
    del inputs, outputs, make, noting
    gc.collect()
    assert kept() is None
