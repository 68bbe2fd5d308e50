"""Helpers of `deepspeed.runtime.utils` and the small shims beside it."""

from __future__ import annotations

import itertools
import logging
import pickle
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ds_comm
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.runtime import utils
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler, DynamicLossScaler, LossScaler
from ds_comm.testing import run_ranks

Pair = namedtuple("Pair", "a b")


def test_move_to_device_keeps_containers() -> None:
    batch = {"x": torch.ones(2), "rest": [Pair(torch.ones(1), "text"), (1, None)]}
    moved = utils.move_to_device(batch, "meta")
    assert (
        moved["x"].is_meta
        and moved["rest"][0].a.is_meta
        and moved["rest"][0].b == "text"
        and moved["rest"][1] == (1, None)
    )
    assert not batch["x"].is_meta
    only = utils.move_to_device(
        [torch.ones(1), torch.ones(1, dtype=torch.long)], "meta", lambda t: t.is_floating_point()
    )
    assert [t.is_meta for t in only] == [True, False]


def test_clones_for_saving_are_small_and_detached() -> None:
    flat = torch.arange(100.0, requires_grad=True)
    item = OrderedDict(view=flat[:3], more=[Pair((flat[3:5]), 7)], text="t")
    clone = clone_tensors_for_torch_save(item)
    assert type(clone) is OrderedDict and type(clone["more"][0]) is Pair and clone["text"] == "t"
    assert clone["view"].untyped_storage().nbytes() == 12 and not clone["view"].requires_grad
    assert clone["view"].tolist() == [0, 1, 2] and clone["more"][0].a.tolist() == [3, 4] and clone["more"][0].b == 7


def brute_force(weights: list[int], parts: int) -> int:
    best = None
    for cut in itertools.combinations(range(1, len(weights)), parts - 1):
        ends = [0, *cut, len(weights)]
        sums = [sum(weights[a:b]) for a, b in itertools.pairwise(ends)]
        spread = max(sums) - min(sums)
        best = spread if best is None else min(best, spread)
    assert best is not None
    return best


@given(st.lists(st.integers(1, 9), min_size=3, max_size=8))
def test_two_balanced_parts_are_the_best_there_are(weights: list[int]) -> None:
    offsets = utils.partition_balanced(weights, 2)
    sums = [sum(weights[a:b]) for a, b in itertools.pairwise(offsets)]
    assert max(sums) - min(sums) == brute_force(weights, 2)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 6))
def test_partitions_cover_without_gaps(weights: list[int], parts: int) -> None:
    for offsets in (utils.partition_balanced(weights, parts), utils.partition_uniform(len(weights), parts)):
        assert len(offsets) == parts + 1 and offsets[0] == 0 and offsets[-1] == len(weights)
        assert offsets == sorted(offsets)
        if len(weights) > parts:
            assert all(a < b for a, b in itertools.pairwise(offsets))


def test_partition_values() -> None:
    assert utils.partition_uniform(10, 3) == [0, 4, 7, 10]
    assert utils.partition_uniform(2, 4) == [0, 1, 2, 2, 2]
    assert utils.partition_balanced([1, 1, 1, 3], 2) == [0, 3, 4]
    assert utils.partition_balanced([5, 1, 1, 1, 5], 3) == [0, 1, 4, 5]
    assert utils.partition_balanced([1, 1], 3) == [0, 1, 2, 2]


