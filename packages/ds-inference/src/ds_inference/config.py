"""Configuration of `init_inference`: upstream's keys, closed, checked and frozen; and the four ways of giving it.

`DeepSpeedInferenceConfig` is the model. `resolve_config` takes what a script passes: nothing; a dict, the path of a
JSON file or a ready config; keywords; or both. Keys have two spellings (an alias beside the name) and old ones have
moved (`mp_size` is `tensor_parallel.tp_size`): all are brought to one form first, so that the same key given twice is
noticed however it is spelt. Keywords are laid over the config, section by section; the same key with two different
values is a ConfigError. The value "auto" means: as if the key were not there.

Invariants: an unknown key is an error that names its full path and the nearest known one; a key that is accepted is
held under its name, validated. What a value does is the engine's matter.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ds_inference.errors import ConfigError

__all__ = [
    "ActivationQuantConfig",
    "DeepSpeedInferenceConfig",
    "DeepSpeedMoEConfig",
    "DeepSpeedTPConfig",
    "InferenceCheckpointConfig",
    "InferenceConfigSource",
    "QKVQuantConfig",
    "QuantizationConfig",
    "WeightQuantConfig",
    "default_inference_config",
    "resolve_config",
]

InferenceConfigSource = Mapping[str, Any] | str | PathLike[str] | None

_DTYPES = {
    torch.float16: ("fp16", "float16", "half", "torch.float16", "torch.half"),
    torch.bfloat16: ("bf16", "bfloat16", "bfloat", "torch.bfloat16"),
    torch.float32: ("fp32", "float32", "float", "torch.float32", "torch.float"),
    torch.int8: ("int8", "torch.int8"),
}
_SPELLINGS = {spelling: dtype for dtype, spellings in _DTYPES.items() for spelling in spellings}
# Old keys at the top, and the section and key that they have become.
_MOVED = {
    "mp_size": ("tensor_parallel", "tp_size"),
    "mpu": ("tensor_parallel", "mpu"),
    "ep_size": ("moe", "ep_size"),
    "ep_group": ("moe", "ep_group"),
    "expert_group": ("moe", "ep_group"),
    "ep_mp_group": ("moe", "ep_mp_group"),
    "expert_mp_group": ("moe", "ep_mp_group"),
    "moe_experts": ("moe", "moe_experts"),
    "moe_type": ("moe", "type"),
}


def _dtype(value: object) -> torch.dtype:
    if isinstance(value, torch.dtype):
        if value in _DTYPES:
            return value
        raise ValueError(f"{value} is not supported; expected one of {', '.join(map(str, _DTYPES))}")
    if not isinstance(value, str):
        raise TypeError(f"dtype is {value!r}, a {type(value).__name__}; expected a torch.dtype or its name")
    found = _SPELLINGS.get(value.lower())
    if found is None:
        raise ValueError(f"{value!r} is no dtype that inference knows; expected one of {', '.join(sorted(_SPELLINGS))}")
    return found


def _experts(value: object) -> object:
    return [value] if isinstance(value, int) else value


def _aliases(section: type[BaseModel]) -> dict[str, str]:
    """Every accepted spelling of a section's keys -> the field."""
    spellings = {name: name for name in section.model_fields}
    return spellings | {field.alias: name for name, field in section.model_fields.items() if field.alias}


def _is_auto(value: object) -> bool:
    return isinstance(value, str) and value == "auto"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        """Say which key was meant, and let "auto" be the default."""
        if not isinstance(data, Mapping):
            return data
        aliases = _aliases(cls)
        for key in data:
            if key not in aliases:
                near = difflib.get_close_matches(str(key), aliases, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(set(aliases.values())))}"
                raise ValueError(f"unknown key {key!r}; {hint}")
        return {key: value for key, value in data.items() if key == "replace_method" or not _is_auto(value)}


class DeepSpeedTPConfig(_Section):
    """Tensor parallelism."""

    enabled: bool = True
    tp_size: int = Field(default=1, ge=1)
    """Ranks that share each layer."""
    tp_grain_size: int = Field(default=64, ge=1)
    """Features are split at multiples of this."""
    mpu: Any = None
    """An object with upstream's model-parallel getters, whose group is used."""
    tp_group: Any = None
    """A process group to use."""


class DeepSpeedMoEConfig(_Section):
    """Mixtures of experts."""

    enabled: bool = True
    ep_size: int = Field(default=1, ge=1)
    """Ranks that share the experts."""
    moe_experts: Annotated[list[int], BeforeValidator(_experts)] = Field(default=[1], alias="num_experts")
    type: Literal["standard", "residual"] = "standard"
    ep_mp_group: Any = None
    ep_group: Any = Field(default=None, alias="expert_group")


