"""Answers to many prompts at once, in one call: the serving engine without a server.

    llm = LLM("SmolLM2-135M-Instruct")
    for answer in llm.generate(["Once upon a time", "The capital of France is"], SamplingParams(max_tokens=16)):
        ...

All prompts are served together, by continuous batching; the answers come in the order of the prompts. The same seeds
give the same answers, in whatever company.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ds_comm.log import current_rank
from ds_inference.errors import CapacityError, RequestError
from ds_inference.serve.core import ServingCore
from ds_inference.serve.options import Model, ServingOptions, build_core
from ds_inference.serve.outputs import Completion, RequestOutput
from ds_inference.serve.request import SamplingParams
from ds_inference.serve.text import TextCodec

__all__ = ["LLM"]

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]


class LLM:
    """A model that answers prompts. Not thread-safe; `AsyncLLM` is for many callers.

    `model`: a transformers model, a `Decoder`, or a path; `tokenizer`: of a model that is not a path; `seed`: makes
    requests without a seed of their own reproducible from run to run; other keywords: `ServingOptions`. A model that is
    split over tensor-parallel ranks is called alike on all of them (`seed` is 0 there when none is given).
    """

    def __init__(self, model: Model | ServingCore, *, tokenizer: Any = None, seed: int | None = None, **options: Any):
        self.core = (
            model if isinstance(model, ServingCore) else build_core(model, ServingOptions.of(options), tokenizer)
        )
        together = getattr(self.core.decoder, "communicator", None) is not None
        self._seed = 0 if seed is None and together else seed
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer prompts, given as text or as token numbers.

        `params`: for all, or one for each; None: the defaults. `n`: answers to each prompt. `use_tqdm`: show a
        progress bar (by rich, on rank 0). RequestError names the prompt that cannot be served, before any is computed;
        LogitsError when the model gives none.
        """
        texts = [prompts] if _is_one(prompts) else list(prompts)
        return self._run([self._encoded(text) for text in texts], params, n, use_tqdm)

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        use_tqdm: bool = False,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer conversations, each a list of messages {"role": ..., "content": ...}, by the model's chat template.

        `template`: further variables of the template. The rest as in `generate`.
        """
        one = bool(conversations) and isinstance(conversations[0], Mapping)
        codec = self._codec("chat needs")
        prompts: list[tuple[str | None, list[int]]] = []
        for messages in [conversations] if one else conversations:
            text = codec.chat(messages, continue_last=False, options=template)  # type: ignore[arg-type]
            prompts.append((text, codec.encode(text, special=False)))
        return self._run(prompts, params, n, use_tqdm)

    def _encoded(self, prompt: Any) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self._codec("a prompt as text needs").encode(prompt)
        return None, list(prompt)

    def _codec(self, what: str) -> TextCodec:
        if self.core.codec is None:
            raise RequestError(f"{what} a tokenizer, and there is none; give LLM(..., tokenizer=...), or token numbers")
        return self.core.codec

    def _run(
        self,
        prompts: list[tuple[str | None, list[int]]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        n: int,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        wanted = self._params(params, len(prompts))
        for index, ((_, tokens), one) in enumerate(zip(prompts, wanted, strict=True)):
            try:
                self.core.check(tokens, one, n)
            except RequestError as error:
                raise RequestError(f"prompt {index}: {error}") from error
        outputs: dict[str, RequestOutput] = {}
        waiting = iter(zip(prompts, wanted, strict=True))
        following = next(waiting, None)
        try:
            with _progress(len(prompts) if use_tqdm else 0) as advance:
                while following is not None or self.core.has_work:
                    while following is not None and self._add(*following, n, outputs):
                        following = next(waiting, None)
                    for delta in self.core.step():
                        if delta.error is not None:
                            raise delta.error
                        output = outputs[delta.job_id]
                        output.outputs[delta.index].take(delta)
                        output.num_cached_tokens = max(output.num_cached_tokens, delta.num_cached)
                        if output.finished:
                            advance()
        finally:
            for job_id in outputs:
                self.core.abort(job_id)
        return list(outputs.values())

    def _add(
        self, prompt: tuple[str | None, list[int]], params: SamplingParams, n: int, outputs: dict[str, RequestOutput]
    ) -> bool:
        """Queue a prompt; False while the queue is full."""
        text, tokens = prompt
        job_id = f"llm-{next(self._ids)}"
        try:
            timing = self.core.add(job_id, tokens, params, n=n)
        except CapacityError:
            if not self.core.has_work:
                raise
            return False
        outputs[job_id] = RequestOutput(job_id, text, tokens, [Completion(index) for index in range(n)], timing)
        return True

    def _params(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        every = [params or SamplingParams()] * count if params is None or isinstance(params, SamplingParams) else params
        if len(every) != count:
            raise RequestError(f"{len(every)} sampling values for {count} prompts; expected one for all, or one each")
        if self._seed is None:
            return list(every)
        return [
            one if one.seed is not None else replace(one, seed=(self._seed * 1_000_003 + index) % 2**64)
            for index, one in enumerate(every)
        ]


def _is_one(prompts: Any) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar over `total` answers; none for 0, and on other ranks than the first."""
    if total == 0 or current_rank() != 0:
        yield lambda: None
        return
    from rich.progress import Progress, TimeElapsedColumn

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), transient=True) as bar:
        task = bar.add_task("answers", total=total)
        yield lambda: bar.advance(task)
