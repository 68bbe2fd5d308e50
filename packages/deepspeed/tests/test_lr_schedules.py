"""The schedules against their closed forms, written down here a second time, and against what clients rely on."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepspeed.lr_schedules import (
    VALID_LR_SCHEDULES,
    LRRangeTest,
    OneCycle,
    Schedule,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
    get_torch_optimizer,
    make_schedule,
    update_lr,
)

LRS = (0.1, 0.02, 0.5)


def optimizer(
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW, lrs: tuple[float, ...] = LRS, **kwargs: Any
) -> Any:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs]
    return kind(groups, lr=1.0, **kwargs)  # type: ignore[call-arg]


def trace(schedule: Schedule, steps: int) -> list[list[float]]:
    """The lrs of all groups after each of `steps` steps, as found in the optimizer."""
    seen = []
    for _ in range(steps):
        schedule.step()
        lrs = [float(group["lr"]) for group in schedule.optimizer.param_groups]
        assert lrs == pytest.approx(schedule.get_last_lr(), abs=0) == schedule.get_lr()
        seen.append(lrs)
    return seen


def against(schedule: Schedule, formula: Callable[[int, int], float], steps: int) -> None:
    """`formula(t, group)` is the lr after step t, t from 0."""
    for t, lrs in enumerate(trace(schedule, steps)):
        assert lrs == pytest.approx([formula(t, group) for group in range(len(lrs))], rel=1e-12), f"t = {t}"


def warm(t: int, num_steps: int, kind: str) -> float:
    return math.log(t + 1) / math.log(num_steps) if kind == "log" else t / num_steps


class TestLRRangeTest:
    @pytest.mark.parametrize("staircase", [False, True])
    @pytest.mark.parametrize("low", [0.01, [0.01, 0.02, 0.03]])
    def test_closed_form(self, staircase: bool, low: Any) -> None:
        lows = low if isinstance(low, list) else [low] * 3
        schedule = LRRangeTest(optimizer(), low, 5, 2.0, staircase)
        assert [group["lr"] for group in schedule.optimizer.param_groups] == lows

        def formula(t: int, group: int) -> float:
            interval = (t + 1) / 5
            return float(lows[group] * (1 + 2.0 * (math.floor(interval) if staircase else interval)))

        against(schedule, formula, 23)

    @pytest.mark.parametrize("size", [0, -1, 2.5, None, True])
    def test_step_size_must_be_a_positive_int(self, size: Any) -> None:
        with pytest.raises(ValueError, match="lr_range_test_step_size must be a positive integer"):
            LRRangeTest(optimizer(), lr_range_test_step_size=size)

    def test_list_of_another_length(self) -> None:
        with pytest.raises(ValueError, match="2 values, but the optimizer has 3 parameter groups"):
            LRRangeTest(optimizer(), [0.1, 0.2])


class TestOneCycle:
    @staticmethod
    def height(t: int, first: int, second: int, stairs: tuple[int, int]) -> float:
        position = (t + 1) % (first + second)
        up = position <= first
        height = position / first if up else 1 - (position - first) / second
        count = stairs[0 if up else 1]
        # The number of whole stairs below, by integer arithmetic.
        whole = position * count // first if up else (first + second - position) * count // second
        return whole / count if count else height

    @pytest.mark.parametrize(("first", "second"), [(10, None), (4, 12), (7, 3)])
    @pytest.mark.parametrize("stairs", [(0, None), (2, None), (4, 2), (0, 3)])
    def test_cycle_and_decay(self, first: int, second: int | None, stairs: tuple[int, int | None]) -> None:
        lows, highs = [0.01, 0.02, 0.0], [0.1, 0.04, 0.5]
        schedule = OneCycle(
            optimizer(),
            lows,
            highs,
            decay_lr_rate=0.5,
            cycle_first_step_size=first,
            cycle_second_step_size=second,
            cycle_first_stair_count=stairs[0],
            cycle_second_stair_count=stairs[1],
            decay_step_size=4,
            decay_mom_rate=0.25,
        )
        second = second or first
        counts = (stairs[0], stairs[0] if stairs[1] is None else stairs[1])
        total = first + second
        assert [group["lr"] for group in schedule.optimizer.param_groups] == lows
        assert [group["betas"] for group in schedule.optimizer.param_groups] == [(0.8, 0.99)] * 3
        for t in range(total + 9):
            schedule.step()
            if t < total:
                s = self.height(t, first, second, counts)
                lrs = [low + (high - low) * s for low, high in zip(lows, highs, strict=True)]
                beta = 0.9 - (0.9 - 0.8) * s
            else:
                n = t - total + 1
                lrs = [low / (1 + 0.5 * n / 4) for low in lows]
                beta = 0.9 * (1 + 0.25 * n / 4)
            groups = schedule.optimizer.param_groups
            assert [group["lr"] for group in groups] == pytest.approx(lrs, rel=1e-9, abs=1e-15), f"t = {t}"
            assert [group["betas"] for group in groups] == [pytest.approx((beta, 0.99), rel=1e-9)] * 3
        assert schedule.get_mom() == [group["betas"] for group in schedule.optimizer.param_groups]

    def test_stairs_change_the_path(self) -> None:
        smooth = trace(OneCycle(optimizer(), 0.0, 1.0, cycle_first_step_size=8), 8)
        stepped = trace(OneCycle(optimizer(), 0.0, 1.0, cycle_first_step_size=8, cycle_first_stair_count=2), 8)
        assert [lrs[0] for lrs in smooth] == pytest.approx([n / 8 for n in range(1, 9)])
        assert [lrs[0] for lrs in stepped] == [0, 0, 0, 0.5, 0.5, 0.5, 0.5, 1.0]

    def test_without_decay_the_minimum_stays(self) -> None:
        schedule = OneCycle(optimizer(), 0.25, 1.0, cycle_first_step_size=2, decay_lr_rate=0.5, decay_step_size=0)
        assert [lrs[0] for lrs in trace(schedule, 8)][4:] == [0.25] * 4
        schedule = OneCycle(optimizer(), 0.25, 1.0, cycle_first_step_size=2, decay_lr_rate=0.0, decay_step_size=3)
        assert [lrs[0] for lrs in trace(schedule, 8)][4:] == [0.25] * 4

    def test_no_betas_no_momentum(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="DeepSpeed"):
            schedule = OneCycle(optimizer(torch.optim.SGD, momentum=0.5), 0.1, 1.0)
        assert "SGD has no betas" in caplog.text
        schedule.step()
        assert schedule.get_mom() is None
        assert schedule.optimizer.param_groups[0]["momentum"] == 0.5

    def test_momentum_can_be_left_alone(self) -> None:
        schedule = OneCycle(optimizer(betas=(0.7, 0.8)), 0.1, 1.0, cycle_momentum=False)
        schedule.step()
        assert schedule.optimizer.param_groups[0]["betas"] == (0.7, 0.8)

    def test_step_sizes_must_be_positive(self) -> None:
        with pytest.raises(ValueError, match="cycle_first_step_size"):
            OneCycle(optimizer(), 0.1, 1.0, cycle_first_step_size=0)
        with pytest.raises(ValueError, match="cycle_second_step_size"):
            OneCycle(optimizer(), 0.1, 1.0, cycle_second_step_size=0)


@pytest.mark.parametrize("kind", ["log", "linear"])
class TestWarmup:
    @pytest.mark.parametrize("num_steps", [1, 2, 10])
    def test_warmup_to_each_groups_own_lr(self, kind: str, num_steps: int) -> None:
        schedule = WarmupLR(optimizer(), warmup_min_lr=0.001, warmup_num_steps=num_steps, warmup_type=kind)
        assert [group["lr"] for group in schedule.optimizer.param_groups] == [0.001] * 3
        length = max(2, num_steps)

        def formula(t: int, group: int) -> float:
            gamma = warm(t, length, kind) if t < length else 1.0
            return 0.001 + (LRS[group] - 0.001) * gamma

        against(schedule, formula, 15)

    def test_bounds_per_group(self, kind: str) -> None:
        lows, highs = [0.0, 0.1, 0.2], [1.0, 2.0, 3.0]
        schedule = WarmupLR(optimizer(), lows, highs, 4, kind)
        against(schedule, lambda t, g: lows[g] + (highs[g] - lows[g]) * (warm(t, 4, kind) if t < 4 else 1.0), 9)

    def test_decay(self, kind: str) -> None:
        schedule = WarmupDecayLR(optimizer(), 20, warmup_min_lr=0.01, warmup_num_steps=5, warmup_type=kind)

        def formula(t: int, group: int) -> float:
            gamma = warm(t, 5, kind) if t < 5 else max(0.0, (20 - t) / (20 - 5))
            return 0.01 + (0.001 - 0.01) * gamma

        against(schedule, formula, 25)

    def test_cosine(self, kind: str) -> None:
        schedule = WarmupCosineLR(optimizer(), 20, 0.1, 5, 0.2, kind)
        assert [group["lr"] for group in schedule.optimizer.param_groups] == [0.0] * 3

        def formula(t: int, group: int) -> float:
            if t < 5:
                return LRS[group] * (0.1 + 0.9 * warm(t, 5, kind))
            done = min(1.0, (t - 5 + 1) / (20 - 5))
            return LRS[group] * (0.2 + 0.8 * (1 + math.cos(math.pi * done)) / 2)

        against(schedule, formula, 25)
        assert schedule.get_lr_ratio() == pytest.approx(0.2)


@pytest.mark.parametrize("steps", [-3, 2.5, "5", None, True])
@pytest.mark.parametrize("cls", [WarmupLR, WarmupDecayLR, WarmupCosineLR])
def test_warmup_steps_are_a_number_of_steps(cls: Any, steps: Any) -> None:
    total = {} if cls is WarmupLR else {"total_num_steps": 10}
    with pytest.raises(ValueError, match=f"warmup_num_steps must be an integer of at least 0, got {steps!r}"):
        cls(optimizer(), warmup_num_steps=steps, **total)


@pytest.mark.parametrize("cls", [WarmupLR, WarmupDecayLR, WarmupCosineLR])
def test_no_warmup_steps_are_the_shortest_warmup(cls: Any) -> None:
    total = {} if cls is WarmupLR else {"total_num_steps": 6}
    schedules = [cls(optimizer(), warmup_num_steps=steps, **total) for steps in (0, 1, 2)]
    rates = []
    for schedule in schedules:
        found = []
        for _ in range(6):
            schedule.step()
            found.append(schedule.get_last_lr())
        rates.append(found)
    assert rates[0] == rates[1] == rates[2] and rates[0][1] != rates[0][0]


def test_unknown_warmup_type_warns_and_is_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="DeepSpeed"):
        schedule = WarmupLR(optimizer(), warmup_num_steps=4, warmup_type="quadratic")
    assert "unknown warmup_type 'quadratic'" in caplog.text
    assert trace(schedule, 6) == trace(WarmupLR(optimizer(), warmup_num_steps=4), 6)


def test_total_shorter_than_warmup_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="DeepSpeed"):
        WarmupDecayLR(optimizer(), 3, warmup_num_steps=5)
        WarmupCosineLR(optimizer(), 3, warmup_num_steps=5)
    assert caplog.text.count("total_num_steps 3 is less than warmup_num_steps 5") == 2


MADE: dict[str, dict[str, Any]] = {
    "LRRangeTest": {"lr_range_test_step_size": 3},
    "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.4, "cycle_first_step_size": 3, "decay_step_size": 2},
    "WarmupLR": {"warmup_num_steps": 4},
    "WarmupDecayLR": {"warmup_num_steps": 4, "total_num_steps": 12},
    "WarmupCosineLR": {"warmup_num_steps": 4, "total_num_steps": 12},
}


@pytest.mark.parametrize("name", VALID_LR_SCHEDULES)
class TestSurface:
    def test_before_the_first_step(self, name: str, caplog: pytest.LogCaptureFixture) -> None:
        schedule = make_schedule(name, optimizer(), MADE[name])
        with pytest.raises(AssertionError, match=r"need to call step\(\) first"):
            schedule.get_last_lr()
        with caplog.at_level(logging.WARNING, logger="DeepSpeed"):
            assert schedule.get_lr() == [group["lr"] for group in schedule.optimizer.param_groups]
        assert "before the schedule has started" in caplog.text

    def test_resuming_goes_on_alike(self, name: str) -> None:
        whole = trace(make_schedule(name, optimizer(), MADE[name]), 12)
        first = make_schedule(name, optimizer(), MADE[name])
        trace(first, 5)
        assert first.state_dict() == {"last_batch_iteration": 4}
        second = make_schedule(name, optimizer(), MADE[name])
        second.load_state_dict(first.state_dict())
        assert second.get_last_lr() == first.get_last_lr()
        assert trace(second, 7) == whole[5:]

    def test_a_given_iteration(self, name: str) -> None:
        whole = trace(make_schedule(name, optimizer(), MADE[name]), 9)
        schedule = make_schedule(name, optimizer(), MADE[name])
        schedule.step(8)
        assert schedule.get_last_lr() == whole[8]

    def test_starting_later_leaves_the_groups_alone(self, name: str) -> None:
        adam = optimizer()
        make_schedule(name, adam, {**MADE[name], "last_batch_iteration": 3})
        assert [group["lr"] for group in adam.param_groups] == list(LRS)

    def test_tensor_lrs_are_filled_in_place(self, name: str) -> None:
        adam = optimizer()
        for group in adam.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
        tensors = [group["lr"] for group in adam.param_groups]
        schedule = make_schedule(name, adam, MADE[name])
        schedule.step()
        schedule.step()
        assert all(group["lr"] is tensor for group, tensor in zip(adam.param_groups, tensors, strict=True))
        assert [float(tensor) for tensor in tensors] == pytest.approx(schedule.get_last_lr())

    def test_wrapped_optimizers(self, name: str) -> None:
        class Wrapper:
            def __init__(self) -> None:
                self.optimizer = optimizer()

        wrapper = Wrapper()
        assert make_schedule(name, wrapper, MADE[name]).optimizer is wrapper.optimizer

    def test_groups_added_later_are_an_error(self, name: str) -> None:
        adam = optimizer()
        schedule = make_schedule(name, adam, MADE[name])
        adam.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
        with pytest.raises(ValueError, match="4 parameter groups, but the schedule was built for 3"):
            schedule.step()


def test_resuming_by_argument_takes_the_first_lr() -> None:
    adam = optimizer()
    for group in adam.param_groups:
        group["initial_lr"], group["lr"] = group["lr"], 1e-9
    schedule = WarmupLR(adam, warmup_num_steps=4, last_batch_iteration=9)
    schedule.step()
    assert schedule.get_last_lr() == list(LRS)


def test_make_schedule() -> None:
    schedule = make_schedule("StepLR", optimizer(), {"step_size": 2})
    assert isinstance(schedule, torch.optim.lr_scheduler.StepLR)
    with pytest.raises(ValueError, match="there is no schedule 'Nope'"):
        make_schedule("Nope", optimizer(), {})
    with pytest.raises(ValueError, match="scheduler WarmupDecayLR: missing a required argument: 'total_num_steps'"):
        make_schedule("WarmupDecayLR", optimizer(), {"warmup_num_steps": 3})
    with pytest.raises(ValueError, match="unexpected keyword argument 'warmup_steps'"):
        make_schedule("WarmupLR", optimizer(), {"warmup_steps": 3})


def test_helpers() -> None:
    adam = optimizer()
    assert get_torch_optimizer(adam) is adam
    with pytest.raises(TypeError, match="int is not a torch optimizer"):
        get_torch_optimizer(3)
    assert update_lr(adam.param_groups, [1, 2, 3]) == [1.0, 2.0, 3.0]
    assert [group["lr"] for group in adam.param_groups] == [1, 2, 3]


def test_upstreams_path_has_the_same_classes() -> None:
    from deepspeed.runtime import lr_schedules as shim

    assert shim.WarmupLR is WarmupLR and shim.VALID_LR_SCHEDULES is VALID_LR_SCHEDULES
    assert [name for name in shim.__all__ if not hasattr(shim, name)] == []
