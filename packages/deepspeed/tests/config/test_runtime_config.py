"""Upstream's import paths of the config and its helpers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepspeed.runtime.config import (
    DeepSpeedConfig,
    DeepSpeedConfigError,
    DeepSpeedConfigWriter,
    ScientificNotationEncoder,
)
from deepspeed.runtime.config_utils import (
    DeepSpeedConfigModel,
    dict_raise_error_on_duplicate_keys,
    get_config_default,
    get_scalar_param,
    pp_int,
)

CONFIG = {"train_batch_size": 8, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


class _Mpu:
    def get_data_parallel_world_size(self) -> int:
        return 4


class _SequenceMpu:
    def get_sequence_parallel_world_size(self) -> int:
        return 2


def test_attributes() -> None:
    config = DeepSpeedConfig(CONFIG)
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (
        8,
        8,
        1,
    )
    assert config.zero_config.stage == config.zero_optimization_stage == 2
    assert config.zero_enabled and config.bfloat16_config.enabled and not config.float16_config.enabled
    assert config._param_dict is CONFIG
    assert json.loads(config.print_user_config()) == CONFIG
    assert "zero_optimization.stage" in str(config)


def test_who_says_how_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert DeepSpeedConfig(CONFIG).world_size == 1
    assert DeepSpeedConfig(CONFIG, mpu=_Mpu()).train_micro_batch_size_per_gpu == 2
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert DeepSpeedConfig(CONFIG).world_size == 8
    assert DeepSpeedConfig(CONFIG, mpu=_SequenceMpu()).world_size == 4
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(DeepSpeedConfigError, match="cannot be divided"):
        DeepSpeedConfig(CONFIG, mpu=_SequenceMpu())


def test_writer(tmp_path: Path) -> None:
    writer = DeepSpeedConfigWriter()
    writer.add_config("train_batch_size", 8)
    writer.write_config(tmp_path / "ds.json")
    other = DeepSpeedConfigWriter()
    other.load_config(tmp_path / "ds.json")
    assert other.data == {"train_batch_size": 8}
    (tmp_path / "twice.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match="Duplicate keys"):
        other.load_config(tmp_path / "twice.json")


def test_numbers_above_a_thousand_are_scientific() -> None:
    value = {"big": 500000000, "small": 5, "on": True, "none": None, "list": [1, 2.5e8], "text": "x", "empty": {}}
    text = json.dumps(value, cls=ScientificNotationEncoder)
    assert '"big": 5.000000e+08' in text and '"small": 5' in text and '"on": true' in text
    assert json.loads(text) == value


def test_typed_sections_of_ones_own() -> None:
    class Mine(DeepSpeedConfigModel):
        size: int = 3

    assert Mine(size="auto").size == 3  # type: ignore[arg-type]
    assert Mine(size=5e8).size == 500_000_000  # type: ignore[arg-type]
    assert get_config_default(Mine, "size") == 3
    with pytest.raises(ValueError):
        Mine(strict=True, size="auto")  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        Mine(sise=1)  # type: ignore[call-arg]
    with pytest.raises(DeepSpeedConfigError, match="no field"):
        get_config_default(Mine, "nothing")


def test_small_helpers() -> None:
    assert str(pp_int(1234567)) == "1,234,567" and pp_int(5) + 1 == 6
    assert repr(pp_int(7, "seven")) == "seven"
    assert get_scalar_param({"a": 1}, "a", 2) == 1 and get_scalar_param({}, "a", 2) == 2
    with pytest.raises(ValueError, match="Duplicate keys"):
        json.loads('{"a": 1, "a": 2}', object_pairs_hook=dict_raise_error_on_duplicate_keys)
