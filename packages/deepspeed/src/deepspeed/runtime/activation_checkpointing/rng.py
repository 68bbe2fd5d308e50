"""Named random states for model-parallel code.

Owns `CudaRNGStatesTracker`: generators by name, beside the default one. A layer whose weights are split over ranks
forks to the state `model-parallel-rng`, which differs between ranks, while everything outside draws the same numbers
on all of them. On a machine without an accelerator the states are those of the CPU generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deepspeed.accelerator import get_accelerator

MODEL_PARALLEL_RNG = "model-parallel-rng"
MODEL_PARALLEL_SEED_OFFSET = 2718


class CudaRNGStatesTracker:
    """Random states by name. `fork(name)` draws from one and puts the default state back afterwards."""

    def __init__(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()

    def reset(self) -> None:
        """Forget all names."""
        self.states_, self.seeds_ = {}, set()

    def get_states(self) -> dict[str, torch.Tensor]:
        """The states by name (a new dict)."""
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Continue from saved states."""
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        """Begin a state at `seed`; ValueError when the name or the seed is in use."""
        if seed in self.seeds_:
            raise ValueError(f"seed {seed} is already used by a state; give every state a seed of its own")
        if name in self.states_:
            raise ValueError(f"random state {name!r} already exists; reset() forgets it")
        self.seeds_.add(seed)
        accelerator = get_accelerator()
        before = accelerator.get_rng_state()
        accelerator.manual_seed(seed)
        self.states_[name] = accelerator.get_rng_state()
        accelerator.set_rng_state(before)

    @contextmanager
    def fork(self, name: str = MODEL_PARALLEL_RNG) -> Iterator[None]:
        """Inside, random numbers of the device come from the state `name`; KeyError when it was never added."""
        if name not in self.states_:
            raise KeyError(f"random state {name!r} does not exist; known are {sorted(self.states_)}")
        accelerator = get_accelerator()
        before = accelerator.get_rng_state()
        accelerator.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = accelerator.get_rng_state()
            accelerator.set_rng_state(before)


_tracker = CudaRNGStatesTracker()


def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    """The tracker of this process."""
    return _tracker


def seed_model_parallel(seed: int, model_parallel_rank: int) -> None:
    """Seed the default state with `seed` on all ranks and the model-parallel one differently on each."""
    _tracker.reset()
    get_accelerator().manual_seed(seed)
    _tracker.add(MODEL_PARALLEL_RNG, seed + MODEL_PARALLEL_SEED_OFFSET + model_parallel_rank)
