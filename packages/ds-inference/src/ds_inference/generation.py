"""Generation over a decoder with a static cache: what the engine runs in place of transformers' own loop.

`module.generate` of transformers prepares everything (generation config, special tokens, masks, positions, logits
processors, stopping criteria) and then calls the loop it is given; `DecodeLoop` is that loop for greedy decoding and
sampling. It draws from the same distribution with the same random numbers, so its tokens are transformers' own as far
as the logits are.

Vocabulary: a *row* is one sequence of the batch; its tokens go to one block of the cache, in which padding takes no
place; *room* is the tokens that a block holds.

Invariants: keys of a row are the tokens its mask has, in order, at the positions that transformers gives them. A row
whose prompt ends in padding gets what transformers computes: the query of its last column, which is written nowhere.
A finished row goes on with padding until all have finished, as there.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ds_inference.decoder import Batch, Decoder, KVCache
from ds_inference.errors import CapacityError

__all__ = ["DecodeLoop"]

_ROOM_STEP = 64
"""Room is a multiple of this, so that calls of nearly one length share a cache."""
_HAS_NUMPY = importlib.util.find_spec("numpy") is not None
_UNDERSTOOD = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"})
"""What transformers may pass to the loop besides its own arguments; the cache it made stays empty."""


class DecodeLoop:
    """The loop over one decoder; keeps a cache from call to call.

    A call takes the cache away and gives it back at its end, so that calls of several threads, or one within another's
    streamer, have a cache (and its program) each.
    """

    def __init__(self, decoder: Decoder, max_tokens: int, min_tokens: int = 1, where: str = "init_inference") -> None:
        """`max_tokens`: of a row, prompt included (said in `where`); `min_tokens`: room that every cache has."""
        self.decoder, self.max_tokens, self.min_tokens, self.where = decoder, max_tokens, min_tokens, where
        self._kept: list[KVCache] = []
        self._lock = threading.Lock()

    def release(self) -> None:
        """Let go of the cache."""
        with self._lock:
            self._kept = []

    @property
    def kept_size(self) -> tuple[int, int] | None:
        """Rows and tokens of the cache that is kept; None: there is none."""
        with self._lock:
            return (self._kept[0].num_blocks, self._kept[0].block_size) if self._kept else None

    def take(self, rows: int, tokens: int) -> KVCache:
        """A cache of at least `rows` blocks of at least `tokens`: the last call's if it is there and large enough."""
        with self._lock:
            cache = self._kept.pop() if self._kept else None
        if cache is None or rows > cache.num_blocks or tokens > cache.block_size:
            cache = None  # let go of it first
            cache = KVCache(self.decoder, rows, -(-max(tokens, self.min_tokens) // _ROOM_STEP) * _ROOM_STEP)
        return cache

    def give_back(self, cache: KVCache) -> None:
        """Keep a cache for the next call."""
        with self._lock:
            self._kept = [cache]

    def understands(self, model_kwargs: Any) -> bool:
        """Whether the model's inputs are tokens, mask and positions alone, from the start."""
        past = model_kwargs.get("past_key_values")
        if any(value is not None and key not in _UNDERSTOOD for key, value in model_kwargs.items()):
            return False
        return (past is None or past.get_seq_length() == 0) and self._fits(model_kwargs.get("attention_mask"))

    def _fits(self, mask: Tensor | None) -> bool:
        """Every row has a token; and padding stands on the left where windows count columns."""
        if mask is None:
            return True
        if mask.dim() != 2 or not bool(mask.any(1).all()):
            return False
        windows = any(layer.window is not None for layer in self.decoder.model.layers)
        return not windows or bool((mask[:, 1:] >= mask[:, :-1]).all())

    def run(
        self,
        input_ids: Tensor,
        logits_processor: Sequence[Any] | Any,
        stopping_criteria: Any,
        generation_config: Any,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        streamer: Any = None,
        measure: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Any:
        """Continue `input_ids` [rows, columns]; the arguments are those of transformers' loop, prepared by it.

        Returns:
            [rows, columns + new] tokens on the device of `input_ids`, or transformers' output object where the config
            asks for one (its `past_key_values` is None: the cache is the engine's).

        Raises:
            CapacityError: the prompt and what is asked for are longer than the model's positions or `max_tokens`.
        """
        # What is kept between calls must not be inference tensors, which no later call outside of that mode may change.
        with torch.inference_mode(False), torch.no_grad():
            return self._run(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                attention_mask,
                position_ids,
                streamer,
                measure,
            )

    def _run(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        streamer: Any,
        measure: Callable[[], AbstractContextManager[None]],
    ) -> Any:
        run = _Run(self, input_ids, attention_mask, position_ids, generation_config.max_length, measure)
        choose = _Choice(logits_processor, stopping_criteria, generation_config, run)
        try:
            logits = run.prompt()
            while not choose(logits, streamer):
                logits = run.step(choose.tokens)
        finally:
            self.give_back(run.cache)
        if streamer is not None:
            streamer.end()
        return choose.output()


class _Run:
    """The model's side: what is fed to it."""

    def __init__(
        self,
        loop: DecodeLoop,
        input_ids: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        max_length: int | None,
        measure: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.decoder, self._measure = loop.decoder, measure
        device = self.decoder.device
        rows, self.columns = input_ids.shape
        self.input_ids = input_ids
        self.mask = None if mask is None else mask.to(device).bool()
        lengths = torch.full((rows,), self.columns, device=device) if self.mask is None else self.mask.sum(1)
        longest = int(lengths.max())
        self.max_length = self._limit(loop, longest, max_length)
        room = longest + self.max_length - self.columns
        self.cache = loop.take(rows, room)
        starts = torch.arange(rows, device=device) * self.cache.block_size
        self._tables = torch.arange(rows, dtype=torch.int32, device=device).unsqueeze(1)
        self._lengths, self._starts = lengths, starts
        self._positions = self._all_positions(positions, rows)
        self._batch = Batch(
            tokens=torch.empty(rows, dtype=torch.int64, device=device),
            positions=self._positions[:, -1].clone(),
            slots=starts + lengths - 1,
            block_tables=self._tables,
            context_lens=lengths.to(torch.int32),
            cu_seqlens=None,
            logits_at=None,
        )

    def _limit(self, loop: DecodeLoop, longest: int, max_length: int | None) -> int:
        """The columns at which the run ends at the latest."""
        positions = self.decoder.max_positions
        limit = min(loop.max_tokens, positions or loop.max_tokens)
        if max_length is None:
            max_length = self.columns + limit - longest
        wanted = longest + max_length - self.columns
        if wanted > limit:
            reason, remedy = "max_out_tokens", f"raise it in {loop.where}, or ask for fewer tokens"
            if positions is not None and positions < loop.max_tokens:
                reason, remedy = "the number of the model's positions", "ask for fewer tokens, or shorten the prompt"
            raise CapacityError(
                f"a prompt of {longest} tokens and {max_length - self.columns} new ones are {wanted}, but "
                f"{reason} is {limit}; {remedy}"
            )
        return max_length

    def _all_positions(self, positions: Tensor | None, rows: int) -> Tensor:
        """[rows, columns], as transformers counts them: padding does not, and stands at 0."""
        device = self.decoder.device
        if positions is not None:
            return positions.to(device).expand(rows, -1)
        if self.mask is None:
            return torch.arange(self.columns, device=device).expand(rows, -1)
        return (self.mask.long().cumsum(1) - 1).masked_fill(~self.mask, 0)

    def prompt(self) -> Tensor:
        """Logits [rows, vocabulary] for the first new token."""
        device = self.decoder.device
        tokens = self.input_ids.to(device)
        rows = len(self._starts)
        offsets = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        offsets[1:] = self._lengths.cumsum(0)
        columns = torch.arange(self.columns, device=device).expand(rows, -1)
        if self.mask is None:
            chosen = torch.ones(rows, self.columns, dtype=torch.bool, device=device)
        else:
            chosen = self.mask
            columns = self.mask.long().cumsum(1) - 1
        batch = Batch(
            tokens=tokens[chosen],
            positions=self._positions[chosen],
            slots=(self._starts.unsqueeze(1) + columns)[chosen],
            block_tables=self._tables,
            context_lens=self._batch.context_lens,
            cu_seqlens=offsets,
            logits_at=offsets[1:].long() - 1,
            max_seqlen=int(self._lengths.max()),
        )
        with self._measure():
            logits = self.decoder.forward(batch, self.cache)
        if self.mask is not None and not bool(self.mask[:, -1].all()):
            logits = self._after_padding(tokens, logits)
        return logits

    def _after_padding(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Rows that end in padding: their last column's query looks at the row's tokens and is not among them."""
        assert self.mask is not None
        padded = (~self.mask[:, -1]).nonzero().squeeze(1)
        batch = Batch(
            tokens=tokens[padded, -1],
            positions=self._positions[padded, -1],
            slots=torch.full_like(padded, -1),
            block_tables=self._tables[padded],
            context_lens=self._batch.context_lens[padded],
            cu_seqlens=None,
            logits_at=None,
        )
        logits = logits.clone()
        logits[padded] = self.decoder.forward(batch, self.cache)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Logits after one more token [rows] of each row."""
        batch = self._batch
        batch.tokens.copy_(tokens)
        batch.positions.add_(1)
        batch.slots.add_(1)
        batch.context_lens.add_(1)
        with self._measure():
            return self.decoder.forward(batch, self.cache)


class _Choice:
    """The text's side: which token is next, and whether that was the last one."""

    def __init__(self, processors: Any, criteria: Any, config: Any, run: _Run) -> None:
        self._config = config
        # The usual processor of short answers costs more than a small model's layer; done here it costs nothing.
        floors = [_floor(one) for one in processors or ()]
        self._processors = None if all(floors) else processors
        self._floors = [floor for floor in floors if floor is not None] if self._processors is None else []
        rows = len(run.input_ids)
        self._ids = run.input_ids.new_empty(rows, run.max_length)
        self._ids[:, : run.columns] = run.input_ids
        self._length, self._max_length = run.columns, run.max_length
        self._communicator = run.decoder.communicator
        self._eos = {int(token) for one in criteria if hasattr(one, "eos_token_id") for token in one.eos_token_id}
        self._pad = config.pad_token_id
        if self._pad is None and self._eos:
            self._pad = next(
                int(token) for one in criteria if hasattr(one, "eos_token_id") for token in one.eos_token_id
            )
        # What only compares lengths or looks for the end token is done here, without tensors.
        plain = all(hasattr(one, "eos_token_id") or type(one).__name__ == "MaxLengthCriteria" for one in criteria)
        self._criteria = None if plain else criteria
        self._unfinished = [True] * rows
        record = bool(config.return_dict_in_generate)
        self._scores: tuple[Tensor, ...] | None = () if record and config.output_scores else None
        self._logits: tuple[Tensor, ...] | None = () if record and config.output_logits else None
        self.tokens = run.input_ids[:, -1]

    def __call__(self, logits: Tensor, streamer: Any) -> bool:
        """Choose each row's next token from logits [rows, vocabulary]; whether all rows have finished."""
        scores = logits.to(self._ids.device)
        if self._logits is not None:
            self._logits += (scores.clone(),)
        for length, ends in self._floors:
            if self._length < length:
                scores = scores.index_fill(1, ends, -torch.inf)
        if self._processors:
            scores = self._processors(self._ids[:, : self._length], scores.clone())
        if self._scores is not None:
            self._scores += (scores.clone(),)
        if self._config.do_sample:
            tokens = torch.multinomial(torch.softmax(scores, -1), 1).squeeze(1)
        else:
            tokens = _argmax(scores)
        if self._communicator is not None:  # ranks draw for themselves, and must go on with the same tokens
            self._communicator.broadcast(tokens, 0, label="generate.tokens")
        self.tokens = self._with_padding(tokens)
        self._ids[:, self._length] = self.tokens
        self._length += 1
        if streamer is not None:
            streamer.put(self.tokens.cpu())
        self._stop_by_criteria()
        return self._length >= self._max_length or not any(self._unfinished)

    def _with_padding(self, tokens: Tensor) -> Tensor:
        if not self._eos:
            return tokens
        chosen = tokens.tolist()
        if not all(self._unfinished):
            chosen = [token if going else self._pad for token, going in zip(chosen, self._unfinished, strict=True)]
            tokens = tokens.new_tensor(chosen)
        self._unfinished = [
            going and token not in self._eos for token, going in zip(chosen, self._unfinished, strict=True)
        ]
        return tokens

    def _stop_by_criteria(self) -> None:
        if self._criteria is not None:
            stopped = self._criteria(self._ids[:, : self._length], self._scores).tolist()
            self._unfinished = [going and not stop for going, stop in zip(self._unfinished, stopped, strict=True)]

    def output(self) -> Any:
        sequences = self._ids[:, : self._length]
        if not self._config.return_dict_in_generate:
            return sequences.contiguous()
        made = importlib.import_module("transformers.generation").GenerateDecoderOnlyOutput
        return made(sequences=sequences.contiguous(), scores=self._scores, logits=self._logits)


def _floor(processor: Any) -> tuple[int, Tensor] | None:
    """(columns before which no end token may be chosen, the end tokens), for a processor that does just that."""
    name = type(processor).__name__
    if name == "MinNewTokensLengthLogitsProcessor":
        return processor.prompt_length_to_skip + processor.min_new_tokens, processor.eos_token_id
    if name == "MinLengthLogitsProcessor":
        return processor.min_length, processor.eos_token_id
    return None


def _argmax(scores: Tensor) -> Tensor:
    """The first of the largest in each row; by numpy on CPU, where there is one: ten times faster than torch's."""
    if scores.device.type == "cpu" and _HAS_NUMPY:
        return torch.from_numpy(scores.numpy().argmax(-1))
    return scores.argmax(-1)
