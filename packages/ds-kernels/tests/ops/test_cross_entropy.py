"""cross_entropy against its formula in fp64: options, awkward rows, torch.compile, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import DTYPES, check_against
from torch import Tensor
from torch.nn import functional

from ds_kernels import KernelArgumentError, cross_entropy

OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.2, "z_loss": 1e-3, "ignore_index": 2},
]


def formula(logits: Tensor, target: Tensor, *, z_loss: float = 0.0, reduction: str = "mean", **options: Any) -> Tensor:
    """torch's cross entropy and the z-loss."""
    ignored = target == options.get("ignore_index", -100)
    loss = functional.cross_entropy(logits, target, reduction="none", **options)
    loss = loss + z_loss * torch.where(ignored, 0.0, torch.logsumexp(logits, -1).square())
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (~ignored).sum()


def check(logits: Tensor, target: Tensor, options: dict[str, Any], **tolerances: Any) -> None:
    def op(values: Tensor) -> Tensor:
        return cross_entropy(values, target, **options)

    def specification(values: Tensor) -> Tensor:
        return formula(values, target, **options)

    check_against(op, specification, logits, **tolerances)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows_classes", [(5, 33), (1, 7), (3, 5003), (64, 1), (9, 1024)], ids=str)
def test_forward_and_gradient(backend: str, rows_classes: tuple[int, int], dtype: torch.dtype) -> None:
    rows, classes = rows_classes
    logits = (torch.randn(rows, classes) * 3).to(dtype).requires_grad_()
    check(logits, torch.randint(0, classes, (rows,)), {"reduction": "none"}, magnitude=8.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(backend: str, options: dict[str, Any], reduction: str) -> None:
    target = torch.randint(0, 70, (11,))
    target[::4] = options.get("ignore_index", -100)
    check(torch.randn(11, 70, requires_grad=True), target, {**options, "reduction": reduction}, magnitude=64.0)


def test_ignored_rows_take_no_part(backend: str) -> None:
    logits = torch.randn(4, 50)
    logits[1] = torch.nan
    logits[3] = torch.inf
    target = torch.tensor([1, -100, 49, -100])
    kept = [0, 2]
    loss = cross_entropy(logits.requires_grad_(), target)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, functional.cross_entropy(logits[kept], target[kept]))
    assert not grad[[1, 3]].any() and grad[kept].isfinite().all()


def test_all_rows_ignored_or_none_at_all(backend: str) -> None:
    for logits in (torch.randn(3, 8, requires_grad=True), torch.randn(0, 8, requires_grad=True)):
        target = torch.full(logits.shape[:1], -100)
        loss = cross_entropy(logits, target)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isnan() and not grad.any()
        assert cross_entropy(logits, target, reduction="sum") == 0.0


def test_leading_dimensions_and_strides(backend: str) -> None:
    logits = torch.randn(20, 3, 2, requires_grad=True)
    target = torch.randint(0, 20, (2, 3)).t()
    loss = cross_entropy(logits.permute(1, 2, 0), target, reduction="none")
    expected = functional.cross_entropy(logits.permute(1, 0, 2), target, reduction="none")
    torch.testing.assert_close(loss, expected)


def test_extreme_logits(backend: str) -> None:
    logits = torch.randn(4, 100) * 1e4
    logits[0, 10:] = -torch.inf  # classes that cannot be
    logits[1] = 0.0
    logits[1, 3] = 1e30
    logits[2] -= 1e9
    check(logits.requires_grad_(), torch.tensor([0, 5, 99, 7]), {"reduction": "none"})


def test_a_long_run_of_impossible_classes(backend: str) -> None:
    """Whole blocks of -inf, at the beginning and between."""
    logits = torch.full((2, 9000), -torch.inf)
    logits[:, 4500:4520] = torch.randn(2, 20)
    check(logits.requires_grad_(), torch.tensor([4501, 4519]), {"reduction": "none"})


def test_not_a_number_stays_in_its_row(backend: str) -> None:
    logits = torch.randn(4, 2000)
    logits[1, 1500] = torch.nan
    logits[2] = torch.nan
    logits[3, 7] = torch.inf
    loss = cross_entropy(logits, torch.tensor([0, 1, 2, 3]), reduction="none")
    assert loss.isnan().tolist() == [False, True, True, True]


def test_the_loss_of_16_bit_logits_is_fp32(backend: str) -> None:
    logits = torch.randn(4, 9, dtype=torch.bfloat16, requires_grad=True)
    loss = cross_entropy(logits, torch.arange(4))
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, logits)[0].dtype == torch.bfloat16


def test_fp64_is_computed_in_fp64(backend: str) -> None:
    logits = torch.randn(6, 30, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 30, (6,))
    assert torch.autograd.gradcheck(lambda values: cross_entropy(values, target, z_loss=0.1), logits)


def test_threads_do_not_change_bits() -> None:
    logits = torch.randn(37, 3001, requires_grad=True)
    target = torch.randint(0, 3001, (37,))
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            loss = cross_entropy(logits, target)
            found.append((loss, *torch.autograd.grad(loss, logits)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_compiles_without_graph_break(backend: str) -> None:
    logits, target = torch.randn(5, 40, requires_grad=True), torch.tensor([1, 2, -100, 4, 39])

    def run(values: Tensor) -> Tensor:
        return cross_entropy(values * 2, target, label_smoothing=0.1)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, got = (torch.autograd.grad(function(logits), logits)[0] for function in (run, compiled))
    assert torch.equal(got, expected)


def test_bad_input() -> None:
    logits, target = torch.randn(4, 8), torch.tensor([0, 1, 2, 7])
    for bad, message in (
        (target.int(), r"target is of dtype torch.int32; supported are int64"),
        (target[:3], r"target has shape \(3,\); expected \(4,\)"),
        (target + 1, "target holds 8; expected 0 to 7 or ignore_index"),
        (target - 1, "target holds -1"),
        (target.to("meta"), "target is on meta"),
    ):
        with pytest.raises(KernelArgumentError, match=message):
            cross_entropy(logits, bad)
    with pytest.raises(KernelArgumentError, match=r"logits is of dtype torch\.int64"):
        cross_entropy(logits.long(), target)
    with pytest.raises(KernelArgumentError, match=r"label_smoothing is 1\.0; expected 0 <= it < 1"):
        cross_entropy(logits, target, label_smoothing=1.0)
    with pytest.raises(KernelArgumentError, match=r"z_loss is -1\.0"):
        cross_entropy(logits, target, z_loss=-1.0)
    with pytest.raises(KernelArgumentError, match="reduction is 'average'; expected one of mean, sum, none"):
        cross_entropy(logits, target, reduction="average")
    with pytest.raises(KernelArgumentError, match="at least one class"):
        cross_entropy(torch.randn(4, 0), target)
