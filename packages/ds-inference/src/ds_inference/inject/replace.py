"""Upstream's verbs of injection, over `inject` and `revert`.

Upstream builds new layers from policies; here the model's type decides, and its modules stay. `policies` lists what is
known, for looking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_inference.checkpoints import load_into
from ds_inference.config import DeepSpeedInferenceConfig, resolve_config
from ds_inference.decoder import FAMILIES
from ds_inference.errors import ModelError
from ds_inference.inject.encoder import ENCODERS
from ds_inference.inject.injection import inject, inject_parts, injection_of
from ds_inference.quantization import spec_of_config

__all__ = ["InjectionPolicy", "generic_injection", "policies", "replace_transformer_layer", "revert_transformer_layer"]


@dataclass(frozen=True)
class InjectionPolicy:
    """A model type that injection knows: a causal language model ("decoder") or an encoder of BERT's kind."""

    model_type: str
    kind: str


policies = (
    *(InjectionPolicy(name, "decoder") for name in FAMILIES),
    *(InjectionPolicy(name, "encoder") for name in ENCODERS),
)


def replace_transformer_layer(
    orig_layer_impl: type[nn.Module] | None,
    model: nn.Module,
    checkpoint_dict: Any,
    config: DeepSpeedInferenceConfig | dict[str, Any] | None,
    model_config: Any,
) -> nn.Module:
    """Inject kernels into a model of a known type, in place.

    Args:
        orig_layer_impl: the class of the layers to replace, of which the model must have some; None: whichever.
        model: a model of transformers.
        checkpoint_dict: what `checkpoint` of `init_inference` takes, loaded first; None: the weights are there.
        config: of inference; `dtype` is not applied here, int8 and `quant` quantise.
        model_config: None, or the model's own configuration.

    Returns:
        The model, the same object.

    Raises:
        ModelError: no such layers, another configuration, or as `init_inference`.
    """
    resolved = resolve_config(config)
    if orig_layer_impl is not None and not any(isinstance(module, orig_layer_impl) for module in model.modules()):
        raise ModelError(f"{type(model).__name__} has no {orig_layer_impl.__name__}; give None, or a class that it has")
    own = getattr(model, "config", None)
    if model_config is not None and own is not None and model_config != own:
        raise ModelError("model_config is another one than model.config; build the model with it, and give None here")
    if checkpoint_dict is not None:
        load_into(model, checkpoint_dict, base_dir=resolved.base_dir)
    inject(model, spec_of_config(resolved))
    return model


def revert_transformer_layer(
    orig_layer_impl: type[nn.Module] | None, model: nn.Module, config: Any = None, preln: bool = False
) -> nn.Module:
    """Take injected kernels out; the model has its own modules and, to the bit, its own weights again.

    Only `model` matters: the other arguments are upstream's. ModelError when nothing is injected.
    """
    injection = injection_of(model)
    if injection is None:
        raise ModelError(f"{type(model).__name__} has no injected kernels to take out; inject them first")
    injection.revert()
    return model


def generic_injection(
    module: nn.Module, dtype: torch.dtype | None = None, enable_cuda_graph: bool = True
) -> dict[str, list[str]]:
    """Put kernels into whatever is known inside of any module (pipelines of several models), and leave the rest.

    `dtype` casts it first; `enable_cuda_graph` has no effect. Returns kernel -> the modules that have it; `revert`
    takes them out.
    """
    if dtype is not None:
        module.to(dtype)
    return dict(inject_parts(module).replaced)
