"""Using the whole model between training steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ds_zero import GatheredParameters


@contextmanager
def unwrap_model_for_generation(model: Any) -> Iterator[torch.nn.Module]:
    """Context with the client's module of an engine, all parameters whole on every rank.

    Inside, forward passes communicate nothing, so ranks may run different numbers of them (or none). Changes to
    parameters are dropped at the end. Entering and leaving are collective.
    """
    module = getattr(model, "module", model)
    with GatheredParameters(list(module.parameters())):
        yield module
