"""From what the user gave to the one frozen config that everything else reads.

    load (source) -> canonical keys (normalize) -> arguments -> check each key (models) -> check together (rules) ->
    derive (batch, dtypes)

A `ResolvedConfig` has no open questions: batch sizes are numbers, derived values are filled in, and each value knows
where it came from. The number of data-parallel ranks is an argument; nothing here asks torch.distributed or the
environment.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from deepspeed.config.batch import BATCH_KEYS, Batch, solve_batch
from deepspeed.config.enforce import ignored_keys
from deepspeed.config.keys import close_key, known_keys
from deepspeed.config.model import ConfigModel
from deepspeed.config.normalize import Normalized, normalize
from deepspeed.config.problems import config_error, unknown_key
from deepspeed.config.resolved import ResolvedConfig
from deepspeed.config.rules import check, ignored_placements, model_dtype
from deepspeed.config.source import ConfigSource, LoadedConfig, choose_config, load_config
from deepspeed.errors import ConfigConflictError, DeepSpeedConfigError
from ds_comm.log import get_logger, log_dist

__all__ = ["parse_config", "resolve"]

_LOGGER_NAME = "DeepSpeed"


def parse_config(config: ConfigSource) -> ConfigModel:
    """The checked config of any input form, before ranks and devices are known. `zero.Init` and tools read this.

    Raises DeepSpeedConfigError for unknown keys and bad values (all of them in one text).
    """
    loaded = load_config(config)
    normalized = normalize(loaded.raw)
    _unknown_top_level(normalized, loaded.origin)
    return _validate(normalized.data, loaded.origin)


def resolve(
    config: ConfigSource | None,
    *,
    dp_world_size: int,
    device_type: str = "cpu",
    args: Any = None,
    config_params: ConfigSource | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> ResolvedConfig:
    """Resolve `config` for a known number of data-parallel ranks.

    Args:
        config: dict, path of a JSON file, or (base64 of) JSON text; None when `config_params` or
        `args.deepspeed_config` has it. dp_world_size: data-parallel ranks, at least 1.
        device_type: where the model lives ("cpu", "cuda", ...); some placements exist on one kind of host only.
        args: parsed command line; `args.deepspeed_config` is a config path.
        config_params: upstream's other name of `config`.
        arguments: values that the program sets itself, by dotted key; they fill in what the config leaves open.

    Returns the frozen config. Warnings (deprecated and unknown keys) and one line on ignored keys are logged on rank 0.
    Raises DeepSpeedConfigError, or ConfigConflictError for values that contradict each other.
    """
    ranks = _rank_count(dp_world_size)
    source, name = choose_config(config, args, config_params)
    loaded = load_config(source, name)
    normalized = normalize(loaded.raw)
    warnings = [*normalized.notes, *_unknown_top_level(normalized, loaded.origin)]
    argued = _fill_in(normalized, arguments or {}, loaded.origin)
    model = _validate(normalized.data, loaded.origin)
    check(model, loaded.origin, device_type)
    sources = _sources(model, normalized, loaded, argued)
    batch = solve_batch(
        model.train_batch_size,
        model.train_micro_batch_size_per_gpu,
        model.gradient_accumulation_steps,
        ranks,
        sources,
    )
    if model.data_parallel_size not in (None, ranks):
        raise ConfigConflictError(
            f"data_parallel_size is {model.data_parallel_size} ({sources['data_parallel_size']}), but there are "
            f"{ranks} data-parallel ranks; "
            "remove the key, or start as many ranks"
        )
    resolved = _derive(model, batch, sources, loaded, ranks)
    ignored = (*ignored_keys(model), *ignored_placements(model))
    _log(warnings, ignored, loaded.origin)
    return resolved


def _rank_count(dp_world_size: float) -> int:
    if isinstance(dp_world_size, bool) or dp_world_size != int(dp_world_size) or dp_world_size < 1:
        raise ConfigConflictError(
            f"the number of data-parallel ranks is {dp_world_size!r}, but it must be a whole number of at least 1: "
            "the world size must be divisible by the ranks that share one model"
        )
    return int(dp_world_size)


def _validate(data: Mapping[str, Any], origin: str) -> ConfigModel:
    try:
        return ConfigModel.model_validate(
            {key: value for key, value in data.items() if key in ConfigModel.model_fields}
        )
    except ValidationError as error:
        raise config_error(error, ConfigModel, origin) from None


def _unknown_top_level(normalized: Normalized, origin: str) -> list[str]:
    """Warnings for foreign top-level keys, which clients send; an error for those that look like a misspelt one of
    ours. `x-` keys and the `$schema` of editors pass.
    """
    errors, warnings = [], []
    for name, value in normalized.data.items():
        if name in ConfigModel.model_fields or name == "$schema" or name.startswith("x-"):
            continue
        if close_key(name, ConfigModel, cutoff=0.8) is not None:
            errors.append(unknown_key(name, value, ConfigModel, ConfigModel))
            continue
        homes = [key.path for key in known_keys(ConfigModel) if key.path.endswith(f".{name}")]
        hint = f"did you mean {homes[0]}?" if homes else 'name it "x-..." to pass it silently'
        warnings.append(f"{name}: unknown top-level key of the DeepSpeed config ({origin}), ignored; {hint}")
    if errors:
        raise DeepSpeedConfigError("; ".join(errors) + f" ({origin})")
    return warnings


def _fill_in(normalized: Normalized, arguments: Mapping[str, Any], origin: str) -> set[str]:
    """Write the program's own values where the config has none. ConfigConflictError where it has another one."""
    for path, value in arguments.items():
        block = normalized.data
        *parents, name = path.split(".")
        for parent in parents:
            block = block.setdefault(parent, {})
        if name in block and block[name] != value:
            raise ConfigConflictError(
                f"{path} is {block[name]!r} in the config ({origin}), but the program passes {value!r}; "
                'remove the key from the config, set it to "auto", or make them equal'
            )
        block[name] = value
    return set(arguments)


