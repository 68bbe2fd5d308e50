"""What the topics of the accelerator interface share."""

from __future__ import annotations

from types import ModuleType

import torch


class Topic:
    """Base of the topics: the device type and torch's module of it."""

    _name: str

    @property
    def module(self) -> ModuleType:
        """torch's module of the device type: torch.cpu, torch.cuda, ..."""
        module: ModuleType = torch.get_device_module(self._name)
        return module
