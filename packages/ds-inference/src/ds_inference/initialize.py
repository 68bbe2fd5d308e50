"""`init_inference`: the verb."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ds_inference.config import DeepSpeedInferenceConfig, InferenceConfigSource, resolve_config
from ds_inference.engine import InferenceEngine
from ds_inference.quantization import QuantizationSpec

__all__ = ["init_inference"]


def init_inference(
    model: nn.Module,
    config: InferenceConfigSource | DeepSpeedInferenceConfig = None,
    *,
    quantization: QuantizationSpec | str | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> InferenceEngine:
    """Make a model answer faster: an engine that is called, and generates, as the model does.

    Args:
        model: any torch module; changed in place. What is only known for models of transformers (injected kernels,
            tensor parallelism, checkpoints by name) is refused for others when it is asked for.
        config: nothing, a dict, or the path of a JSON file, with the keys of `DeepSpeedInferenceConfig`.
        quantization: "int8", "int4", a mapping or a `QuantizationSpec`: weight-only quantisation of linear layers; in
            place of the `quant` section.
        **kwargs: the same keys; they are laid over `config`.

    Returns:
        InferenceEngine.

    Raises:
        ConfigError (a ValueError): an unknown key, a bad value, a key with two different values, something that is
            not supported.
        ModelError (a ValueError): the model cannot be injected, split or quantised as asked; it is as it was.
        CheckpointError (an OSError): a checkpoint that is missing, incomplete or broken.
        TypeError: a model that is no module; a dtype or a configuration of a type that cannot be one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"init_inference: model is a {type(model).__name__}; expected a torch module, such as "
            "AutoModelForCausalLM.from_pretrained(...) gives"
        )
    return InferenceEngine(model, resolve_config(config, **kwargs), quantization)
