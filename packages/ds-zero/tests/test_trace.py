"""The order hint: it learns, it forgets what turned out wrong, and random module orders never change results."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import zero_helpers as z
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ds_comm
import ds_zero
from ds_comm.testing import run_ranks
from ds_zero.trace import OrderHint


def test_learns_and_relearns() -> None:
    hint = OrderHint()
    for unit in (0, 1, 2, 1):
        hint.use(unit)
    assert hint.upcoming() == []
    hint.restart()
    hint.use(0)
    assert hint.upcoming() == [1, 2]
    hint.use(2)
    assert (hint.misses, hint.upcoming()) == (1, [])
    hint.restart()
    assert hint.upcoming() == [0, 2]


@given(st.lists(st.lists(st.integers(0, 5)), max_size=6))
def test_after_a_step_the_record_is_that_step(steps: list[list[int]]) -> None:
    hint = OrderHint()
    for step in steps:
        hint.restart()
        for unit in step:
            hint.use(unit)
        again = OrderHint()
        again.__dict__.update({k: v.copy() if isinstance(v, list) else v for k, v in vars(hint).items()})
        again.restart()
        assert again.upcoming() == list(dict.fromkeys(step))


class Shuffled(z.Net):
    """Runs its blocks in an order that changes from step to step, some of them several times."""

    def body(self, x: Tensor, step: int) -> Tensor:
        for index in random.Random(step).choices(range(3), k=random.Random(step + 99).randint(1, 5)):
            x = self.blocks[index](x)
        return x


def shuffle(stage: int, options: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Shuffled()
    _, zero = ds_zero.shard(model, z.OPTIMIZERS["adamw"](model.parameters()), config=z.zero_config(stage, **options))
    assert zero is not None
    for step in range(8):
        zero.backward(model(z.batch(2 * step + ds_comm.get_rank()), step))
        zero.step()
        with torch.no_grad():
            model(z.batch(step), step + 50)
    return z.values_of(model)


@pytest.mark.parametrize("options", [{}, {"max_reuse_distance": 900}, {"prefetch_bucket_size": 1200}])
def test_random_module_orders_give_the_same_results(options: dict[str, Any]) -> None:
    plain = run_ranks(shuffle, 2, 1, {})[0]
    for values in run_ranks(shuffle, 2, 3, options, transport="gloo"):
        assert all(torch.equal(values[n], plain[n]) for n in plain)
