"""`Rollout`: a training model used for generation, from `begin` to `end`.

    begin     gather every unit, once                      collective where gathering copies (not in shared memory)
    generate  any number of times, of any lengths          communicates nothing: ranks may differ, or generate nothing
    end       drop decoder, cache and copies; release      local

The weights are the trained ones: the decoder's are views of the units' flat buffers. What cannot be a view is copied
when the first `generate` of a rollout reads the model, and given back at its end (`copied_nbytes`): projections whose
parts do not lie one after the other (biases between them), weights kept as [inputs, outputs], and weights with low-rank
adapters, which are fused in the copy. Parameters are never written, so they keep their bits.

Models that the decoder does not know generate by their own `generate`, gathered just the same.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import ds_zero
from deepspeed.config.model_runtime import HybridEngine
from deepspeed.utils.logging import logger
from ds_inference.decoder import Borrowing, Decoder, adapters_of, read_decoder
from ds_inference.errors import CapacityError, ModelError
from ds_inference.generate_call import asked, longest_prompt, other_loop, with_loop
from ds_inference.generation import DecodeLoop
from ds_inference.inject.check import Probe

__all__ = ["Rollout"]

_WHERE = "hybrid_engine.max_out_tokens"


class Rollout:
    """One model's.

    Attributes:
        active: whether the model is gathered.
        gather_seconds, generate_seconds: spent since the last `take_seconds`.
    """

    def __init__(self, model: nn.Module, sharded: ds_zero.ShardedModel, config: HybridEngine) -> None:
        self.active = False
        self.gather_seconds = self.generate_seconds = 0.0
        self._model, self._sharded, self._config = model, sharded, config
        self._own: Callable[..., Any] | None = getattr(model, "generate", None)
        self._can_sync = _can_sync(model)
        self._inner = _causal_model(model)
        self._loop: DecodeLoop | None = None
        self._checked = self._refused = False
        self._last: tuple[int, int] | None = None
        self._told: set[str] = set()
        self._adapters: tuple[Any, ...] = ()

    @property
    def decoder(self) -> Decoder | None:
        """What the present rollout generates with; None before its first `generate`, and for unknown models."""
        return None if self._loop is None else self._loop.decoder

    @property
    def copied_nbytes(self) -> int:
        """Bytes of weights that are there a second time now."""
        return 0 if self.decoder is None else self.decoder.copied_nbytes

    def begin(self) -> None:
        """Gather the model, unless that is done."""
        if not self.active:
            started = time.perf_counter()
            self._sharded.gather()
            self.active = True
            self.gather_seconds += time.perf_counter() - started

    def end(self) -> None:
        """Give back all that generation took. Local; twice is no error."""
        self.forget()
        if self.active:
            self.active = False
            self._sharded.release()

    def forget(self) -> None:
        """Drop the decoder with its copies and its cache; the next `generate` reads the model anew."""
        if self._loop is not None:
            self._loop.release()
            self._loop.decoder.revert()
            self._loop = None

    def release_cache(self) -> None:
        """Free the keys and values."""
        if self._loop is not None:
            self._loop.release()

    def retake_cache(self) -> None:
        """Have a cache of the last size again; nothing before the first `generate`, or without a decoder."""
        if self._loop is not None and self._last is not None:
            with torch.inference_mode(False):
                self._loop.give_back(self._loop.take(*self._last))

    def read(self) -> None:
        """Read the model as a decoder, unless this rollout has done that, or its type has none."""
        if self._loop is None and not self._refused:
            self.begin()
            with torch.inference_mode(False), torch.no_grad():
                decoder = self._read()
            if decoder is not None:
                self._adapters = adapters_of(self._model)
                self._loop = DecodeLoop(decoder, self._config.max_out_tokens, where=_WHERE)

    def _read(self) -> Decoder | None:
        """None for a model that the decoder would compute otherwise, which is said once."""
        try:
            if self._inner is None:
                raise ModelError(f"{type(self._model).__name__} has parameters that are not the language model's")
            decoder = read_decoder(self._inner, borrowing=Borrowing(ignores=self._sharded.owns_hook))
            if not self._checked:
                Probe(self._model).check(self._model, decoder, None)
                self._checked = True
        except ModelError as error:
            self._refused = True
            self._tell(f"the hybrid engine generates by the model's own loop: {error}")
            return None
        if decoder.copied_nbytes:
            self._tell(f"generation holds {decoder.copied_nbytes:,} bytes of weights a second time, until train()")
        return decoder

    def generate(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As the model's `generate`; see `DeepSpeedHybridEngine.generate`."""
        if self._own is None:
            raise AttributeError(
                f"{type(self._model).__name__} has no generate; the hybrid engine is for models of transformers"
            )
        self.begin()
        started = time.perf_counter()
        if kwargs.pop("synced_gpus", None):
            self._tell("synced_gpus has no effect: the model is gathered, and ranks do not wait for each other")
        if self._can_sync:
            kwargs["synced_gpus"] = False  # which transformers would take for granted under ZeRO-3
        with _evaluating(self._model):
            try:
                return self._generate(inputs, kwargs)
            finally:
                if self._config.release_inference_cache:
                    self.release_cache()
                self.generate_seconds += time.perf_counter() - started

    def _generate(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._own is not None
        longest_prompt(inputs, kwargs)  # raises for what is no prompt, whichever loop would get it
        if self._loop is not None and adapters_of(self._model) != self._adapters:
            self.forget()  # such as inside of PEFT's disable_adapter()
        self.read()
        loop = self._loop
        if loop is not None:
            inner: Any = self._inner
            generate = self._own if inner is self._model else inner.generate
            beams = asked(inner, kwargs, "num_beams") or 1
            reason = "num_beams above 1" if beams > 1 else other_loop(inner, generate, kwargs)
            if reason is None:
                found = generate(*inputs, **with_loop(kwargs, loop))
                self._last = loop.kept_size or self._last
                return found
            self._tell(f"generate: {reason} needs the model's own loop, without the fused decoder")
        self._check_length(inputs, kwargs)
        return self._own(*inputs, **kwargs)

    def _check_length(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """CapacityError: the model's own loop is asked for more than max_out_tokens."""
        prompt, limit = longest_prompt(inputs, kwargs), self._config.max_out_tokens
        longest, columns = (0, 0) if prompt is None else prompt
        if getattr(getattr(self._model, "config", None), "is_encoder_decoder", False):
            longest = columns = 0  # the prompt is the encoder's
        new = asked(self._model, kwargs, "max_new_tokens")
        if new is None:
            length = asked(self._model, kwargs, "max_length")
            new = 0 if length is None else max(0, int(length) - columns)
        if longest + int(new) > limit:
            raise CapacityError(
                f"a prompt of {longest} tokens and {new} new ones are {longest + int(new)}, but max_out_tokens is "
                f"{limit}; raise it in {_WHERE}, or ask for fewer tokens"
            )

    def take_seconds(self) -> tuple[float, float]:
        """(gathering, generating) since the last call."""
        taken = self.gather_seconds, self.generate_seconds
        self.gather_seconds = self.generate_seconds = 0.0
        return taken

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning(text)


def _causal_model(model: nn.Module) -> nn.Module | None:
    """The model of transformers in it: itself, or what PEFT wraps; None where the wrapper has parameters of its own."""
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if callable(unwrap) else model
    if not isinstance(inner, nn.Module):
        return None
    held = {id(parameter) for parameter in inner.parameters()}
    return inner if all(id(parameter) in held for parameter in model.parameters()) else None


def _can_sync(model: nn.Module) -> bool:
    """Whether the model's `generate`, or that of a model it hands its keywords on to, has ranks wait for each other."""
    own = getattr(model, "generate", None)
    if own is None:
        return False
    parameters = inspect.signature(own).parameters
    if "synced_gpus" in parameters:
        return True
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    verbs = (verb for verb in (vars(kind).get("generate") for kind in kinds) if callable(verb))
    return hands_on and any("synced_gpus" in inspect.signature(verb).parameters for verb in verbs)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; afterwards each as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
