"""`InferenceEngine`: a module that answers, with the conveniences of upstream's engine.

It is called as the module is and gives what the module gives; attributes that it has not are the module's. With
injected kernels, `generate` of a causal language model runs over the decoder and its static cache, and a forward pass
without gradients that asks for logits alone goes through the decoder too.

Vocabulary: the *prompt* is what `generate` is given, per row, padding not counted.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ds_comm.log import get_logger
from ds_inference.config import DeepSpeedInferenceConfig
from ds_inference.decoder import Batch, Decoder, KVCache
from ds_inference.errors import ModelError
from ds_inference.generate_call import check_request, other_loop, with_loop
from ds_inference.generation import DecodeLoop
from ds_inference.inject import Injection
from ds_inference.preparation import check_supported, prepare
from ds_inference.quantization import QuantizationSpec
from ds_inference.timing import PassTimer

__all__ = ["InferenceEngine"]

logger = get_logger(__name__)


class InferenceEngine(nn.Module):
    """Made by `init_inference`.

    Attributes:
        module: the model, cast, split, injected or quantised as configured.
        inference_config: the configuration.
        injection: what was injected; None: nothing.
        tensor_parallel: what of the model this rank has; None: all of it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DeepSpeedInferenceConfig,
        quantization: QuantizationSpec | str | Mapping[str, Any] | None = None,
    ) -> None:
        """Errors are those of `init_inference`."""
        super().__init__()
        check_supported(config)
        self.inference_config = config
        self.injection: Injection | None = None
        self.model_profile_enabled = False
        self._timer = PassTimer()
        self._loop: DecodeLoop | None = None
        self._warned: set[str] = set()
        with torch.inference_mode(False):
            prepared = prepare(model, config, QuantizationSpec.parse(quantization))
        self.injection, self.tensor_parallel = prepared.injection, prepared.applied
        self.module = model.eval()
        self.training = False
        if self.decoder is not None:
            self._loop = DecodeLoop(self.decoder, config.max_out_tokens, config.min_out_tokens)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None:
                raise
            return getattr(module, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loop": None}  # a copy of the module has no kernels, and so a copy of the engine none

    @property
    def decoder(self) -> Decoder | None:
        """The model as a decoder; None without injected kernels, or for what generates nothing."""
        return None if self.injection is None else self.injection.decoder

    @property
    def dtype(self) -> torch.dtype:
        """Of the module's floating parameters."""
        floats = (parameter.dtype for parameter in self.module.parameters() if parameter.is_floating_point())
        return next(floats, self.inference_config.dtype)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """What the module gives for these arguments."""
        if self.model_profile_enabled:
            with self._timer.measure():
                return self._forward(inputs, kwargs)
        return self._forward(inputs, kwargs)

    def _forward(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        decoder = self.decoder
        if decoder is not None and not torch.is_grad_enabled():
            tokens = _plain_prompt(self.module, inputs, kwargs)
            if tokens is not None:
                with torch.inference_mode(False), torch.no_grad():
                    return self._logits_of(decoder, tokens)
        return self.module(*inputs, **kwargs)

    def _logits_of(self, decoder: Decoder, tokens: Tensor) -> Any:
        """The module's output object with the logits of all tokens [rows, columns]."""
        rows, columns = tokens.shape
        device = decoder.device
        places = torch.arange(rows * columns, device=device)
        batch = Batch(
            tokens=tokens.to(device).flatten(),
            positions=places % columns,
            slots=places,
            block_tables=torch.arange(rows, dtype=torch.int32, device=device).unsqueeze(1),
            context_lens=torch.full((rows,), columns, dtype=torch.int32, device=device),
            cu_seqlens=torch.arange(rows + 1, dtype=torch.int32, device=device) * columns,
            logits_at=None,
            max_seqlen=columns,
        )
        logits = decoder.forward(batch, KVCache(decoder, rows, columns))
        made = importlib.import_module("transformers.modeling_outputs").CausalLMOutputWithPast
        return made(logits=logits.view(rows, columns, -1).to(decoder.dtype))

    def generate(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's `generate`, by the injected kernels where there are any.

        The arguments and the result are transformers'. What the engine's own loop does not do (assisted or contrastive
        decoding, constraints, given caches or embeddings) goes through the module's.

        Raises:
            NotImplementedError: num_beams above 1.
            RequestError (a ValueError): an empty prompt, or a mask of another shape.
            CapacityError (a RuntimeError): a prompt longer than max_out_tokens; with injected kernels also prompt and
                new tokens together, or more than the model has positions for.
            AttributeError: the module generates nothing.
        """
        generate: Any = self.module.generate
        check_request(self.module, inputs, kwargs, self.inference_config.max_out_tokens)
        loop = self._loop
        if loop is None or self.decoder is None or not self._is_ours(generate, kwargs):
            return self._timed_generate(generate, inputs, kwargs)
        measure = self._timer.measure if self.model_profile_enabled else nullcontext
        return generate(*inputs, **with_loop(kwargs, loop, measure))

    def _is_ours(self, generate: Any, kwargs: dict[str, Any]) -> bool:
        """Whether our loop does what is asked; if not, says so once."""
        reason = other_loop(self.module, generate, kwargs)
        if reason is not None and reason not in self._warned:
            self._warned.add(reason)
            logger.warning("generate: %s needs the module's own loop, without the fused decoder", reason)
        return reason is None

    def _timed_generate(self, generate: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.model_profile_enabled:
            return generate(*inputs, **kwargs)
        inner = self.module.forward
        own = "forward" in vars(self.module)

        def timed(*args: Any, **given: Any) -> Any:
            with self._timer.measure():
                return inner(*args, **given)

        timed.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]
        self.module.forward = timed
        try:
            return generate(*inputs, **kwargs)
        finally:
            if own:
                self.module.forward = inner
            else:
                del self.module.forward

    def profile_model_time(self, use_cuda_events: bool = True) -> None:
        """Measure every pass from now on; `use_cuda_events` has no effect: the device is waited for."""
        self.model_profile_enabled = True

    def model_times(self) -> list[float]:
        """Seconds of each pass since the last call; RuntimeError when `profile_model_time` was not called."""
        if not self.model_profile_enabled:
            raise RuntimeError("model_times: nothing is measured yet; call profile_model_time() first")
        return self._timer.take()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile of the module, in place; ModelError with injected kernels, which are compiled already."""
        if self.injection is not None:
            raise ModelError("compile: kernels are injected, which are compiled already; leave one of the two out")
        self.module.compile(*args, **kwargs)

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called."""
        return getattr(self.module, "_compiled_call_impl", None) is not None

    def destroy(self) -> None:
        """Take injected kernels out, let go of the cache; the module is what it was, cast. Twice is no error."""
        if self._loop is not None:
            self._loop.release()
            self._loop = None
        if self.injection is not None:
            self.injection.revert()
            self.injection = None


def _plain_prompt(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Tokens [rows, columns] when nothing but their logits is asked for: no cache, labels, states or padding."""
    given = {key: value for key, value in kwargs.items() if value is not None}
    tokens = inputs[0] if len(inputs) == 1 else given.pop("input_ids", None) if not inputs else None
    mask = given.pop("attention_mask", None)
    cached = given.pop("use_cache", getattr(getattr(module, "config", None), "use_cache", True))
    if given.pop("return_dict", True) is not True or cached or given:
        return None
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or not tokens.numel() or tokens.is_floating_point():
        return None
    return tokens if mask is None or (mask.shape == tokens.shape and bool(mask.all())) else None