def _sources(model: ConfigModel, normalized: Normalized, loaded: LoadedConfig, argued: set[str]) -> dict[str, str]:
    """Where the value of every key that is not derived came from."""
    found: dict[str, str] = {}
    for key in known_keys(ConfigModel):
        path = key.path
        if key.section is not None:
            continue
        if path in argued:
            found[path] = "argument"
        elif _has(normalized.data, path):
            found[path] = f"{loaded.origin}: {normalized.as_written(path)}"
        elif path in normalized.auto:
            found[path] = f'default ({loaded.origin} says "auto")'
        else:
            found[path] = "default"
    return found


def _has(data: Any, path: str) -> bool:
    for name in path.split("."):
        if not isinstance(data, Mapping) or name not in data:
            return False
        data = data[name]
    return True


def _derive(
    model: ConfigModel, batch: Batch, sources: dict[str, str], loaded: LoadedConfig, ranks: int
) -> ResolvedConfig:
    """Fill in what follows from other values, and note it in `sources`."""
    dtype = model_dtype(model)
    values: dict[str, Any] = {name: getattr(model, name) for name in ConfigModel.model_fields}
    values |= {key: getattr(batch, key) for key in BATCH_KEYS}
    sources |= batch.sources
    if model.communication_data_type is None:
        values["communication_data_type"] = dtype
        sources["communication_data_type"] = "derived: the model dtype"
    if model.data_types.grad_accum_dtype is None:
        values["data_types"] = model.data_types.model_copy(update={"grad_accum_dtype": dtype})
        sources["data_types.grad_accum_dtype"] = "derived: the model dtype"
    if model.zero_optimization.overlap_comm is None:
        values["zero_optimization"] = model.zero_optimization.model_copy(update={"overlap_comm": True})
        sources["zero_optimization.overlap_comm"] = "derived: overlap never changes results"
    return ResolvedConfig(**values, dp_world_size=ranks, model_dtype=dtype).with_context(
        loaded.raw, loaded.origin, sources
    )


def _log(warnings: list[str], ignored: tuple[tuple[str, str], ...], origin: str) -> None:
    logger = get_logger(_LOGGER_NAME)
    for text in warnings:
        log_dist(text, level=logging.WARNING, logger=logger)
    if ignored:
        text = "; ".join(f"{path} ({reason})" for path, reason in ignored)
        log_dist(f"accepted and ignored in the DeepSpeed config ({origin}): {text}", level=logging.INFO, logger=logger)
