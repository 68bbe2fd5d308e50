"""llama.cpp by its own calls (llama-cpp-python's ctypes): a context with slots, steps over a batch of tokens.

What its server does between HTTP requests is `Llama.step`: one `llama_decode` over tokens of several sequences, then
its greedy sampler for each row that asks. Cells of all slots lie in one unified cache, as in the server.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np


class Row(NamedTuple):
    """One token to compute: of sequence `slot` at `position`; `sample` asks for its successor."""

    token: int
    position: int
    slot: int
    sample: bool


class Llama:
    """A model and one context of `slots` sequences with `context` tokens each."""

    def __init__(self, path: Path, threads: int, slots: int, context: int, batch: int = 2048) -> None:
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
