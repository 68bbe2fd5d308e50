"""Every field of the configuration changes something that can be seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zero_helpers as z

import ds_comm
import ds_zero
from ds_comm.testing import run_ranks
from ds_zero import LossScaleConfig, ZeroConfig
from ds_zero.precision import LossScaler

# field -> two values that differ in what `observe` sees; how the second is seen
WALK: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "stage": ({"stage": 1}, {"stage": 2}, "stage"),
    "dtype": ({"dtype": "fp32"}, {"dtype": "bf16"}, "values"),
    "grad_accum_dtype": ({"dtype": "bf16"}, {"dtype": "bf16", "grad_accum_dtype": "fp32"}, "norm"),
    "gradient_accumulation_steps": ({}, {"gradient_accumulation_steps": 4}, "norm"),
    "gradient_reduction": ({}, {"gradient_reduction": "sum"}, "norm"),
    "gradient_clipping": ({}, {"gradient_clipping": 0.01}, "values"),
    "skip_nonfinite": ({"skip_nonfinite": True}, {"skip_nonfinite": False}, "poisoned"),
    "check_nonfinite": ({}, {"check_nonfinite": False}, "poisoned"),
    "loss_scaling": ({"dtype": "fp16"}, {"dtype": "fp16", "loss_scaling": {"loss_scale": 8.0}}, "scale"),
    "overlap_comm": ({}, {"overlap_comm": False}, "drains"),
    "reduce_scatter": ({}, {"reduce_scatter": False}, "ops"),
    "reduce_bucket_size": ({}, {"reduce_bucket_size": 128}, "ops"),
    "allgather_bucket_size": ({}, {"allgather_bucket_size": 128}, "ops"),
    "sub_group_size": ({"optimizer": "sgd"}, {"optimizer": "sgd", "sub_group_size": 100}, "inner_steps"),
    "ignore_unused_parameters": ({}, {"ignore_unused_parameters": False}, "unused"),
    "prefetch_bucket_size": ({"stage": 3, "prefetch_bucket_size": 0}, {"stage": 3}, "prefetched"),
    "param_persistence_threshold": ({"stage": 3}, {"stage": 3, "param_persistence_threshold": 50}, "units"),
    "model_persistence_threshold": (
        {"stage": 3, "param_persistence_threshold": 50},
        {"stage": 3, "param_persistence_threshold": 50, "model_persistence_threshold": 60},
        "units",
    ),
    "max_live_parameters": ({"stage": 3}, {"stage": 3, "max_live_parameters": 1}, "prefetched"),
    "max_reuse_distance": ({"stage": 3}, {"stage": 3, "max_reuse_distance": 100_000}, "ops"),
}  # fmt: skip


def observe(stage: int = 2, optimizer: str = "adamw", **config: Any) -> dict[str, Any]:
    """Three steps with these settings, and everything about them that a setting may change."""
    model = z.build("Twice")
    model.spare = torch.nn.Linear(3, 3)
    _, zero = ds_zero.shard(model, z.OPTIMIZERS[optimizer](model.parameters()), config=z.zero_config(stage, **config))
    assert zero is not None
    steps = 0

    def count(*args: Any) -> None:
        nonlocal steps
        steps += 1

    zero.optimizer.register_step_post_hook(count)
    prefetched, drains = 0, 0
    hooks, ring = zero.sharded.hooks, zero.reducer._ring
    if hooks is not None:
        plain_prefetch = hooks._prefetch

        def prefetch() -> None:
            nonlocal prefetched
            plain_prefetch()
            prefetched += len(hooks._prefetched)

        hooks._prefetch = prefetch  # type: ignore[method-assign]
    plain_drain = ring.drain

    def drain() -> None:
        nonlocal drains
        drains += 1
        plain_drain()

    ring.drain = drain  # type: ignore[method-assign]
    seen: dict[str, Any] = {"stage": zero.zero_stage, "scale": zero.loss_scale, "unused": ""}
    for step in range(3):
        try:
            zero.backward(model(z.batch(2 * step + ds_comm.get_rank())))
        except ds_zero.ZeroStateError as error:
            return {**seen, "unused": str(error)}
        zero.step()
    seen.update(norm=zero.grad_norm, inner_steps=steps, prefetched=prefetched > 0, drains=drains)
    seen["ops"] = {op: row["count"] for op, row in ds_comm.communicator().ledger.summary().items()}
    seen["units"] = [(unit.name, unit.numel) for unit in zero.shard_map.units]
    seen["values"] = {n: v.tolist() for n, v in z.values_of(model).items()}
    zero.backward(model(z.batch(9)))
    grad = ds_zero.safe_get_full_grad(model.head.weight)
    assert grad is not None
    ds_zero.safe_set_full_grad(model.head.weight, grad * float("nan"))
    try:
        zero.step()
        seen["poisoned"] = (zero.overflow, zero.step_applied)
    except ArithmeticError:
        seen["poisoned"] = "raised"
    return seen


def test_the_walk_is_complete() -> None:
    assert set(WALK) == set(ZeroConfig.model_fields)


@pytest.mark.parametrize("field", sorted(WALK))
def test_field_is_observable(field: str) -> None:
    one, other, what = WALK[field]
    assert field in one or field in other
    first, second = (run_ranks(observe, 2, transport="gloo", **options)[0] for options in (one, other))
    assert first.get(what) != second.get(what), (field, first.get(what))


SCALING: dict[str, Any] = {
    "loss_scale": 4.0, "initial_scale_power": 3, "loss_scale_window": 2, "hysteresis": 1,
    "consecutive_hysteresis": True, "min_loss_scale": 40000.0,
}  # fmt: skip


def test_every_loss_scaling_field_is_observable() -> None:
    assert set(SCALING) == set(LossScaleConfig.model_fields)
    pattern = [False, False, False, True, False, True, True, False, False]

    def path(**values: Any) -> list[float]:
        scaler, scales = LossScaler(LossScaleConfig(**values)), []
        for overflow in pattern:
            try:
                scaler.update(overflow)
            except ArithmeticError:
                return [*scales, -1.0]
            scales.append(scaler.scale)
        return scales

    for field, value in SCALING.items():
        assert path(**{field: value}) != path(), field


def test_upstreams_names_and_closed_types() -> None:
    config = ZeroConfig(
        stage3_prefetch_bucket_size=1, stage3_param_persistence_threshold=2, stage3_model_persistence_threshold=3,
        stage3_max_live_parameters=4, stage3_max_reuse_distance=5,
    )  # fmt: skip
    assert (config.prefetch_bucket_size, config.param_persistence_threshold, config.max_reuse_distance) == (1, 2, 5)
    assert ZeroConfig(prefetch_bucket_size=7).prefetch_bucket_size == 7
    with pytest.raises(ValueError, match="frozen"):
        config.stage = 2
