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
from typing import Any, cast

import torch
from torch import Tensor, nn

from ds_comm.log import get_logger
from ds_inference.config import DeepSpeedInferenceConfig
from ds_inference.decoder import Batch, Decoder, KVCache
from ds_inference.errors import CapacityError, ModelError, RequestError
from ds_inference.generation import DecodeLoop
from ds_inference.inject import Injection
from ds_inference.preparation import check_supported, prepare
from ds_inference.quantization import QuantizationSpec
from ds_inference.timing import PassTimer

__all__ = ["InferenceEngine"]

logger = get_logger(__name__)

_OTHER_MODES = ("assistant_model", "penalty_alpha", "dola_layers", "constraints", "force_words_ids", "custom_generate",
    "prompt_lookup_num_tokens", "inputs_embeds", "past_key_values", "cache_implementation", "output_attentions",
    "output_hidden_states", "synced_gpus", "token_healing", "prefill_chunk_size", "guidance_scale")  # fmt: skip
"""Arguments of `generate` that ask for what our loop does not do."""


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
        self._check_request(inputs, kwargs)
        loop, decoder = self._loop, self.decoder
        if loop is None or decoder is None or not self._is_ours(generate, kwargs):
            return self._timed_generate(generate, inputs, kwargs)
        arguments = dict(kwargs)
        streamer = arguments.get("streamer")
        if arguments.get("stop_strings") is not None:
            _stop_strings_as_criterion(arguments)
        measure = self._timer.measure if self.model_profile_enabled else nullcontext

        def run(
            model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
            **model_kwargs: Any,
        ) -> Any:  # fmt: skip
            if not loop.understands(model_kwargs):
                return type(model)._sample(
                    model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer,
                    **model_kwargs,
                )  # fmt: skip
            return loop.run(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                attention_mask=model_kwargs.get("attention_mask"),
                position_ids=model_kwargs.get("position_ids"),
                streamer=streamer,
                measure=measure,
            )

        return generate(*inputs, **arguments, custom_generate=run)

    def _check_request(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        beams = _setting(self.module, kwargs, "num_beams")
        if beams is not None and beams > 1:
            raise NotImplementedError(
                f"num_beams is {beams}; the engine decodes greedily or by sampling; engine.module.generate does beams"
            )
        tokens = inputs[0] if inputs else kwargs.get("input_ids", kwargs.get("inputs"))
        limit = self.inference_config.max_out_tokens
        if isinstance(tokens, Tensor) and tokens.dim() == 2:
            mask = kwargs.get("attention_mask")
            padded = isinstance(mask, Tensor) and mask.dim() == 2
            if not tokens.numel() or (padded and cast(Tensor, mask).shape != tokens.shape):
                shape = "" if mask is None else f", its attention_mask {tuple(mask.shape)}"
                raise RequestError(
                    f"generate: the prompt has shape {tuple(tokens.shape)}{shape}; expected at least one row and one "
                    "token, and a mask of the same shape"
                )
            longest = int(cast(Tensor, mask).sum(1).max()) if padded else tokens.shape[1]
            if longest > limit:
                raise CapacityError(
                    f"the prompt has {longest} tokens, max_out_tokens is {limit}; raise it in init_inference"
                )

    def _is_ours(self, generate: Any, kwargs: dict[str, Any]) -> bool:
        """Whether our loop does what is asked; if not, says so once."""
        reason = next((key for key in _OTHER_MODES if _setting(self.module, kwargs, key)), None)
        if kwargs.get("stop_strings") is None and _setting(self.module, kwargs, "stop_strings"):
            reason = "stop_strings of a generation config"
        if reason is None and "custom_generate" not in inspect.signature(generate).parameters:
            reason = "this version of transformers, whose generate takes no loop of ours,"
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


def _setting(module: nn.Module, kwargs: dict[str, Any], name: str) -> Any:
    """An argument of `generate`: given, else of the given generation config, else of the module's."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    for config in (kwargs.get("generation_config"), getattr(module, "generation_config", None)):
        if config is not None and getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def _stop_strings_as_criterion(arguments: dict[str, Any]) -> None:
    """`stop_strings` and `tokenizer` become a stopping criterion: transformers does not pass them on to our loop."""
    generation = importlib.import_module("transformers.generation")
    strings, tokenizer = arguments.pop("stop_strings"), arguments.pop("tokenizer", None)
    if tokenizer is None:
        raise ValueError("generate: stop_strings needs the tokenizer as well; give tokenizer=...")
    criteria = generation.StoppingCriteriaList(arguments.get("stopping_criteria") or [])
    criteria.append(generation.StopStringCriteria(tokenizer, strings))
    arguments["stopping_criteria"] = criteria


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
