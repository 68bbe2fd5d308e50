"""Workloads from files: a transformers config makes a causal language model on the meta device."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.errors import DeepSpeedConfigError
from deepspeed.planner.plan import Workload

__all__ = ["LONGEST_DEFAULT", "causal_lm"]

LONGEST_DEFAULT = 4096
"""Tokens of a sample where neither the caller nor the model's own limit asks for fewer."""


def causal_lm(
    path: str | os.PathLike[str], *, seq_len: int | None = None, gradient_checkpointing: bool = False
) -> Workload:
    """The language model that a `config.json` (or a folder with one) describes, without weights.

    Args:
        seq_len: tokens per sample; default the model's own limit, at most LONGEST_DEFAULT.
        gradient_checkpointing: as `model.gradient_checkpointing_enable()`.
    Raises:
        DeepSpeedConfigError: no such file, not a transformers config, or transformers is not installed.
    """
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise DeepSpeedConfigError(f"--model {path}: there is no file {file}; expected a config.json or its folder")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DeepSpeedConfigError(f"{file} is not JSON: {error}") from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind is None:
        raise DeepSpeedConfigError(f'{file} has no "model_type"; expected the config.json of a transformers model')
    model = _build(values, kind, file)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    limit = getattr(model.config, "max_position_embeddings", None) or LONGEST_DEFAULT
    tokens = min(limit, LONGEST_DEFAULT) if seq_len is None else seq_len

    def run(fake: nn.Module, micro_batch: int) -> Tensor:
        ids = torch.zeros(micro_batch, tokens, dtype=torch.int64)
        loss: Tensor = fake(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    name = file.parent.name or kind
    return Workload(name, model, run, f"{kind}, {tokens} tokens per sample")


def _build(values: dict[str, Any], kind: str, file: Path) -> Any:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise DeepSpeedConfigError(
            f"planning {file} needs transformers, which is not installed: pip install transformers; or plan any module"
            " with deepspeed.planner.plan_run"
        ) from None
    try:
        config = AutoConfig.for_model(**values)
        with torch.device("meta"):
            auto: Any = AutoModelForCausalLM
            return auto.from_config(config).train()
    except (ValueError, TypeError, AttributeError) as error:
        raise DeepSpeedConfigError(
            f"{file}: transformers cannot make a causal language model of {kind!r}: {error}"
        ) from None
