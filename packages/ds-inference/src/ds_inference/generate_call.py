"""One call of transformers' `generate`: what is asked for, and whether our loop does it.

The functions look at the arguments and at the generation configs in the order in which transformers does; nothing here
computes. A call that our loop takes stays a call of the model's `generate`, with the loop as its `custom_generate`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from torch import Tensor, nn

from ds_inference.errors import CapacityError, RequestError
from ds_inference.generation import DecodeLoop

__all__ = ["asked", "check_request", "longest_prompt", "other_loop", "with_loop"]

_OTHER_MODES = ("assistant_model", "penalty_alpha", "dola_layers", "constraints", "force_words_ids", "custom_generate",
    "prompt_lookup_num_tokens", "inputs_embeds", "past_key_values", "cache_implementation", "output_attentions",
    "output_hidden_states", "synced_gpus", "token_healing", "prefill_chunk_size", "guidance_scale")  # fmt: skip
"""Arguments of `generate` that ask for what our loop does not do."""


def asked(module: nn.Module, kwargs: dict[str, Any], name: str) -> Any:
    """An argument of `generate`: given, else of the given generation config, else of the module's."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    for config in (kwargs.get("generation_config"), getattr(module, "generation_config", None)):
        if config is not None and getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def longest_prompt(inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """(tokens of the longest prompt, padding not counted; columns); None: the call has no tokens [rows, columns].

    RequestError (a ValueError): an empty prompt, or a mask of another shape.
    """
    tokens = inputs[0] if inputs else kwargs.get("input_ids", kwargs.get("inputs"))
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        return None
    mask = kwargs.get("attention_mask")
    padded = isinstance(mask, Tensor) and mask.dim() == 2
    if not tokens.numel() or (padded and cast(Tensor, mask).shape != tokens.shape):
        shape = "" if mask is None else f", its attention_mask {tuple(mask.shape)}"
        raise RequestError(
            f"generate: the prompt has shape {tuple(tokens.shape)}{shape}; expected at least one row and one "
            "token, and a mask of the same shape"
        )
    return int(cast(Tensor, mask).sum(1).max()) if padded else tokens.shape[1], tokens.shape[1]


def check_request(
    module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], limit: int, where: str = "init_inference"
) -> None:
    """Refuse what no loop of an engine does; `limit` is its max_out_tokens, said in `where`.

    Raises:
        NotImplementedError: num_beams above 1.
        RequestError: as `longest_prompt`. CapacityError: a prompt longer than `limit`.
    """
    beams = asked(module, kwargs, "num_beams")
    if beams is not None and beams > 1:
        raise NotImplementedError(
            f"num_beams is {beams}; the engine decodes greedily or by sampling; engine.module.generate does beams"
        )
    prompt = longest_prompt(inputs, kwargs)
    if prompt is not None and prompt[0] > limit:
        raise CapacityError(f"the prompt has {prompt[0]} tokens, max_out_tokens is {limit}; raise it in {where}")


def other_loop(module: nn.Module, generate: Any, kwargs: dict[str, Any]) -> str | None:
    """What is asked for that our loop does not do; None: nothing."""
    reason = next((key for key in _OTHER_MODES if asked(module, kwargs, key)), None)
    if kwargs.get("stop_strings") is None and asked(module, kwargs, "stop_strings"):
        reason = "stop_strings of a generation config"
    if reason is None and "custom_generate" not in inspect.signature(generate).parameters:
        reason = "this version of transformers, whose generate takes no loop of ours,"
    return reason


def with_loop(
    kwargs: dict[str, Any], loop: DecodeLoop, measure: Callable[[], AbstractContextManager[None]] = nullcontext
) -> dict[str, Any]:
    """The arguments for the model's `generate` with which it runs `loop`; `measure` wraps every pass."""
    arguments = dict(kwargs)
    streamer = arguments.get("streamer")
    if arguments.get("stop_strings") is not None:
        _stop_strings_as_criterion(arguments)

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

    return {**arguments, "custom_generate": run}


def _stop_strings_as_criterion(arguments: dict[str, Any]) -> None:
    """`stop_strings` and `tokenizer` become a stopping criterion: transformers does not pass them on to our loop."""
    generation = importlib.import_module("transformers.generation")
    strings, tokenizer = arguments.pop("stop_strings"), arguments.pop("tokenizer", None)
    if tokenizer is None:
        raise ValueError("generate: stop_strings needs the tokenizer as well; give tokenizer=...")
    criteria = generation.StoppingCriteriaList(arguments.get("stopping_criteria") or [])
    criteria.append(generation.StopStringCriteria(tokenizer, strings))
    arguments["stopping_criteria"] = criteria
