"""Single steps against the formulas in fp64: dtypes, rounding, pieces, threads, bad input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_kernels import KernelArgumentError
from ds_kernels.optim import (
    adagrad_step,
    adam_step,
    lamb_apply,
    lamb_moments,
    lamb_ratio,
    lamb_step,
    lion_step,
    seed_at,
    sgd_step,
)

Step = Callable[..., Any]
CASES: dict[str, tuple[Step, int, dict[str, Any]]] = {
    "adamw": (adam_step, 2, {"step": 7, "lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "adam": (adam_step, 2, {"step": 3, "lr": 0.03, "weight_decay": 0.1, "decoupled": False, "maximize": True}),
    "uncorrected": (adam_step, 2, {"step": 3, "lr": 0.03, "bias_correction": False}),
    "amsgrad": (adam_step, 3, {"step": 5, "lr": 0.03}),
    "adagrad": (adagrad_step, 1, {"lr": 0.1, "weight_decay": 0.1}),
    "lion": (lion_step, 1, {"lr": 0.03, "weight_decay": 0.1}),
    "sgd": (sgd_step, 0, {"lr": 0.1, "weight_decay": 0.1}),
    "momentum": (sgd_step, 1, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "nesterov": (sgd_step, 1, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "first": (sgd_step, 1, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "first": True}),
    "lamb": (lamb_step, 2, {"step": 4, "lr": 0.1, "weight_decay": 0.1}),
    "lamb_inside": (lamb_step, 2, {"step": 4, "lr": 0.1, "eps_inside_sqrt": True, "eps": 1e-3, "max_coeff": 1.5}),
}
SIZES = [1, 37, 1024, 70_011]


def inputs(name: str, numel: int, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> list[Tensor]:
    """Parameter, gradient and states (squares where they are squares)."""
    _, states, _ = CASES[name]
    made = [torch.randn(numel).to(param), torch.randn(numel).to(grad)]
    made += [torch.randn(numel).to(state) for _ in range(states)]
    squares = made[3:] if states > 1 else made[2:] if name == "adagrad" else []
    for square in squares:
        square.abs_()
    return made


def call(name: str, tensors: list[Tensor], **more: Any) -> None:
    step, _, numbers = CASES[name]
    if name == "amsgrad":
        more["max_exp_avg_sq"], tensors = tensors[4], tensors[:4]
    step(*tensors, **numbers, **more)


def formula(name: str, tensors: list[Tensor]) -> list[Tensor]:
    """The same in fp64, written out once more."""
    p, g, *states = [tensor.double().clone() for tensor in tensors]
    n = CASES[name][2]
    lr, decay = n["lr"], n.get("weight_decay", 0.0)
    if name in ("adamw", "adam", "uncorrected", "amsgrad") or name.startswith("lamb"):
        b1, b2 = n.get("betas", (0.9, 0.999))
        t, eps = n["step"], n.get("eps", 1e-8)
        g = -g if n.get("maximize") else g
        if not n.get("decoupled", True):
            g = g + decay * p
        m, v = b1 * states[0] + (1 - b1) * g, b2 * states[1] + (1 - b2) * g**2
        corrected = n.get("bias_correction", True)
        mean, square = (m / (1 - b1**t), v / (1 - b2**t)) if corrected else (m, v)
        new = [m, v]
        if name == "amsgrad":
            new.append(torch.maximum(states[2], v))
            square = new[2] / (1 - b2**t)
        u = mean / ((square + eps).sqrt() if n.get("eps_inside_sqrt") else square.sqrt() + eps)
        if name.startswith("lamb"):
            u = u + decay * p
            ratio = (p.norm() / u.norm()).clamp(0.01, n.get("max_coeff", 10.0))
            return [p - lr * ratio * u, *new]
        return [p * (1 - lr * decay if n.get("decoupled", True) else 1) - lr * u, *new]
    if name == "lion":
        m = states[0]
        return [p * (1 - lr * decay) - lr * (0.9 * m + 0.1 * g).sign(), 0.99 * m + 0.01 * g]
    g = g + decay * p
    if name == "adagrad":
        total = states[0] + g**2
        return [p - lr * g / (total.sqrt() + 1e-10), total]
    if name == "sgd":
        return [p - lr * g]
    mu = n["momentum"]
    b = g if n.get("first") else mu * states[0] + (1 - n.get("dampening", 0.0)) * g
    return [p - lr * (g + mu * b if n.get("nesterov") else b), b]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float32),
    ],
    ids=["fp32", "bf16 states", "bf16 params", "fp16 params"],
)
def test_one_step_is_the_formula(backend: str, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    for numel in SIZES if backend == "cpu" else SIZES[1:3]:
        tensors = inputs(name, numel, *dtypes)
        expected, before = formula(name, tensors), tensors[0].double()
        sure = torch.ones(numel, dtype=torch.bool)
        if name == "lion":  # where the direction cancels, its sign is a matter of rounding
            sure = (0.9 * tensors[2].double() + 0.1 * tensors[1].double()).abs() > 1e-6
        call(name, tensors)
        for mine, wanted in zip([tensors[0], *tensors[2:]], expected, strict=True):
            eps = torch.finfo(mine.dtype).eps
            # Sums cancel (keep p - u), the norms of LAMB add fp32 rounding: 32 fp32 roundings of the largest value.
            bound = 32 * 2**-24 * max(float(wanted.abs().max()), 1.0)
            if name.startswith("lamb") and dtypes[2] == torch.bfloat16:  # the update is taken from the stored moments
                bound += 2**-8 * float((expected[0] - before).abs().max())
            error = (mine.double() - wanted).abs() - eps / 2 * wanted.abs()
            assert float(error[sure].max()) <= bound, name


@pytest.mark.parametrize("name", CASES)
def test_fp64_goes_through_the_reference(name: str) -> None:
    tensors = inputs(name, 53, torch.float64, torch.float64, torch.float64)
    expected = formula(name, tensors)
    call(name, tensors)
    for mine, wanted in zip([tensors[0], *tensors[2:]], expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("lamb")])
@pytest.mark.parametrize("seed", [None, 5])
def test_pieces_have_the_bits_of_the_whole(backend: str, name: str, seed: int | None) -> None:
    numel = 20_011 if backend == "cpu" else 1500
    whole = inputs(name, numel, torch.bfloat16 if seed else torch.float32, torch.float32, torch.float32)
    parts = [tensor.clone() for tensor in whole]
    call(name, whole, seed=seed)
    cuts = [0, 1, 33, 1000, 1024 + 7, numel]
    for low, high in itertools.pairwise(cuts):
        call(name, [tensor[low:high] for tensor in parts], seed=None if seed is None else seed_at(seed, low))
    for mine, wanted in zip(parts, whole, strict=True):
        assert torch.equal(mine, wanted)


def test_lamb_of_pieces_is_lamb_of_the_whole(backend: str) -> None:
    whole = inputs("lamb", 5000, torch.float32, torch.float32, torch.float32)
    parts = [tensor.clone() for tensor in whole]
    ratio = lamb_step(*whole, step=4, lr=0.1, weight_decay=0.1)
    cuts = [slice(0, 1000), slice(1000, 5000)]
    numbers = {"step": 4, "weight_decay": 0.1}
    squares = sum(lamb_moments(*(tensor[part] for tensor in parts), **numbers) for part in cuts)
    assert lamb_ratio(squares) == pytest.approx(ratio, rel=1e-12)
    p, _, m, v = parts
    for part in cuts:
        lamb_apply(p[part], m[part], v[part], ratio=ratio, lr=0.1, **numbers)
    assert torch.equal(p, whole[0])


def test_lamb_ratio_has_bounds_and_a_way_out() -> None:
    assert lamb_ratio(torch.tensor([4.0, 1.0])) == 2.0
    assert lamb_ratio(torch.tensor([1e6, 1.0])) == 10.0
    assert lamb_ratio(torch.tensor([1e-12, 1.0]), min_coeff=0.1) == 0.1
    assert lamb_ratio(torch.tensor([0.0, 1.0])) == lamb_ratio(torch.tensor([1.0, 0.0])) == 1.0


@pytest.mark.parametrize("name", CASES)
def test_scale_and_copy_out(backend: str, name: str) -> None:
    plain = inputs(name, 300, torch.float32, torch.float32, torch.float32)
    scaled = [tensor.clone() for tensor in plain]
    scaled[1] *= 8  # a power of two: exact
    out = torch.empty(300, dtype=torch.bfloat16)
    call(name, plain)
    call(name, scaled, grad_scale=0.125, out=out)
    assert torch.equal(scaled[0], plain[0]) and torch.equal(out, plain[0].bfloat16())


def test_stochastic_rounding_is_unbiased_and_repeatable(backend: str) -> None:
    numel = 20_000 if backend == "cpu" else 4000
    value = 1 + 2**-7 * 0.3  # three tenths of the way between two bf16 numbers
    found = []
    for seed in (1, 1, 2):
        p = torch.ones(numel, dtype=torch.bfloat16)
        sgd_step(p, torch.full((numel,), 1 - value), lr=1.0, seed=seed)
        found.append(p)
    assert set(found[0].tolist()) == {1.0, 1 + 2**-7}
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    share = float((found[0] > 1).float().mean())
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / numel)


def test_stochastic_rounding_has_the_bits_of_the_reference(backend: str) -> None:
    from ds_kernels import use_backend

    tensors = inputs("adamw", 2000, torch.bfloat16, torch.bfloat16, torch.bfloat16)
    for tensor in tensors:
        tensor.copy_(
            torch.randint(-255, 256, (2000,)) / 64
        )  # fits bf16, and fp32 holds all sums: one rounding, the last
    twin, plain = [tensor.clone() for tensor in tensors], [tensor.clone() for tensor in tensors]
    numbers: dict[str, Any] = {"lr": 0.125, "momentum": 0.5, "seed": (1 << 32) - 1}
    sgd_step(*tensors[:3], **numbers)
    with use_backend("reference"):
        sgd_step(*twin[:3], **numbers)
    sgd_step(*plain[:3], **(numbers | {"seed": None}))
    assert all(torch.equal(a, b) for a, b in zip(tensors, twin, strict=True))
    assert not torch.equal(tensors[0], plain[0])  # some were rounded away from the nearest


def test_special_values_stay_what_they_are(backend: str) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    for seed in (None, 3):
        p = torch.zeros(4, dtype=torch.bfloat16)
        sgd_step(p, special, lr=1.0, seed=seed)
        assert p[0].isnan() and p[1:].tolist() == [-math.inf, math.inf, 0.0]
    maximum, square = torch.zeros(4), torch.zeros(4)
    adam_step(torch.zeros(4), special, torch.zeros(4), square, step=1, max_exp_avg_sq=maximum)
    assert maximum[0].isnan() and maximum[1] == math.inf
    p = torch.zeros(4)
    lion_step(p, special, torch.zeros(4), lr=1.0)
    assert p.tolist() == [0.0, -1.0, 1.0, 0.0]


@pytest.mark.parametrize("name", CASES)
def test_nothing_to_do(name: str) -> None:
    call(name, inputs(name, 0, torch.float32, torch.float32, torch.float32))


@pytest.mark.parametrize("name", CASES)
def test_threads_do_not_change_bits(name: str) -> None:
    torch.manual_seed(0)
    original = inputs(name, 300_001, torch.bfloat16, torch.bfloat16, torch.float32)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([tensor.clone() for tensor in original])
            call(name, found[-1])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_bad_input() -> None:
    p, g = torch.ones(4), torch.ones(4)
    with pytest.raises(KernelArgumentError, match="exp_avg has 3 elements, param has 4"):
        lion_step(p, g, torch.ones(3))
    with pytest.raises(
        KernelArgumentError, match=r"exp_avg is of dtype torch.float16; supported are float32, bfloat16"
    ):
        lion_step(p, g, torch.ones(4, dtype=torch.float16))
    with pytest.raises(KernelArgumentError, match=r"exp_avg is of dtype torch.float32; supported are float64"):
        lion_step(p.double(), g, torch.ones(4))
    with pytest.raises(KernelArgumentError, match=r"grad .* not contiguous"):
        sgd_step(p, torch.ones(8)[::2])
    with pytest.raises(KernelArgumentError, match="grad is on meta"):
        sgd_step(p, torch.ones(4, device="meta"))
    with pytest.raises(KernelArgumentError, match="step is 0; the first step is 1"):
        adam_step(p, g, torch.ones(4), torch.ones(4), step=0)
    with pytest.raises(KernelArgumentError, match=r"momentum is 0.9 but there is no buffer"):
        sgd_step(p, g, momentum=0.9)
    with pytest.raises(KernelArgumentError, match="seed is -1"):
        sgd_step(p, g, seed=-1)
