"""Compiled forwards between the hooks of stage 3, and the names of the modules to compile."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import nn
from zero_helpers import WORDS, Net, Tied

import ds_zero


def test_block_modules_are_those_that_are_gathered_as_a_whole() -> None:
    model = Net()
    assert list(ds_zero.block_modules(model)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert ds_zero.block_modules(model)["blocks.1"] is model.blocks[1]
    assert list(ds_zero.block_modules(model, ["head", "blocks.0"])) == ["blocks.0", "head"]
    assert list(ds_zero.block_modules(nn.Linear(2, 2))) == []
    with pytest.raises(ds_zero.LayoutError, match="no module named 'tail'"):
        ds_zero.block_modules(model, ["tail"])


def train(kind: type[Net], compiles: bool) -> tuple[list[float], int]:
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch.manual_seed(0)
    model = kind()
    config = {"stage": 3, "param_persistence_threshold": 0}
    model, optimizer = ds_zero.shard(model, torch.optim.AdamW(model.parameters(), lr=0.01), config=config)
    assert optimizer is not None
    if compiles:
        forward = torch.compile(type(model.blocks[0]).forward, backend=backend, fullgraph=True)
        for block in ds_zero.block_modules(model).values():
            block.forward = types.MethodType(forward, block)  # type: ignore[method-assign]
    losses = []
    for step in range(3):
        batch = torch.randint(WORDS, (3, 2), generator=torch.Generator().manual_seed(step))
        loss = model(batch, step)
        optimizer.backward(loss)
        optimizer.step()
        losses.append(loss.item())
        assert all(p.numel() == 0 for p in model.blocks.parameters())  # released again
    optimizer.close()
    torch._dynamo.reset()
    return losses, graphs


@pytest.mark.parametrize("kind", [Net, Tied])
def test_blocks_compile_once_and_without_breaks_between_gather_and_release(kind: type[Net]) -> None:
    expected, _ = train(kind, False)
    found, graphs = train(kind, True)
    assert found == expected
    assert graphs == 1