@pytest.mark.parametrize("norm_type", [1, 2, 3, float("inf")])
def test_clipping_is_torchs(norm_type: float) -> None:
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(2, 2))] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn_like(a) * 10
        b.grad = a.grad.clone()
    norm = utils.clip_grad_norm_(ours, 1.5, norm_type)
    assert norm == pytest.approx(nn.utils.clip_grad_norm_(theirs, 1.5, norm_type).item(), rel=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert utils.get_global_norm([3.0, 4.0]) == 5.0


def test_norm_that_is_not_finite() -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([1.0, float("inf")])
    assert utils.clip_grad_norm_(p, 1.0) == -1.0 and p.grad[0] == 1.0
    assert utils.CheckOverflow([[p]]).check() and not utils.CheckOverflow().has_overflow([nn.Parameter(torch.ones(1))])


class Mpu:
    def get_model_parallel_rank(self) -> int:
        return ds_comm.get_rank()

    def get_model_parallel_group(self) -> Any:
        return ds_comm.get_world_group()


def parallel_norm() -> tuple[float, bool]:
    split, shared = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    split.model_parallel = True  # type: ignore[attr-defined]
    split.grad, shared.grad = torch.tensor([3.0 + ds_comm.get_rank()]), torch.tensor([12.0])
    norm = utils.get_grad_norm([split, shared], mpu=Mpu())
    if ds_comm.get_rank() == 1:
        split.grad[0] = float("nan")
    return norm, utils.CheckOverflow([[split]], mpu=Mpu()).check()


def test_norm_and_overflow_over_model_parallel_ranks() -> None:
    assert run_ranks(parallel_norm, 2) == [(13.0, True)] * 2  # 3, 4 split and one 12 that all ranks have


def test_torch_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils.torch, "__version__", "2.10.1+cpu")
    assert utils.required_torch_version(min_version=2.6) and utils.required_torch_version(min_version="2.10.1")
    assert not utils.required_torch_version(min_version="2.11") and not utils.required_torch_version(max_version=2.9)
    assert utils.required_torch_version(min_version="2.3", max_version="2.10")
    with pytest.raises(ValueError, match="both are None"):
        utils.required_torch_version()


def test_seeding_repeats_numbers() -> None:
    import random

    import numpy as np

    drawn = []
    for _ in range(2):
        utils.set_random_seed(5)
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert drawn[0] == drawn[1]


def test_memory_reports(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="DeepSpeed"):
        utils.see_memory_usage("quiet")
        assert caplog.text == ""
        utils.see_memory_usage("loud", force=True)
        utils.memory_status("status", print_rank=7)
        utils.memory_status("here", reset_max=True)
    assert "loud" in caplog.text and "Max_MA" in caplog.text and "CPU Virtual Memory" in caplog.text
    assert "status" not in caplog.text and "MEMSTATS here" in caplog.text


def test_call_to_str() -> None:
    assert utils.call_to_str("f", 1, "a", k="v") == "f(1, a, k='v')"


def test_dynamic_scale_follows_overflows() -> None:
    scaler = DynamicLossScaler(init_scale=16, scale_window=2, min_scale=4, delayed_shift=1)
    seen = []
    for overflow in (True, False, False, False, True, True):
        scaler.update_scale(overflow)
        seen.append(scaler.cur_scale)
    assert seen[0] == 8 and max(seen) >= 16 and seen[-1] < max(seen)
    quiet = DynamicLossScaler(init_scale=4, min_scale=4, raise_error_at_min_scale=False)
    quiet.update_scale(True)
    assert quiet.loss_scale == 4
    with pytest.raises(ArithmeticError, match="minimum"):
        DynamicLossScaler(init_scale=4, min_scale=4).update_scale(True)


def test_scalers_of_old_pickles_are_taken_over() -> None:
    old = DynamicLossScaler.__new__(DynamicLossScaler)
    old.__setstate__(
        {
            "cur_scale": 512.0,
            "cur_iter": 9,
            "last_overflow_iter": 4,
            "scale_window": 7,
            "min_scale": 1,
            "delayed_shift": 2,
            "cur_hysteresis": 1,
            "dtype": torch.half,
            "scale_factor": 2.0,
        }
    )
    assert old.cur_scale == 512 and old._rules.iteration == 9 and old._rules.hysteresis_left == 1
    again = pickle.loads(pickle.dumps(old))
    assert again.cur_scale == 512 and again._rules.config == old._rules.config
    static = LossScaler.__new__(LossScaler)
    static.__setstate__({"cur_scale": 128.0})
    assert static.loss_scale == 128 and not static.dynamic
    assert pickle.loads(pickle.dumps(LossScaler(8))).loss_scale == 8


def test_scaler_by_dtype() -> None:
    assert CreateLossScaler(torch.bfloat16, 8, True, None).loss_scale == 1
    assert CreateLossScaler(torch.half, 8, False, None).loss_scale == 8
    made = CreateLossScaler(torch.half, 0, True, {"init_scale": 32, "scale_window": 5})
    assert made.dynamic and made.loss_scale == 32
    p = nn.Parameter(torch.ones(1))
    made.backward((2 * p).sum())
    assert p.grad is not None and p.grad.item() == 64
