"""A walk over every key: changing it changes the resolved config, or the support table says why not."""

from __future__ import annotations

import logging
import types
import typing
from typing import Any

import pytest

from deepspeed.config import ACCEPTED_AND_IGNORED, SUPPORT, ConfigModel, resolve, support_of
from deepspeed.config.base import Section
from deepspeed.config.document import field_docs
from deepspeed.config.keys import Key, known_keys
from deepspeed.errors import DeepSpeedConfigError

KEYS = [key for key in known_keys(ConfigModel) if key.section is None]

CHANGED: dict[str, Any] = {
    "train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "data_types.grad_accum_dtype": "bf16",
    "zero_optimization.overlap_comm": False,
    "tensor_parallel.autotp_size": 4,
    "weight_quantization.enabled": True,
    "data_parallel_size": 2,
    "communication_data_type": "fp32",
    "optimizer.type": "SGD",
    "scheduler.type": "StepLR",
    "data_types.param_dtype": "bf16",
    "zero_optimization.offload_param.device": "cpu",
    "zero_optimization.offload_optimizer.device": "cpu",
    "zero_optimization.stage3_model_persistence_threshold": 10,
    "activation_checkpointing.contiguous_memory_optimization": True,
    "activation_checkpointing.policy_budget": 5,
    "sequence_parallel_size": 2,
}
"""Values for keys whose type alone does not tell a legal one."""

CONTEXT: dict[str, dict[str, Any]] = {
    "optimizer": {"type": "AdamW"},
    "scheduler": {"type": "WarmupLR"},
    "activation_checkpointing": {"partition_activations": True, "number_checkpoints": 2},
    "tensor_parallel": {"autotp_size": 2},
    "compile": {"deepcompile": True},
}
"""What else a section needs for its keys to count."""


def another(annotation: Any, default: Any) -> Any:
    """A legal value of the type that is not the default."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return next(arg for arg in args if arg not in (default, "auto"))
    if origin is typing.Annotated:
        return another(args[0], default)
    if origin in (typing.Union, types.UnionType):
        kinds = [arg for arg in args if arg is not type(None) and arg != typing.Literal["auto"]]
        return another(kinds[0], default)
    if origin is tuple:
        return [another(args[0], None)]
    if origin is dict:
        return {"x": 1}
    if annotation is bool:
        return not default
    if annotation is int:
        return (default if isinstance(default, int) else 0) + 1
    if annotation is float:
        return (default if isinstance(default, float) else 0.0) / 2 + 0.25
    return "x"


def changed_config(key: Key) -> dict[str, Any]:
    """A config in which the key counts and differs from its default."""
    *parents, name = key.path.split(".")
    config: dict[str, Any] = {"train_batch_size": 8}
    block, model = config, ConfigModel
    for depth, parent in enumerate(parents):
        block = block.setdefault(parent, dict(CONTEXT.get(".".join(parents[: depth + 1]), {})))
        section = next(k.section for k in known_keys(model) if k.path == parent)
        assert section is not None
        model = typing.cast("type[ConfigModel]", section)
        if "enabled" in model.model_fields and (name != "enabled" or depth < len(parents) - 1):
            block["enabled"] = True
    if key.path.startswith("zero_optimization.offload") or name.startswith("stage3_"):
        config["zero_optimization"]["stage"] = 3
    if key.path.endswith("param_dtype"):
        config["bf16"] = {"enabled": True}
    if key.path == "communication_data_type":
        config["bf16"] = {"enabled": True}
    default = None if key.field.is_required() else key.field.get_default(call_default_factory=True)
    block[name] = CHANGED[key.path] if key.path in CHANGED else another(key.field.annotation, default)
    if name in ("data_parallel_size", "train_batch_size"):
        config["train_batch_size"] = 16
    return config


def resolved_values(config: dict[str, Any]) -> dict[str, Any]:
    return dict(resolve(config, dp_world_size=2).values())


def without(config: dict[str, Any], path: str) -> dict[str, Any]:
    """The same config without the key."""
    name, _, rest = path.partition(".")
    if not rest:
        return {"train_batch_size": 8} if name == "train_batch_size" else {k: v for k, v in config.items() if k != name}
    return {**config, name: without(config[name], rest)}


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.path)
def test_changing_a_key_is_never_without_consequence(key: Key, caplog: pytest.LogCaptureFixture) -> None:
    entry = support_of(key.path)
    config = changed_config(key)
    if entry.status == "unsupported":
        with pytest.raises(DeepSpeedConfigError, match="not supported yet") as caught:
            resolve(config, dp_world_size=2)
        assert key.path.partition(".")[0] in str(caught.value)
        assert entry.note in str(caught.value)
        return
    with caplog.at_level(logging.INFO, logger="DeepSpeed"):
        after = resolved_values(config)
    if entry.status == "no-op":
        assert key.path in caplog.text and entry.note in caplog.text
    elif key.path in ("optimizer.type", "scheduler.type"):
        section = key.path.partition(".")[0]
        assert after[key.path] != resolved_values({"train_batch_size": 8}).get(section)
    else:
        before = resolved_values(without(config, key.path))
        assert after[key.path] != before.get(key.path), f"{key.path} changes nothing in the resolved config"


def test_the_table_has_no_entry_for_keys_that_do_not_exist() -> None:
    paths = {key.path for key in known_keys(ConfigModel)}
    for entry in SUPPORT:
        assert entry.removesuffix(".*") in paths, entry
        if entry.endswith(".*"):
            assert any(path.startswith(entry.removesuffix("*")) for path in paths), entry


def test_every_no_op_and_refusal_has_a_reason() -> None:
    for path, entry in SUPPORT.items():
        assert entry.status == "works" or entry.note, path
    assert ACCEPTED_AND_IGNORED["aio.thread_count"]
    assert all(support_of(path.removesuffix(".*")).status == "no-op" for path in ACCEPTED_AND_IGNORED)


def test_a_gap_is_noticed() -> None:
    with pytest.raises(KeyError, match="no entry in the support table"):
        support_of("brand_new.key")


def test_every_key_and_section_is_documented() -> None:
    for key in known_keys(ConfigModel):
        assert field_docs(key.owner)[key.path.rpartition(".")[2]], key.path
        assert key.section is None or (key.section.__doc__ and key.section.__doc__ != Section.__doc__), key.path
