"""Layers with frozen weights and adapters: formulas, quantised formats, loading, fusing; training at every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deepspeed
import ds_comm
import ds_kernels
from deepspeed.linear import Init, LoRAConfig, OptimizedLinear, QuantizationConfig, init_lora
from deepspeed.linear.optimized_linear import LoRAOptimizedLinear, QuantizedLinear, QuantizedParameter
from ds_comm.testing import run_ranks

FP32 = {"dtype": torch.float32}
FORMATS = [(8, 3, "fp8_e4m3", 0.04), (8, 2, "fp8_e5m2", 0.08), (4, 1, "int4", 0.2)]


def layer(columns: int = 10, rows: int = 6, quantized: bool = False, bias: bool = False, **lora: Any) -> Any:
    config = QuantizationConfig(group_size=4) if quantized else None
    torch.manual_seed(0)
    made = OptimizedLinear(columns, rows, bias, LoRAConfig(**{"lora_r": 3, "lora_alpha": 6.0, **lora}), config, **FP32)
    if hasattr(made, "lora_weight_2"):
        nn.init.normal_(made.lora_weight_2.weight)
    return made


def test_what_the_configs_make() -> None:
    plain = OptimizedLinear(4, 3, bias=True)
    assert type(plain) is nn.Linear and plain.weight.dtype is torch.bfloat16 and plain.bias is not None
    assert type(OptimizedLinear(4, 3, quantization_config=QuantizationConfig())) is QuantizedLinear
    adapted = OptimizedLinear(4, 3, lora_config=LoRAConfig(), **FP32)
    assert type(adapted) is LoRAOptimizedLinear and adapted.lora_scaling_factor == 0.25
    assert torch.equal(adapted(torch.ones(2, 4)), F.linear(torch.ones(2, 4), adapted.weight))  # B is zero
    assert [name for name, parameter in adapted.named_parameters() if parameter.requires_grad] == [
        "lora_weight_1.weight",
        "lora_weight_2.weight",
    ]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_formula_and_its_gradients(quantized: bool, bias: bool) -> None:
    made, x = layer(quantized=quantized, bias=bias), torch.randn(2, 5, 10, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    out = made(x)
    first, second = (w.weight.detach().clone().requires_grad_() for w in (made.lora_weight_1, made.lora_weight_2))
    expected = F.linear(same, made.full_weight(), made.bias) + 2.0 * (same @ first.T) @ second.T
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for got, wanted in ((x, same), (made.lora_weight_1.weight, first), (made.lora_weight_2.weight, second)):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-4)
    assert made.weight.grad is None and not made.weight.requires_grad


@pytest.mark.parametrize(("bits", "mantissa", "name", "error"), FORMATS)
@pytest.mark.parametrize("shape", [(1, 7), (6, 10), (5, 9)])
def test_formats(bits: int, mantissa: int, name: str, error: float, shape: tuple[int, int]) -> None:
    config = QuantizationConfig(q_bits=bits, mantissa_bits=mantissa, group_size=4)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    made = QuantizedParameter(weight, quantization_config=config)
    assert made.dtype is torch.uint8 and made.quantization_config is config and not made.requires_grad
    assert torch.equal(made.dequantized(), ds_kernels.quantize(weight, name, block_size=4).dequantize())
    assert (made.dequantized() - weight).abs().max() <= error * weight.abs().max()
    assert made.packing.numel == made.numel()
    half = QuantizedParameter(weight.bfloat16(), quantization_config=config)
    assert half.dequantized().dtype is torch.bfloat16


def test_casts_and_copies_leave_the_bytes_alone() -> None:
    made = layer(quantized=True)
    before = made.weight.clone()
    made.bfloat16()
    assert torch.equal(made.weight, before) and made(torch.ones(1, 10, dtype=torch.bfloat16)).dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert made(torch.ones(1, 10)).dtype is torch.bfloat16
    other = QuantizedLinear(10, 6, bias=True, quantization_config=QuantizationConfig(q_bits=4), **FP32)
    again = QuantizedLinear(10, 6, bias=True, quantization_config=QuantizationConfig(q_bits=4), **FP32)
    again.load_state_dict(other.state_dict())
    x = torch.randn(3, 10)
    assert torch.equal(again(x), other(x))
    torch.testing.assert_close(other(x), F.linear(x, other.full_weight(), other.bias))


def test_dense_weights_are_quantised_as_they_are_loaded() -> None:
    dense = torch.randn(6, 10)
    made = QuantizedLinear(10, 6, quantization_config=QuantizationConfig(group_size=4), **FP32)
    made.load_state_dict({"weight": dense})
    assert torch.equal(made.full_weight(), ds_kernels.quantize(dense, "fp8_e4m3", block_size=4).dequantize())
    adapted = layer(quantized=True)
    adapted.load_state_dict({**adapted.state_dict(), "weight": dense})
    assert torch.equal(adapted.full_weight(), made.full_weight())


@pytest.mark.parametrize("quantized", [False, True])
def test_fusing_keeps_the_bits_of_the_weight(quantized: bool) -> None:
    made, x = layer(quantized=quantized), torch.randn(4, 10)
    before, apart = made.weight.clone(), made(x)
    made.fuse_lora()
    torch.testing.assert_close(made(x), apart, rtol=1e-4, atol=1e-5)
    assert not made(x).requires_grad and torch.equal(made.weight, before)
    made.unfuse_lora()
    assert torch.equal(made(x), apart) and torch.equal(made.weight, before)


def test_adapters_that_wait() -> None:
    made = layer(delay_lora_init=True, quantized=True)
    assert list(made.state_dict()) == ["weight"] and made.weight.dtype is torch.float32
    with pytest.raises(RuntimeError, match=r"delay_lora_init: call deepspeed.linear.init_lora"):
        made(torch.ones(1, 10))
    made.init_lora()
    made.init_lora()
    assert made.weight.dtype is torch.uint8 and len(list(made.parameters())) == 3
    frozen = layer(delay_lora_init=True)
    frozen.disable()
    frozen.init_lora()
    assert torch.equal(frozen(torch.ones(1, 10)), F.linear(torch.ones(1, 10), frozen.weight))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8, bias=False)
        self.other = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.q_proj(self.norm(x))))


def build(quantized: bool) -> Attention:
    torch.manual_seed(5)
    with Init(LoRAConfig(lora_r=2, target_mods=["q_proj"]), QuantizationConfig(group_size=8) if quantized else None):
        model = Attention()
        assert isinstance(model.q_proj, nn.Linear) and not isinstance(model.norm, nn.Linear)
    return model


def test_models_are_built_of_such_layers() -> None:
    before = nn.Linear
    model = build(quantized=True)
    assert nn.Linear is before and isinstance(model.q_proj, LoRAOptimizedLinear)
    assert model.other.weight.dtype is torch.float32 and model.other.bias is not None
    init_lora(model)
    assert model.other.disabled and not model.q_proj.disabled and model.other.weight.dtype is torch.uint8
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"q_proj.lora_weight_1.weight", "q_proj.lora_weight_2.weight", "norm.weight", "norm.bias"}
    with Init(LoRAConfig(target_mods=["nothing"])):
        everywhere = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    init_lora(everywhere)
    assert all(hasattr(module, "lora_weight_1") for module in everywhere)
    with Init():
        assert type(nn.Linear(2, 2)) is before


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match=r"q_bits 6 with mantissa_bits 3 is not a format"):
        QuantizationConfig(q_bits=6)
    with pytest.raises(ValueError, match=r"group_size is 3; expected a positive, even number"):
        QuantizationConfig(group_size=3)
    with pytest.raises(ValueError, match=r"q_dtype is torch.int8"):
        QuantizationConfig(q_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"lora_r is 0"):
        LoRAConfig(lora_r=0)
    with pytest.raises(ValueError, match=r"bytes have no gradient"):
        QuantizedParameter(torch.ones(2, 2), requires_grad=True)
    with pytest.raises(ValueError, match=r"torch.int64 of shape \(2,\); expected a floating matrix"):
        QuantizedParameter(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"quantizer is ds_kernels.quantize"):
        QuantizedParameter(torch.ones(2, 2), quantizer=object())


# -- under ZeRO -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, quantized: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(build(quantized) for _ in range(2))
        self.head = build(quantized)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x).float().square().mean()


def make(quantized: bool) -> Net:
    net = Net(quantized)
    init_lora(net)
    for index, parameter in enumerate(p for p in net.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
    return net


def batch(step: int, index: int) -> Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(10 * step + index))


def engine_of(net: nn.Module, stage: int) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    return deepspeed.initialize(model=net, config=config)[0]


def train(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = engine(batch(step, ds_comm.get_rank()))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def run(folder: str) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for quantized in (False, True):
        for stage in (0, 2, 3):
            engine = engine_of(make(quantized), stage)
            losses = train(engine, range(3))
            tag = f"{quantized}-{stage}"
            engine.save_checkpoint(folder, tag=tag)
            engine.wait_for_checkpoint()
            layer = engine.module.blocks[1].q_proj
            layer.fuse_lora()
            engine.module.eval()
            with torch.no_grad():
                fused = float(engine(batch(9, 0)))
                layer.unfuse_lora()
                apart = float(engine(batch(9, 0)))
            engine.module.train()
            state = engine._consolidated_16bit_state_dict()
            after = train(engine, range(3, 5))
            again = engine_of(make(quantized), 3 if stage != 3 else 1)
            again.load_checkpoint(folder, tag=tag)
            found[quantized, stage] = (losses, state, fused, apart, after, train(again, range(3, 5)))
    return found


def test_every_stage_is_one_process(tmp_path: Path) -> None:
    ranks = run_ranks(run, 2, str(tmp_path), timeout=240)
    for quantized in (False, True):
        net = make(quantized)
        frozen = {name: p.detach().clone() for name, p in net.named_parameters() if not p.requires_grad}
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        expected = []
        for step in range(3):
            losses = [net(batch(step, index)) for index in range(2)]
            optimizer.zero_grad()
            (sum(losses) / 2).backward()
            torch.nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], 0.2)
            optimizer.step()
            expected.append([float(loss.detach()) for loss in losses])
        for stage in (0, 2, 3):
            for rank in range(2):
                losses, state, fused, apart, after, again = ranks[rank][quantized, stage]
                torch.testing.assert_close(losses, [both[rank] for both in expected], rtol=2e-5, atol=1e-6)
                assert fused == pytest.approx(apart, rel=1e-4) and after == again
            state = ranks[0][quantized, stage][1]
            for name, value in net.state_dict().items():
                torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
            assert all(torch.equal(state[name], value) for name, value in frozen.items())


def shard_sizes() -> tuple[int, int]:
    net = make(True)
    bytes_of = sum(p.numel() for p in net.parameters() if p.dtype is torch.uint8)
    engine = engine_of(net, 3)
    units = [unit for unit in engine.sharded.shard_map.units if unit.dtype == "uint8"]
    return bytes_of, sum(unit.padded_numel for unit in units) // 2


def test_stage_3_shards_the_bytes() -> None:
    for whole, own in run_ranks(shard_sizes, 2):
        assert whole // 2 <= own < 0.7 * whole


def test_a_zero_init_model_is_quantised() -> None:
    assert run_ranks(under_init, 2) == [(torch.uint8, True)] * 2


def under_init() -> tuple[torch.dtype, bool]:
    with deepspeed.zero.Init(dtype=torch.float32):
        net = Net(True)
    init_lora(net)
    engine = engine_of(net, 3)
    losses = train(engine, range(2))
    return net.head.q_proj.weight.dtype, all(loss == loss for loss in losses)