class BaseQuantConfig(_Section):
    """What weights and activations have in common."""

    enabled: bool = True
    num_bits: int = Field(default=8, ge=2, le=8)
    q_type: Literal["symmetric", "asymmetric"] = "symmetric"
    q_groups: int = Field(default=1, ge=1)
    """Groups of elements with a scale of their own, per tensor."""


class ActivationQuantConfig(BaseQuantConfig):
    """Quantisation of activations."""


class WeightQuantConfig(BaseQuantConfig):
    """Quantisation of weights."""

    quantized_initialization: dict[str, Any] = {}
    post_init_quant: dict[str, Any] = {}


class QKVQuantConfig(_Section):
    """Quantisation of query, key and value projections."""

    enabled: bool = True


class QuantizationConfig(_Section):
    enabled: bool = True
    activation: ActivationQuantConfig = ActivationQuantConfig()
    weight: WeightQuantConfig = WeightQuantConfig()
    qkv: QKVQuantConfig = QKVQuantConfig()


class InferenceCheckpointConfig(_Section):
    """Where checkpoints are read and written."""

    checkpoint_dir: str | None = None
    save_mp_checkpoint_path: str | None = None
    base_dir: str | None = None


class DeepSpeedInferenceConfig(_Section):
    """All keys of `init_inference`; both a key's name and its alias are accepted."""

    replace_with_kernel_inject: bool = Field(default=False, alias="kernel_inject")
    """Swap known layers for fused ones."""
    dtype: Annotated[torch.dtype, BeforeValidator(_dtype)] = torch.float16
    """torch.float16, bfloat16, float32 or int8, or a name: fp16, half, bf16, bfloat, fp32, int8 ..."""
    tensor_parallel: DeepSpeedTPConfig = Field(default=DeepSpeedTPConfig(), alias="tp")
    enable_cuda_graph: bool = False
    """Record the forward pass as a CUDA graph."""
    use_triton: bool = False
    """Triton kernels; ValueError when triton is not installed."""
    triton_autotune: bool = False
    zero: dict[str, Any] = {}
    """A `zero_optimization` section; ds_zero checks it where it is used."""
    triangular_masking: bool = Field(default=True, alias="tm")
    """Attention is causal."""
    moe: DeepSpeedMoEConfig = DeepSpeedMoEConfig()
    """A section, or a bool: its `enabled`."""
    keep_module_on_host: bool = False
    """Do not move the weights to the device."""
    quant: QuantizationConfig = QuantizationConfig()
    checkpoint: str | dict[str, Any] | None = None
    """A folder, a description file, or the description itself."""
    base_dir: str = ""
    """What paths in the checkpoint's description are relative to."""
    set_empty_params: bool = False
    """The model's weights are still empty; they come from the checkpoint."""
    save_mp_checkpoint_path: str | None = None
    checkpoint_config: InferenceCheckpointConfig = Field(default=InferenceCheckpointConfig(), alias="ckpt_config")
    return_tuple: bool = True
    """Injected layers return a tuple."""
    training_mp_size: int = Field(default=1, ge=1)
    """Tensor-parallel ranks that the checkpoint was trained with."""
    replace_method: str = "auto"
    """Deprecated; has no effect."""
    injection_policy: dict[Any, Any] | None = Field(default=None, alias="injection_dict")
    """{Module class: names of its row-parallel linear layers}."""
    injection_policy_tuple: tuple[Any, ...] | None = None
    config: Any = Field(default=None, alias="args")
    """Has no effect."""
    max_out_tokens: int = Field(default=1024, ge=1, alias="max_tokens")
    """Tokens, prompt included, that the cache has room for."""
    min_out_tokens: int = Field(default=1, ge=1, alias="min_tokens")
    transposed_mode: bool = False

    @model_validator(mode="before")
    @classmethod
    def _moved_keys(cls, data: Any) -> Any:
        return _normalized(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _consistent(self) -> DeepSpeedInferenceConfig:
        if self.use_triton and importlib.util.find_spec("triton") is None:
            raise ValueError("use_triton is on, but triton is not installed; install it or leave the key out")
        if self.min_out_tokens > self.max_out_tokens:
            raise ValueError(
                f"min_out_tokens is {self.min_out_tokens}, max_out_tokens {self.max_out_tokens}; expected at most that"
            )
        return self


def default_inference_config() -> dict[str, Any]:
    """All keys with their defaults, as a dict that `init_inference` takes."""
    return DeepSpeedInferenceConfig().model_dump()


def resolve_config(
    config: InferenceConfigSource | DeepSpeedInferenceConfig = None, **keywords: Any
) -> DeepSpeedInferenceConfig:
    """The configuration from `config` (dict, path of a JSON file, config, or None) and keywords laid over it.

    ConfigError (a ValueError): a file that cannot be read, an unknown key, a bad value, or a key to which config and
    keywords give different values. TypeError for a dtype or a config of a type that cannot be one.
    """
    if isinstance(config, DeepSpeedInferenceConfig):
        base, origin = _load(config.model_dump(exclude_unset=True))
    else:
        base, origin = _load(config)
    try:
        merged = _merged(_normalized(base), _normalized(keywords), origin)
        return DeepSpeedInferenceConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_told(error, origin)) from None


