"""The engine around any torch module: casts, passes on, refuses what it cannot do, by name."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from ds_comm.testing import run_ranks
from ds_inference import ConfigError, InferenceEngine, ModelError, QuantizedLinear, init_inference


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.register_buffer("inv_freq", torch.rand(8), persistent=False)
        self.flavour = "plain"

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return self.down(self.up(x).relu()) * scale


def block(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block()


def test_the_four_ways_of_configuration(tmp_path: Any) -> None:
    path = tmp_path / "inference.json"
    path.write_text('{"dtype": "bf16"}')
    assert init_inference(block(), dtype="fp32").dtype == torch.float32
    assert init_inference(block(), {"dtype": torch.bfloat16}).dtype == torch.bfloat16
    assert init_inference(block(), str(path)).dtype == torch.bfloat16
    assert init_inference(block(), {"max_out_tokens": 5}, dtype="bf16").inference_config.max_out_tokens == 5
    with pytest.raises(ConfigError, match="dtype"):
        init_inference(block(), {"dtype": "bf16"}, dtype="fp32")


def test_it_is_called_as_the_module_is() -> None:
    module = block().train()
    engine = init_inference(module, dtype="fp32")
    x = torch.randn(2, 32)
    assert torch.equal(engine(x, scale=2.0), block()(x, scale=2.0))
    assert engine.module is module and not module.training and engine.flavour == "plain"
    assert isinstance(engine, nn.Module) and isinstance(engine, InferenceEngine)
    with pytest.raises(AttributeError, match="flavor"):
        _ = engine.flavor
    with pytest.raises(AttributeError, match="generate"):
        engine.generate(x)


def test_frequencies_stay_exact_when_cast() -> None:
    engine = init_inference(block(), dtype="bf16")
    assert engine.module.up.weight.dtype == torch.bfloat16
    assert torch.equal(engine.module.inv_freq, block().inv_freq)


def test_half_on_a_cpu_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ds_inference"):
        assert init_inference(block()).dtype == torch.float16
    assert "bfloat16 and float32 are much faster" in caplog.text


@pytest.mark.parametrize("asked", [{"dtype": "int8"}, {"dtype": "fp32", "quant": {"weight": {"num_bits": 8}}}])
def test_quantised_by_configuration(asked: dict[str, Any]) -> None:
    engine = init_inference(block(), asked)
    assert isinstance(engine.module.up, QuantizedLinear) and engine.dtype == torch.float32
    x = torch.randn(2, 32)
    torch.testing.assert_close(engine(x), block()(x), rtol=0.1, atol=0.02)


def test_quantised_by_keyword() -> None:
    engine = init_inference(block(), dtype="fp32", quantization={"bits": 4, "exclude": "down"})
    assert engine.module.up.bits == 4 and type(engine.module.down) is nn.Linear


def test_a_model_by_name_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model is a str; expected a torch module"):
        init_inference("gpt2")  # type: ignore[arg-type]


def test_injection_of_what_is_not_known_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Block .*not known.*llama.*bert.*Leave replace_with_kernel_inject out"):
        init_inference(block(), dtype="fp32", replace_with_kernel_inject=True)


def test_injection_policies_are_checked() -> None:
    init_inference(block(), dtype="fp32", injection_policy={Block: ("down",)})
    with pytest.raises(ConfigError, match=r"no module 'out'"):
        init_inference(block(), dtype="fp32", injection_policy={Block: ("out",)})
    with pytest.raises(ConfigError, match=r"GRU.*no module of that class"):
        init_inference(block(), dtype="fp32", injection_policy={nn.GRU: ("out",)})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"moe": {"ep_size": 2}}, r"moe\.ep_size is 2"),
        ({"zero": {"stage": 3}}, r"zero\.stage is 3"),
        ({"triangular_masking": False}, "triangular_masking"),
        ({"tensor_parallel": {"tp_size": 3}}, r"tp_size is 3, and there are 1 ranks"),
        ({"tensor_parallel": {"mpu": object()}}, "tp_group instead"),
    ],
)
def test_what_is_not_done_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        init_inference(block(), dtype="fp32", **keys)


@pytest.mark.parametrize("key", ["enable_cuda_graph", "triton_autotune", "transposed_mode"])
def test_what_has_no_effect_is_said(key: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ds_inference"):
        init_inference(block(), {"dtype": "fp32", key: True})
    assert f"{key} has no effect" in caplog.text


def test_pass_times_of_a_module() -> None:
    engine = init_inference(block(), dtype="fp32")
    engine.profile_model_time(use_cuda_events=False)
    for _ in range(3):
        engine(torch.randn(2, 32))
    assert len(engine.model_times()) == 3


def test_destroy_leaves_the_module_usable() -> None:
    engine = init_inference(block(), dtype="fp32")
    engine.destroy()
    engine.destroy()
    assert engine(torch.randn(2, 32)).shape == (2, 32)


def _groups() -> list[str]:
    import ds_comm

    said = []
    for keys in ({"tp_size": 3}, {"tp_size": 2, "tp_group": ds_comm.get_world_group()}, {"tp_size": 2}):
        try:
            init_inference(block(), dtype="fp32", tensor_parallel=keys)
        except ValueError as error:
            said.append(str(error))
    return said


def test_ranks_that_do_not_fit() -> None:
    for said in run_ranks(_groups, 2):
        assert "tp_size is 3, and there are 2 ranks" in said[0]
        assert "attention heads" in said[1] and said[1] == said[2]  # no transformer: nothing that could be split
