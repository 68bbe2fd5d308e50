"""Counts against arithmetic, attribution to modules, and the engine's profiled step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import deepspeed
from deepspeed.profiling.flops_profiler import FlopsProfiler, get_model_profile
from deepspeed.profiling.flops_profiler.profiler import duration_to_string, number_to_string, params_to_string

B, S, H, HEADS = 2, 5, 8, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H, 3 * H)
        self.out = nn.Linear(H, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.view(B, S, HEADS, H // HEADS).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(B, S, H))


class Layers(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.attention = Attention()
        self.layers = nn.ModuleList(nn.Linear(H, H, bias=False) for _ in range(2))
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x)
        x = checkpoint(self.run_layers, x, use_reentrant=False) if self.recompute else self.run_layers(x)
        return x.relu()

    def run_layers(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


LINEAR = 2 * B * S * H * H
PRODUCT = 2 * B * S * S * H
"""One of attention's two batched products."""


def counted(model: nn.Module, x: torch.Tensor) -> FlopsProfiler:
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(x).sum().backward()
    profiler.stop_profile()
    return profiler


def test_forward_and_backward_of_linears_and_attention() -> None:
    profiler = counted(Layers(), torch.randn(B, S, H, requires_grad=True))
    modules = profiler.profile()
    assert modules["attention.qkv"].forward == 3 * LINEAR and modules["attention.qkv"].backward == 6 * LINEAR
    assert modules["attention"].forward == 4 * LINEAR + 2 * PRODUCT
    assert modules["attention"].backward == 8 * LINEAR + 5 * PRODUCT  # its scores are computed again
    assert modules["layers.1"].forward == LINEAR and modules["layers.1"].backward == 2 * LINEAR
    assert modules["layers"].forward == 2 * LINEAR
    assert profiler.get_total_flops() == 6 * LINEAR + 2 * PRODUCT == modules[""].forward
    assert profiler.get_total_macs() == 3 * LINEAR + PRODUCT
    assert profiler.flops_of("backward") == modules[""].backward == 12 * LINEAR + 5 * PRODUCT
    assert profiler.flops_of("recompute") == 0
    assert profiler.get_total_params() == sum(p.numel() for p in Layers().parameters())
    assert profiler.get_total_duration() > 0 and modules["layers.0"].calls == 1


def test_an_input_without_gradient_needs_no_product_for_it() -> None:
    modules = counted(Layers(), torch.randn(B, S, H)).profile()
    assert modules["attention.qkv"].backward == 3 * LINEAR


def test_recomputed_forwards_are_counted_as_such() -> None:
    profiler = counted(Layers(recompute=True), torch.randn(B, S, H))
    assert profiler.get_total_flops() == 6 * LINEAR + 2 * PRODUCT
    modules = profiler.profile()
    assert modules["layers.0"].recompute == LINEAR == profiler.flops_of("recompute")
    assert modules["layers.1"].recompute == 0  # torch stops when it has the last saved tensor, this layer's input
    assert modules["layers.0"].backward == modules["layers.1"].backward == 2 * LINEAR


def test_convolution_and_meta_tensors() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        profiler = counted(model, torch.randn(B, 3, 6, 6))
    assert profiler.get_total_flops() == 2 * B * 6 * 6 * 4 * 3 * 3 * 3


def test_what_is_not_the_model_is_not_counted() -> None:
    model, other = nn.Linear(H, H), torch.randn(H, H, requires_grad=True)
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    (model(torch.randn(1, H)) @ other).sum().backward()
    profiler.stop_profile()
    assert profiler.get_total_flops() == 2 * H * H
    assert profiler.flops_of("backward") == 2 * H * H


def test_get_model_profile() -> None:
    model = Layers().train()
    flops, macs, params = get_model_profile(model, (B, S, H), print_profile=False, as_string=False)
    assert (flops, macs) == (6 * LINEAR + 2 * PRODUCT, 3 * LINEAR + PRODUCT)
    assert params == sum(p.numel() for p in model.parameters()) and model.training
    again = get_model_profile(model, args=[torch.ones(B, S, H)], print_profile=False)
    assert again == (f"{flops / 1e3:.2f} KFLOPS".replace("0 K", " K"), again[1], params_to_string(params))
    without = get_model_profile(
        model, (B, S, H), print_profile=False, as_string=False, ignore_modules=[Attention], warm_up=0
    )
    assert without[0] == 2 * LINEAR
    with pytest.raises(ValueError, match="either input_shape"):
        get_model_profile(model)
    with pytest.raises(ValueError, match="mode is 'train'"):
        get_model_profile(model, (B, S, H), mode="train")


def test_the_report_names_every_module(tmp_path: Path) -> None:
    profiler = counted(Layers(), torch.randn(B, S, H))
    target = tmp_path / "deep" / "profile.txt"
    profiler.print_model_profile(profile_step=3, output_file=target)
    text = target.read_text()
    assert "at step 3" in text and "(qkv) Linear" in text and "backward operations" in text
    short = profiler.report(detailed=False, module_depth=1, top_modules=2)
    assert "(qkv)" not in short and "depth 1:" in short and "depth 0:" not in short
    profiler.end_profile()
    assert profiler.get_total_flops() == 0


def test_starting_twice_is_an_error_and_hooks_go_away() -> None:
    model = nn.Linear(2, 2)
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    with pytest.raises(RuntimeError, match="is running"):
        profiler.start_profile()
    profiler.stop_profile()
    profiler.stop_profile()
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 "), (999, "999 "), (1_500, "1.5 K"), (2_000_000, "2 M"), (3.2e12, "3.2 T")]
)
def test_numbers(number: float, text: str) -> None:
    assert number_to_string(number) == text


def test_durations() -> None:
    assert duration_to_string(0.0125) == "12.5 ms" and duration_to_string(3.0) == "3 s"


def test_upstream_path() -> None:
    assert deepspeed.profiling.flops_profiler.FlopsProfiler is deepspeed.profiling.FlopsProfiler
