"""`inject(model)`: put kernels into a model, check that it computes what it did, and take them out again.

An injection is an attribute of the model it was done to, so that whoever has the model can undo it; a copy of the model
has none. Nothing is left behind when the check fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ds_comm.log import get_logger
from ds_inference.decoder import FAMILIES, Decoder, read_decoder
from ds_inference.errors import ModelError
from ds_inference.inject.check import Probe
from ds_inference.inject.encoder import ENCODERS, EncoderLayers, fuse_attentions, has_encoder
from ds_inference.quantization import QuantizationSpec
from ds_kernels import Applied, PatchError, apply_kernels

__all__ = ["Injection", "inject", "inject_parts", "injection_of", "revert"]

logger = get_logger(__name__)

_ATTRIBUTE = "ds_injection"
_KERNELS = ("norm", "mlp", "rope", "attention")
"""Not the loss: it would leave out the logits."""


@dataclass
class Injection:
    """What was put into a model.

    Attributes:
        model: the model, the same object.
        decoder: the whole model as a decoder, for generation; None for what generates nothing.
        replaced: kernel or layer -> the names of the modules that have it.
    """

    model: nn.Module
    decoder: Decoder | None = None
    replaced: dict[str, list[str]] = field(default_factory=dict)
    _applied: Applied | None = field(default=None, repr=False)
    _encoders: list[EncoderLayers] = field(default_factory=list, repr=False)

    def revert(self) -> None:
        """Give the model its own modules and weights back, to the bit. Nothing happens the second time."""
        if self._applied is not None:
            self._applied.undo()
            self._applied = None
        for encoder in reversed(self._encoders):
            encoder.revert()
        self._encoders.clear()
        if self.decoder is not None:
            self.decoder.revert()
            self.decoder = None
        self.replaced.clear()
        if vars(self.model).get(_ATTRIBUTE) is self:
            delattr(self.model, _ATTRIBUTE)

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_injection, ()  # a copy or a pickle of the model has none of it


def _no_injection() -> None:
    """What an injection is in a copy of its model."""


def injection_of(model: nn.Module) -> Injection | None:
    """What is injected into this very object."""
    found = vars(model).get(_ATTRIBUTE)
    return found if isinstance(found, Injection) else None


def inject(model: nn.Module, quantization: QuantizationSpec | None = None) -> Injection:
    """Inject kernels into a causal language model or an encoder of a known family.

    Args:
        model: in eval mode or not; its weights are loaded, of their final dtype and on their final device.
        quantization: how a decoder's weights are held; None: as they are. Quantised layers stay so when the injection
            is taken out: their dense weights are gone.

    Raises:
        ModelError: another family; a model that is not as its family's; one that would compute something else; one
            that is injected already. The model is as it was.
    """
    if injection_of(model) is not None:
        raise ModelError(f"{type(model).__name__} has kernels injected already; revert that first")
    generates = _is_causal_lm(model)
    if not generates and not has_encoder(model):
        raise ModelError(_unknown(model))
    injection = Injection(model)
    probe = Probe(model)
    try:
        if generates:
            injection.decoder = read_decoder(model) if quantization is None else read_decoder(model, quantization)
            injection.replaced["decoder"] = [""]
        else:
            injection._encoders.append(fused := fuse_attentions(model))
            if not fused.names:
                raise ModelError(
                    f"{type(model).__name__} has no attention with plain linear layers for query, key, value"
                )
            injection.replaced["encoder layer"] = fused.names
        if quantization is None:
            _apply_kernels(injection)
        probe.check(model, injection.decoder, quantization)
    except BaseException:
        injection.revert()
        raise
    setattr(model, _ATTRIBUTE, injection)
    logger.info("injected into %s: %s", type(model).__name__, ", ".join(injection.replaced))
    return injection


def inject_parts(module: nn.Module) -> Injection:
    """Inject what is known inside of any module: kernels of ds-kernels' families, attentions of three linear layers.

    ModelError when it is injected already; nothing known in it is no error.
    """
    if injection_of(module) is not None:
        raise ModelError(f"{type(module).__name__} has kernels injected already; revert that first")
    injection = Injection(module)
    fused = fuse_attentions(module)
    if fused.names:
        injection._encoders.append(fused)
        injection.replaced["encoder layer"] = fused.names
    _apply_kernels(injection)
    setattr(module, _ATTRIBUTE, injection)
    return injection


def revert(model: nn.Module) -> bool:
    """Take out what is injected into `model`; whether there was anything."""
    injection = injection_of(model)
    if injection is None:
        return False
    injection.revert()
    return True


def _is_causal_lm(model: nn.Module) -> bool:
    known = getattr(getattr(model, "config", None), "model_type", None) in FAMILIES
    head = getattr(model, "get_output_embeddings", None)
    return known and head is not None and isinstance(head(), nn.Module)


def _apply_kernels(injection: Injection) -> None:
    try:
        applied = apply_kernels(injection.model, only=_KERNELS)
    except PatchError:  # no family that ds-kernels has patches for; the modules stay torch's
        return
    injection._applied = applied
    injection.replaced.update(applied.replaced)


def _unknown(model: nn.Module) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    known: Sequence[str] = (*FAMILIES, *ENCODERS)
    return (
        f"{type(model).__name__} (model type {kind!r}) is not known to kernel injection; known are the causal "
        f"language models and encoders of {', '.join(known)}. Leave replace_with_kernel_inject out for it"
    )
