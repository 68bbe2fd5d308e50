"""llama.cpp by its own calls (llama-cpp-python's ctypes): a context with slots, steps over a batch of tokens.

A step is one `llama_decode` over tokens of several sequences, then its greedy sampler for each row that asks. The cells
of all slots lie in one unified cache. `serve` is what its server does with requests, but for HTTP, which costs it
nothing here: the wheels of llama-cpp-python have no server with slots.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
from _infer_serve import Clock, Job


class Row(NamedTuple):
    """One token to compute: of sequence `slot` at `position`; `sample` asks for its successor."""

    token: int
    position: int
    slot: int
    sample: bool


class Llama:
    """A model and one context of `slots` sequences with `context` tokens each."""

    def __init__(self, path: Path, threads: int, slots: int, context: int, batch: int = 512) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_seq_max = slots * context, batch, slots
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True
        self.max_rows = batch
        self._model = model
        self._context = llama_cpp.llama_init_from_model(model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {slots} x {context} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._sampler = llama_cpp.llama_sampler_init_greedy()
        self._batch: Any = llama_cpp.llama_batch_init(batch, 0, 1)
        arrays = (self._batch.token, self._batch.pos, self._batch.n_seq_id, self._batch.logits)
        self._token, self._position, self._count, self._wanted = (
            np.ctypeslib.as_array(array, shape=(batch,)) for array in arrays
        )
        self._count[:] = 1

    def step(self, rows: list[Row]) -> list[int]:
        """Compute `rows`; the greedy successors of those that ask, in order."""
        for index, row in enumerate(rows):
            self._batch.seq_id[index][0] = row.slot
        columns = np.array(rows, dtype=np.int64)
        self._token[: len(rows)], self._position[: len(rows)] = columns[:, 0], columns[:, 1]
        self._wanted[: len(rows)] = columns[:, 3]
        self._batch.n_tokens = len(rows)
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status:
            raise RuntimeError(f"llama_decode ended with status {status}")
        return [
            llama_cpp.llama_sampler_sample(self._sampler, self._context, index)
            for index, row in enumerate(rows)
            if row.sample
        ]

    def free(self, slot: int) -> None:
        """Forget a sequence."""
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """`new` tokens for each prompt, a slot each."""
        for slot in range(len(prompts)):
            self.free(slot)
        rows = [
            Row(token, position, slot, position == len(prompt) - 1)
            for slot, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        found: list[list[int]] = [[] for _ in prompts]
        for _ in range(new):
            for sequence, token in zip(found, self.step(rows), strict=True):
                sequence.append(token)
            rows = [
                Row(sequence[-1], len(prompt) + len(sequence) - 1, slot, True)
                for slot, (prompt, sequence) in enumerate(zip(prompts, found, strict=True))
            ]
        return found


def serve(llama: Llama, jobs: list[Job], slots: int) -> None:
    """Serve a trace (see `_infer_serve`): prompts by themselves, then one token of every slot."""
    waiting, clock = deque(jobs), Clock()
    running: dict[int, Job] = {}
    for slot in range(slots):
        llama.free(slot)
    while waiting or running:
        if not running:
            clock.sleep_until(waiting[0].at)
        for slot in range(slots):
            if slot not in running and waiting and waiting[0].at <= clock.now():
                running[slot] = waiting.popleft()
        rows = rows_of_step(running, llama.max_rows)
        sampled = llama.step(rows)
        now = clock.now()
        for slot, token in zip([row.slot for row in rows if row.sample], sampled, strict=True):
            job = running[slot]
            job.take([token], now)
            if len(job.tokens) == job.new:
                del running[slot]
                llama.free(slot)


def rows_of_step(running: dict[int, Job], limit: int) -> list[Row]:
    """The rest of the first prompt that is not read yet, as far as there is room; else one token of every sequence."""
    for slot, job in running.items():
        if not job.tokens:
            end = min(len(job.prompt), job.read + limit)
            rows = [Row(job.prompt[at], at, slot, at == len(job.prompt) - 1) for at in range(job.read, end)]
            job.read = end
            return rows
    return [Row(job.tokens[-1], len(job.prompt) + len(job.tokens) - 1, slot, True) for slot, job in running.items()]
