"""The loss scaler against the written rule of upstream, step by step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_zero.config import LossScaleConfig
from ds_zero.errors import NonFiniteGradientError
from ds_zero.precision import LossScaler


def rule(overflows: list[bool], power: int, window: int, delay: int, consecutive: bool, minimum: float) -> list[float]:
    """The rule as documented; inf marks the error."""
    scale, counter, last, seen = 2.0**power, delay, -1, []
    for step, overflow in enumerate(overflows):
        if overflow:
            if delay == 1 or counter == 1:
                if scale <= minimum:
                    return [*seen, float("inf")]
                scale = max(scale / 2, minimum)
            else:
                counter -= 1
            last = step
        else:
            if consecutive:
                counter = delay
            clean = step - last - 1
            if clean > 0 and clean % window == 0:
                if not consecutive:
                    counter = delay
                scale *= 2
        seen.append(scale)
    return seen


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.booleans(), max_size=40), st.integers(0, 4), st.integers(1, 4), st.integers(1, 3), st.booleans(),
    st.sampled_from([1.0, 2.0]),
)  # fmt: skip
def test_dynamic_scale_follows_the_rule(
    overflows: list[bool], power: int, window: int, delay: int, consecutive: bool, minimum: float
) -> None:
    config = LossScaleConfig(
        initial_scale_power=power, loss_scale_window=window, hysteresis=delay, consecutive_hysteresis=consecutive,
        min_loss_scale=minimum,
    )  # fmt: skip
    scaler, seen = LossScaler(config), []
    for index, overflow in enumerate(overflows):
        if index == 7:  # a resumed scaler takes the same path
            state, scaler = scaler.state_dict(), LossScaler(config)
            scaler.load_state_dict(state)
        if overflow and scaler.hysteresis_left == 1 and scaler.scale <= minimum:
            with pytest.raises(NonFiniteGradientError, match=r"already at minimum.*layer\.weight"):
                scaler.update(overflow, culprit="layer.weight")
            seen.append(float("inf"))
            break
        scaler.update(overflow, culprit="layer.weight")
        seen.append(scaler.scale)
    assert seen == rule(overflows, power, window, delay, consecutive, minimum)


def test_static_and_disabled_scales_do_not_move() -> None:
    static, disabled = LossScaler(LossScaleConfig(loss_scale=128.0)), LossScaler(LossScaleConfig(), enabled=False)
    for scaler, value in ((static, 128.0), (disabled, 1.0)):
        for overflow in (True, False) * 3:
            scaler.update(overflow)
        scaler.load_state_dict({"scale": 2.0, "iteration": 1, "last_overflow": 0, "hysteresis_left": 1})
        assert scaler.scale == value


def test_defaults_are_upstreams() -> None:
    scaler = LossScaler(LossScaleConfig())
    assert scaler.scale == 65536
    scaler.update(True)
    assert scaler.scale == 65536
    scaler.update(True)
    assert scaler.scale == 32768
    with pytest.raises(ValueError, match="hysteresis"):
        LossScaleConfig(hysteresis=0)
