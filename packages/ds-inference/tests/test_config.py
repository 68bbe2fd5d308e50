"""The inference configuration: every key, its aliases, the four ways of giving it, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_inference.config import DeepSpeedInferenceConfig, default_inference_config, resolve_config
from ds_inference.errors import ConfigError

# key -> (its other name, default, another value that is valid)
KEYS: dict[str, tuple[str | None, Any, Any]] = {
    "replace_with_kernel_inject": ("kernel_inject", False, True),
    "dtype": (None, torch.float16, torch.bfloat16),
    "enable_cuda_graph": (None, False, True),
    "triton_autotune": (None, False, True),
    "zero": (None, {}, {"stage": 3}),
    "triangular_masking": ("tm", True, False),
    "keep_module_on_host": (None, False, True),
    "checkpoint": (None, None, {"type": "ds_model"}),
    "base_dir": (None, "", "there"),
    "set_empty_params": (None, False, True),
    "save_mp_checkpoint_path": (None, None, "there"),
    "return_tuple": (None, True, False),
    "training_mp_size": (None, 1, 2),
    "replace_method": (None, "auto", "other"),
    "injection_policy": ("injection_dict", None, {torch.nn.Linear: ("out_proj",)}),
    "injection_policy_tuple": (None, None, ("a",)),
    "config": ("args", None, {"any": 1}),
    "max_out_tokens": ("max_tokens", 1024, 7),
    "min_out_tokens": ("min_tokens", 1, 2),
    "transposed_mode": (None, False, True),
    "use_triton": (None, False, False),
}
SECTIONS: dict[str, tuple[str | None, dict[str, tuple[str | None, Any, Any]]]] = {
    "tensor_parallel": (
        "tp",
        {
            "enabled": (None, True, False),
            "tp_size": (None, 1, 2),
            "tp_grain_size": (None, 64, 8),
            "mpu": (None, None, "object"),
            "tp_group": (None, None, "group"),
        },
    ),
    "moe": (
        None,
        {
            "enabled": (None, True, False),
            "ep_size": (None, 1, 2),
            "moe_experts": ("num_experts", [1], [4, 4]),
            "type": (None, "standard", "residual"),
            "ep_mp_group": (None, None, "group"),
            "ep_group": ("expert_group", None, "group"),
        },
    ),
    "quant": (None, {"enabled": (None, True, False)}),
    "checkpoint_config": (
        "ckpt_config",
        {
            "checkpoint_dir": (None, None, "a"),
            "save_mp_checkpoint_path": (None, None, "b"),
            "base_dir": (None, None, "c"),
        },
    ),
}


def test_there_are_no_other_keys() -> None:
    assert set(DeepSpeedInferenceConfig.model_fields) == set(KEYS) | set(SECTIONS)


@pytest.mark.parametrize("key", KEYS)
def test_every_key(key: str) -> None:
    alias, default, other = KEYS[key]
    assert getattr(resolve_config(), key) == default
    for name in filter(None, (key, alias)):
        assert getattr(resolve_config({name: other}), key) == other
        if name != "config":  # as a keyword that is the config itself
            assert getattr(resolve_config(**{name: other}), key) == other


@pytest.mark.parametrize(("section", "key"), [(section, key) for section in SECTIONS for key in SECTIONS[section][1]])
def test_every_key_of_a_section(section: str, key: str) -> None:
    short, keys = SECTIONS[section]
    alias, default, other = keys[key]
    assert getattr(getattr(resolve_config(), section), key) == default
    for outer in filter(None, (section, short)):
        for inner in filter(None, (key, alias)):
            assert getattr(getattr(resolve_config({outer: {inner: other}}), section), key) == other


@pytest.mark.parametrize("part", ["activation", "weight"])
def test_quantisation(part: str) -> None:
    found = getattr(resolve_config(quant={part: {"num_bits": 4, "q_type": "asymmetric", "q_groups": 8}}).quant, part)
    assert (found.enabled, found.num_bits, found.q_type, found.q_groups) == (True, 4, "asymmetric", 8)
    weight = resolve_config(quant={"weight": {"post_init_quant": {"fc": {}}}, "qkv": {"enabled": False}}).quant
    assert weight.weight.post_init_quant == {"fc": {}} and weight.weight.quantized_initialization == {}
    assert not weight.qkv.enabled


def test_the_four_ways(tmp_path: Path) -> None:
    path = tmp_path / "inference.json"
    path.write_text(json.dumps({"dtype": "bf16", "tp": {"tp_size": 2}}))
    assert resolve_config() == DeepSpeedInferenceConfig()
    for given in (path, str(path), {"dtype": "bf16", "tp": {"tp_size": 2}}):
        found = resolve_config(given)
        assert (found.dtype, found.tensor_parallel.tp_size) == (torch.bfloat16, 2)
    assert resolve_config(dtype="bf16", tensor_parallel={"tp_size": 2}) == found == resolve_config(found)
    both = resolve_config(path, dtype=torch.bfloat16, tensor_parallel={"tp_grain_size": 8}, max_tokens=9)
    assert (both.dtype, both.tensor_parallel.tp_size, both.tensor_parallel.tp_grain_size) == (torch.bfloat16, 2, 8)
    assert both.max_out_tokens == 9
    assert resolve_config({"dtype": "auto"}, dtype="fp32").dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "keywords", "text"),
    [
        ({"dtype": "fp16"}, {"dtype": "bf16"}, "dtype is 'fp16' in config and 'bf16' as a keyword"),
        ({"tp": {"tp_size": 2}}, {"tensor_parallel": {"tp_size": 4}}, "tensor_parallel.tp_size is 2 in config and 4"),
        ({"tp": {"tp_size": 2}}, {"mp_size": 4}, "tensor_parallel.tp_size is 2 in config and 4"),
        ({"max_tokens": 3}, {"max_out_tokens": 4}, "max_out_tokens is 3 in config and 4"),
        ({"max_tokens": 3, "max_out_tokens": 4}, {}, "max_out_tokens is 4, but max_out_tokens, the same key, is 3"),
        ({"mp_size": 2, "tp": {"tp_size": 3}}, {}, "mp_size is 2, but tensor_parallel.tp_size is 3"),
        ({"mp_size": 2, "tp": 3}, {}, "tensor_parallel is 3; expected a section"),
    ],
)
def test_true_conflicts(config: dict[str, Any], keywords: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        resolve_config(config, **keywords)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"dtyp": "fp16"}, "unknown key 'dtyp'; did you mean dtype?"),
        ({"tensor_parallel": {"tp_sizes": 2}}, "tensor_parallel: unknown key 'tp_sizes'; did you mean tp_size?"),
        ({"quant": {"weight": {"bits": 4}}}, "quant.weight: unknown key 'bits'"),
        ({"dtype": "fp8"}, "dtype: 'fp8' is no dtype that inference knows"),
        ({"dtype": torch.float64}, "dtype: torch.float64 is not supported"),
        ({"tp": {"tp_size": 0}}, "tensor_parallel.tp_size"),
        ({"max_out_tokens": 2.5}, r"max_(out_)?tokens: .* \(it is 2.5\)"),
        ({"max_out_tokens": 2, "min_out_tokens": 3}, "min_out_tokens is 3, max_out_tokens 2"),
        ({"moe": {"type": "mixed"}}, "moe.type"),
    ],
)
def test_what_is_refused(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        resolve_config(config)


def test_types_that_cannot_be() -> None:
    with pytest.raises(TypeError, match="dtype is 16, a int"):
        resolve_config(dtype=16)
    with pytest.raises(TypeError, match="config is a int"):
        resolve_config(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[1]", "holds a list"),
        ("{", "cannot be read"),
        ('{"tp": {"tp_size": 1, "tp_size": 2}}', "'tp_size' is there twice"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=what):
        resolve_config(path)
    with pytest.raises(ConfigError, match=r"missing\.json' cannot be read"):
        resolve_config(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("old", "value", "section", "key"),
    [
        ("mp_size", 2, "tensor_parallel", "tp_size"),
        ("mpu", "object", "tensor_parallel", "mpu"),
        ("ep_size", 2, "moe", "ep_size"),
        ("ep_group", "group", "moe", "ep_group"),
        ("expert_group", "group", "moe", "ep_group"),
        ("ep_mp_group", "group", "moe", "ep_mp_group"),
        ("expert_mp_group", "group", "moe", "ep_mp_group"),
        ("moe_experts", [4], "moe", "moe_experts"),
        ("moe_type", "residual", "moe", "type"),
    ],
)
def test_old_keys_have_moved(old: str, value: object, section: str, key: str, caplog: pytest.LogCaptureFixture) -> None:
    assert getattr(getattr(resolve_config({old: value}), section), key) == value
    assert f"{old} is deprecated; give {section}.{key}" in caplog.text
    assert getattr(getattr(DeepSpeedInferenceConfig(**{old: value}), section), key) == value


def test_short_forms() -> None:
    assert not resolve_config(moe=False).moe.enabled
    assert resolve_config(moe={"num_experts": 8}).moe.moe_experts == [8]


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [("half", torch.float16), ("BFLOAT16", torch.bfloat16), ("bfloat", torch.bfloat16), ("float", torch.float32),
     ("torch.float16", torch.float16), ("int8", torch.int8)],
)  # fmt: skip
def test_spellings_of_dtypes(spelling: str, dtype: torch.dtype) -> None:
    assert resolve_config(dtype=spelling).dtype == dtype


def test_defaults_are_a_config() -> None:
    assert resolve_config(default_inference_config()) == DeepSpeedInferenceConfig()
    with pytest.raises(ValueError, match="frozen"):
        DeepSpeedInferenceConfig().dtype = torch.float32  # type: ignore[misc]


def test_triton_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="use_triton is on, but triton is not installed"):
        resolve_config(use_triton=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert resolve_config(use_triton=True).use_triton
