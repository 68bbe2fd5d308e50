"""Random generators of a device."""

from __future__ import annotations

from types import ModuleType

import torch

from deepspeed.accelerator.topic import Topic


class RandomTopic(Topic):
    """RNG states and seeds; on a CPU those of the process."""

    @property
    def _rng(self) -> ModuleType:
        return torch.random if self._name == "cpu" else torch.get_device_module(self._name)

    def random(self) -> ModuleType:
        """torch's module `torch.random`."""
        return torch.random

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        """Continue from a saved state."""
        if device_index is None or self._name == "cpu":
            self._rng.set_rng_state(new_state)
        else:
            self._rng.set_rng_state(new_state, device_index)

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        """State of the generator (a byte tensor in host memory)."""
        if device_index is None or self._name == "cpu":
            state = self._rng.get_rng_state()
        else:
            state = self._rng.get_rng_state(device_index)
        assert isinstance(state, torch.Tensor)
        return state

    def manual_seed(self, seed: int) -> None:
        """Seed the current device."""
        self._rng.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed all devices of this type."""
        getattr(self._rng, "manual_seed_all", self._rng.manual_seed)(seed)

    def initial_seed(self) -> int:
        """Seed the generator was started with."""
        return int(self._rng.initial_seed())

    def default_generator(self, device_index: int | None = None) -> torch.Generator:
        """The generator that unseeded functions use."""
        if self._name == "cpu":
            return torch.default_generator
        generator = self._rng.default_generators[device_index or 0]
        assert isinstance(generator, torch.Generator)
        return generator