def _load(config: InferenceConfigSource) -> tuple[Mapping[str, Any], str]:
    if config is None:
        return {}, "keywords"
    if isinstance(config, Mapping):
        return config, "config"
    if not isinstance(config, (str, PathLike)):
        raise TypeError(f"config is a {type(config).__name__}; expected a dict, the path of a JSON file, or None")
    path = fspath(config)
    try:
        with open(path, encoding="utf-8") as file:
            loaded = json.load(file, object_pairs_hook=_without_duplicates)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"inference config {path!r} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"inference config {path!r} holds a {type(loaded).__name__}; expected an object of keys")
    return loaded, path


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ConfigError(f"key {key!r} is there twice in one section; keep one")
        seen[key] = value
    return seen


def _normalized(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same with every known key under its field's name, old keys moved, sections as dicts, no "auto"."""
    renamed = _renamed(data, DeepSpeedInferenceConfig, _MOVED)
    if isinstance(renamed.get("moe"), bool):
        renamed["moe"] = {"enabled": renamed["moe"]}
    for key in [key for key in data if key in _MOVED]:
        section, name = _MOVED[key]
        logging.getLogger("ds_inference").warning("%s is deprecated; give %s.%s", key, section, name)
        inside = renamed.get(section, {})
        if not isinstance(inside, Mapping):
            raise ConfigError(f"{section} is {inside!r}; expected a section of keys")
        inside = _renamed(inside, _SECTIONS[section], {})
        if name in inside and inside[name] != data[key]:
            raise ConfigError(
                f"{key} is {data[key]!r}, but {section}.{name} is {inside[name]!r}; they are the same: give the second"
            )
        renamed[section] = {**inside, name: data[key]}
    return renamed


def _renamed(data: Mapping[str, Any], section: type[BaseModel], moved: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    aliases, found = _aliases(section), dict[str, Any]()
    for key, value in data.items():
        if key in moved:
            continue
        name = aliases.get(key, key)
        if _is_auto(value) and name != "replace_method":
            continue
        inner = _SECTIONS.get(name)
        if isinstance(value, BaseModel):
            value = value.model_dump(exclude_unset=True)
        if inner is not None and isinstance(value, Mapping):
            value = _renamed(value, inner, {})
        if name in found and found[name] != value:
            raise ConfigError(f"{key} is {value!r}, but {name}, the same key, is {found[name]!r}; give one")
        found[name] = value
    return found


_SECTIONS: dict[str, type[BaseModel]] = {
    "tensor_parallel": DeepSpeedTPConfig,
    "moe": DeepSpeedMoEConfig,
    "quant": QuantizationConfig,
    "activation": ActivationQuantConfig,
    "weight": WeightQuantConfig,
    "qkv": QKVQuantConfig,
    "checkpoint_config": InferenceCheckpointConfig,
}


def _merged(base: Mapping[str, Any], over: Mapping[str, Any], origin: str, path: str = "") -> dict[str, Any]:
    """`over` laid on `base`; ConfigError where both have a value and they differ."""
    merged = dict(base)
    for key, value in over.items():
        if key in merged and key in _SECTIONS and isinstance(value, Mapping) and isinstance(merged[key], Mapping):
            value = _merged(merged[key], value, origin, f"{path}{key}.")
        elif key in merged and not _same(key, merged[key], value):
            raise ConfigError(
                f"{path}{key} is {merged[key]!r} in {origin} and {value!r} as a keyword; give one, or the same twice"
            )
        merged[key] = value
    return merged


def _same(key: str, one: object, other: object) -> bool:
    return _dtype(one) == _dtype(other) if key == "dtype" else bool(one == other)


def _told(error: ValidationError, origin: str) -> str:
    """All problems, one a line, each with its key's full path."""
    lines = []
    for problem in error.errors():
        path = ".".join(map(str, problem["loc"]))
        text = problem["msg"].removeprefix("Value error, ")
        shown = "" if problem["type"] == "value_error" else f" (it is {problem['input']!r})"
        lines.append(f"{path}: {text}{shown}" if path else text)
    return f"inference configuration ({origin}): " + "; ".join(lines)
