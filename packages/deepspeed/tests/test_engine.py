"""The engine's steps: accumulation, boundaries, schedulers, norms, overflow, what it logs; equality over ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from engines import WIDTH, make_config, make_engine, make_net, micro_batch, train, weights

import deepspeed
import ds_comm
import ds_zero
from deepspeed.events import Callback
from ds_comm.testing import run_ranks

# -- against plain torch ----------------------------------------------------------------------------------------------


def plain_training(steps: int, num_micro_batches: int, dtype: torch.dtype = torch.float32) -> tuple[Any, list[float]]:
    """AdamW with clipping by hand, masters in fp32; returns (masters by name, norms)."""
    model = make_net()
    masters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    model.to(dtype)
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-2, weight_decay=0.01)
    norms = []
    for step in range(steps):
        sums = {name: torch.zeros_like(p) for name, p in masters.items()}
        for index in range(num_micro_batches):
            model.zero_grad()
            model(*micro_batch(step, index, dtype)).backward()
            for name, p in model.named_parameters():
                sums[name] += p.grad.float()
        for name, p in masters.items():
            p.grad = (sums[name] / num_micro_batches).to(dtype).float()
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)))
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(masters[name])
    return {name: p.detach() for name, p in masters.items()}, norms


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_is_what_plain_torch_does(stage: int, dtype: str) -> None:
    engine = make_engine(make_config(stage, dtype, gradient_accumulation_steps=2))
    train(engine, range(3))
    expected, norms = plain_training(3, 2, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    assert engine.get_global_grad_norm() == pytest.approx(norms[-1], rel=1e-5)
    for name, parameter in engine.module.named_parameters():
        full = ds_zero.safe_get_full_fp32_param(parameter)
        torch.testing.assert_close(full, expected[name], rtol=1e-4, atol=1e-5)


def train_ranks(config: dict[str, Any], steps: int, count: int) -> tuple[list[float], dict[str, torch.Tensor], float]:
    engine = make_engine(config)
    return train(engine, range(steps), count), weights(engine), engine.get_global_grad_norm()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stages_and_ranks_give_the_same_bits(dtype: str) -> None:
    alone = train_ranks(make_config(0, dtype, gradient_accumulation_steps=2), 3, 2)
    for stage in (1, 2, 3):
        results = run_ranks(train_ranks, 2, make_config(stage, dtype), 3, 2)
        for losses, state, norm in results:
            assert engines.same(state, alone[1]) and norm == alone[2]
            assert len(losses) == 3
        assert [loss for pair in zip(results[0][0], results[1][0], strict=True) for loss in pair] == alone[0]


# -- accumulation and boundaries --------------------------------------------------------------------------------------


def test_step_acts_at_the_boundary_only() -> None:
    engine = make_engine(make_config(2, gradient_accumulation_steps=3))
    before = weights(engine)
    for index in range(3):
        assert engine.is_gradient_accumulation_boundary() is (index == 2)
        loss = engine(*micro_batch(0, index))
        assert engine.backward(loss).item() == pytest.approx(loss.item() / 3)
        engine.step()
        assert engines.same(weights(engine), before) is (index < 2)
    assert (engine.global_steps, engine.micro_steps, engine.global_samples) == (1, 3, 6)
    assert engine.get_batch_info() == (6, 2, 3)


def drive_as_accelerate(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Boundary set on every backward, losses divided by the caller, step only when gradients are synchronised."""
    engine = make_engine(config)
    for step in range(3):
        for index in range(2):
            engine.set_gradient_accumulation_boundary(is_boundary=index == 1)
            loss = engine(*micro_batch(step, ds_comm.get_rank() * 2 + index)) / 2
            engine.backward(loss, scale_wrt_gas=False)
            if index == 1:
                engine.step()
    assert engine.global_steps == 3
    return weights(engine)


@pytest.mark.parametrize("stage", [1, 3])
def test_sticky_boundary_as_accelerate_drives_it(stage: int) -> None:
    config = make_config(stage, gradient_accumulation_steps=2)
    ours = drive_as_accelerate(config)
    usual = make_engine(config)
    train(usual, range(3))
    for name, value in weights(usual).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
    for result in run_ranks(drive_as_accelerate, 2, config):
        assert result.keys() == ours.keys()


def test_unmanaged_accumulation_makes_every_step_a_boundary() -> None:
    engine = make_engine(make_config(2, managed_gradient_accumulation=False))
    for index in range(3):
        engine.backward(engine(*micro_batch(0, index)))
    assert engine.is_gradient_accumulation_boundary()
    engine.step()
    assert engine.global_steps == 1
    with pytest.raises(RuntimeError, match="managed_gradient_accumulation"):
        engine.set_gradient_accumulation_boundary(True)
    with pytest.raises(RuntimeError, match="managed_gradient_accumulation"), engine.coalesce_grad_reduction():
        pass


def test_batch_sizes_change_at_run_time() -> None:
    engine = make_engine(make_config(1))
    engine.set_train_batch_size(8)
    assert engine.get_batch_info() == (8, 2, 4)
    with pytest.raises(ValueError, match="not divisible"):
        engine.set_train_batch_size(7)
    engine.set_train_micro_batch_size(1)
    assert engine.get_batch_info() == (4, 1, 4)


def keep_then_sync(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    engine = make_engine(config)
    rank = ds_comm.get_rank()
    with engine.no_sync():
        engine.backward(engine(*micro_batch(0, rank * 2)))
        with pytest.raises(RuntimeError, match="no_sync"):
            engine.optimizer.step()
    engine.micro_steps += 1
    engine.backward(engine(*micro_batch(0, rank * 2 + 1)))
    engine.step()
    coalesced = make_engine(config)
    with coalesced.coalesce_grad_reduction():
        for index in range(2):
            coalesced.backward(coalesced(*micro_batch(0, rank * 2 + index)))
    coalesced.micro_steps += 1
    coalesced.step()
    assert engine.global_steps == coalesced.global_steps == 1
    for name, value in weights(coalesced).items():
        torch.testing.assert_close(value, weights(engine)[name])
    return weights(engine)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_no_sync_and_coalescing_at_every_stage(stage: int) -> None:
    config = make_config(stage, gradient_accumulation_steps=2)
    expected, _ = plain_training(1, 4)
    for result in run_ranks(keep_then_sync, 2, config):
        for name, value in result.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


# -- misuse -----------------------------------------------------------------------------------------------------------


def test_step_without_backward() -> None:
    engine = make_engine(make_config(2))
    with pytest.raises(RuntimeError, match=r"without engine\.backward"):
        engine.step()
    train(engine, range(1))
    with pytest.raises(RuntimeError, match=r"without engine\.backward"):
        engine.step()


def test_backward_on_what_is_no_scalar_loss() -> None:
    engine = make_engine(make_config(1))
    with pytest.raises(RuntimeError, match=r"scalar.*shape \(2,\)"):
        engine.backward(torch.ones(2, requires_grad=True))
    with pytest.raises(RuntimeError, match="requires_grad False"):
        engine.backward(torch.ones(()))
    with pytest.raises(RuntimeError, match="float"):
        engine.backward(1.0)


def test_data_that_is_no_dataset() -> None:
    with pytest.raises(ValueError, match="int"):
        make_engine(make_config(), training_data=3)


# -- overflow ---------------------------------------------------------------------------------------------------------


def spoil(engine: Any, value: float) -> None:
    """One step whose gradient holds `value`."""
    x, y = micro_batch(0, 0, next(engine.module.parameters()).dtype)
    engine.backward(engine(x, y) * torch.tensor(value))
    engine.step()


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_fp16_skips_a_bad_step_and_halves_the_scale(stage: int, bad: float) -> None:
    config = make_config(stage, "fp16", scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}})
    config["fp16"] = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    engine = make_engine(config)
    train(engine, range(2))
    before, rates = weights(engine), engine.get_lr()
    spoil(engine, bad)
    assert engines.same(weights(engine), before) and engine.get_lr() == rates
    assert engine.optimizer.overflow and not engine.was_step_applied()
    assert (engine.global_steps, engine.skipped_steps) == (3, 1)
    assert engine.optimizer.loss_scale == 2**7
    assert engine.lr_scheduler.last_batch_iteration == 1
    train(engine, [2])
    assert engine.was_step_applied() and not engine.optimizer.overflow
    assert not engines.same(weights(engine), before) and engine.get_lr() != rates


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_skips_a_bad_step(stage: int, caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(make_config(stage, "bf16", bf16={"enabled": True, "check_grad_overflow": True}))
    before = weights(engine)
    spoil(engine, math.nan)
    assert engines.same(weights(engine), before) and engine.skipped_steps == 1


def test_fp32_raises_and_changes_nothing() -> None:
    engine = make_engine(make_config(2))
    before = weights(engine)
    with pytest.raises(ds_zero.NonFiniteGradientError, match=r"blocks|head"):
        spoil(engine, math.inf)
    assert engines.same(weights(engine), before)
    train(engine, range(1))
    assert not engines.same(weights(engine), before)


def one_rank_overflows(config: dict[str, Any]) -> tuple[bool, float, dict[str, torch.Tensor]]:
    engine = make_engine(config)
    spoil(engine, math.inf if ds_comm.get_rank() == 1 else 1.0)
    return engine.was_step_applied(), engine.optimizer.loss_scale, weights(engine)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_overflow_on_one_rank_is_one_on_all(stage: int) -> None:
    config = make_config(stage, "fp16")
    config["fp16"] = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    (applied0, scale0, state0), (applied1, scale1, state1) = run_ranks(one_rank_overflows, 2, config)
    assert not applied0 and not applied1 and scale0 == scale1 == 2**7
    assert engines.same(state0, state1)


def test_a_static_loss_scale_stays() -> None:
    config = make_config(2, "fp16")
    config["fp16"] = {"enabled": True, "loss_scale": 64}
    engine = make_engine(config)
    train(engine, range(2))
    spoil(engine, math.inf)
    assert engine.optimizer.loss_scale == 64 and engine.skipped_steps == 1


def test_a_manual_backward_needs_the_scale() -> None:
    config = make_config(1, "fp16")
    config["fp16"] = {"enabled": True, "initial_scale_power": 4}
    engine = make_engine(config)
    with pytest.raises(RuntimeError, match="scale"):
        engine(*micro_batch(0, 0, torch.float16)).backward()
    engine.zero_grad()
    engine.scale(engine(*micro_batch(0, 0, torch.float16))).backward()
    engine.step()
    assert engine.was_step_applied()


# -- precision, gradients ---------------------------------------------------------------------------------------------


def test_auto_cast_casts_the_inputs() -> None:
    config = make_config(0, "fp16")
    config["fp16"] = {"enabled": True, "auto_cast": True}
    engine = make_engine(config)
    assert math.isfinite(engine(*micro_batch(0, 0)).item())
    config["fp16"] = {"enabled": True}
    with pytest.raises(RuntimeError):
        make_engine(config)(*micro_batch(0, 0))


def test_torch_autocast_computes_in_its_dtype() -> None:
    engine = make_engine(make_config(1, torch_autocast={"enabled": True, "dtype": "bfloat16"}))
    seen = []
    engine.module.head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    train(engine, range(1))
    assert seen == [torch.bfloat16] and next(engine.module.parameters()).dtype == torch.float32


def test_the_norm_is_that_before_clipping_and_none_at_first() -> None:
    engine = make_engine(make_config(2, gradient_clipping=1e-3))
    assert engine.get_global_grad_norm() is None
    train(engine, range(1))
    reference = make_engine(make_config(0, gradient_clipping=0.0))
    train(reference, range(1))
    assert engine.get_global_grad_norm() == reference.get_global_grad_norm() > 1e-3


def test_the_wrapped_optimizer_steps_by_itself() -> None:
    """As lightning's Fabric does: engine.backward, then optimizer.step."""
    by_optimizer, by_engine = make_engine(make_config(2)), make_engine(make_config(2))
    for step in range(2):
        by_optimizer.backward(by_optimizer(*micro_batch(step, 0)))
        by_optimizer.optimizer.step()
        by_optimizer.optimizer.zero_grad()
    train(by_engine, range(2))
    assert engines.same(weights(by_optimizer), weights(by_engine))


def test_the_scheduler_may_be_taken_away() -> None:
    engine = make_engine(make_config(1, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 3}}))
    engine.lr_scheduler = None
    rates = engine.get_lr()
    train(engine, range(2))
    assert engine.get_lr() == rates


def test_the_learning_rate_is_the_clients_to_change() -> None:
    engine = make_engine(make_config(3))
    engine.optimizer.param_groups[0]["lr"] = 0.0
    engine.optimizer.param_groups[0]["weight_decay"] = 0.0
    before = weights(engine)
    train(engine, range(1))
    assert engine.get_lr() == [0.0] and engines.same(weights(engine), before)


# -- listeners, logs --------------------------------------------------------------------------------------------------


class Recorder(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def after_backward(self, engine: Any, loss: torch.Tensor) -> None:
        self.seen.append(("backward", loss.requires_grad))

    def after_step(self, engine: Any) -> None:
        self.seen.append(("step", engine.global_steps))

    def on_save(self, engine: Any, directory: str, tag: str) -> None:
        self.seen.append(("save", tag))

    def on_load(self, engine: Any, directory: str, tag: str) -> None:
        self.seen.append(("load", tag))


def test_callbacks_see_every_moment(tmp_path: Path) -> None:
    engine = make_engine(make_config(1, gradient_accumulation_steps=2))
    recorder = Recorder()
    engine.add_callback(recorder)
    train(engine, range(1))
    engine.save_checkpoint(tmp_path)
    engine.load_checkpoint(tmp_path)
    assert recorder.seen == [
        ("backward", False),
        ("backward", False),
        ("step", 1),
        ("save", "global_step1"),
        ("load", "global_step1"),
    ]


def test_monitors_get_loss_rate_scale_and_norm(tmp_path: Path) -> None:
    config = make_config(1, csv_monitor={"enabled": True, "output_path": str(tmp_path), "job_name": "job"})
    engine = make_engine(config)
    losses = train(engine, range(2))
    engine.destroy()
    tables = {path.stem: path.read_text().splitlines() for path in (tmp_path / "job").glob("*.csv")}
    loss = next(rows for name, rows in tables.items() if name.endswith("train_loss"))
    assert [float(row.split(",")[-1]) for row in loss[1:]] == pytest.approx(losses)
    for name in ("lr", "loss_scale", "grad_norm"):
        assert any(table.endswith(name) for table in tables), name


def logged(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def deepspeed_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.INFO)
    yield caplog
    logger.setLevel(level)


def test_steps_per_print_logs_every_so_often(deepspeed_log: pytest.LogCaptureFixture) -> None:
    train(make_engine(make_config(0, steps_per_print=2)), range(5))
    lines = [line for line in logged(deepspeed_log).splitlines() if line.startswith("step=")]
    assert [line.partition(",")[0] for line in lines] == ["step=2", "step=4"]


@pytest.mark.parametrize("never", [float("inf"), 0])
def test_steps_per_print_may_be_never(never: float, deepspeed_log: pytest.LogCaptureFixture) -> None:
    train(make_engine(make_config(0, steps_per_print=never)), range(3))
    assert "step=" not in logged(deepspeed_log)


def test_wall_clock_breakdown_logs_the_phases(deepspeed_log: pytest.LogCaptureFixture) -> None:
    train(make_engine(make_config(0, wall_clock_breakdown=True)), range(2))
    lines = [line for line in logged(deepspeed_log).splitlines() if line.startswith("time (ms)")]
    assert len(lines) == 2 and all(f"{phase}: " in lines[0] for phase in ("fwd", "bwd", "step"))


def test_memory_breakdown_logs_each_moment(deepspeed_log: pytest.LogCaptureFixture) -> None:
    train(make_engine(make_config(0, memory_breakdown=True)), range(1))
    text = logged(deepspeed_log)
    for moment in ("after initialize", "after backward of step 1", "after step 1"):
        assert f"memory {moment}" in text


def test_dump_state_logs_every_key_with_its_source(deepspeed_log: pytest.LogCaptureFixture) -> None:
    make_engine(make_config(2, dump_state=True))
    assert "zero_optimization.stage" in logged(deepspeed_log) and "config dict" in logged(deepspeed_log)


def test_process_wide_settings_take_effect() -> None:
    from deepspeed.comm import log
    from deepspeed.utils import logger

    level = logger.level
    before = log.settings()
    try:
        engine = make_engine(make_config(0, log_level="error", comms_logger={"enabled": True, "prof_all": True}))
        assert logger.level == logging.ERROR
        assert log.settings().enabled
        train(engine, range(1))
        summary = deepspeed.comm.log_summary(return_dict=True)
        assert summary["metadata"]["world_size"] == 1
    finally:
        logger.setLevel(level)
        log._settings = before
        log.apply_timing()


# -- state dicts ------------------------------------------------------------------------------------------------------


def test_stage_3_keeps_only_shards_between_steps() -> None:
    engine = make_engine(make_config(3))
    assert all(value.numel() == 0 for name, value in engine.module.named_parameters())
    assert engine.module.head.weight.ds_numel == WIDTH
    with deepspeed.zero.unwrap_model_for_generation(engine) as module:
        assert module is engine.module and module.head.weight.shape == (1, WIDTH)


def consolidated(config: dict[str, Any]) -> Any:
    engine = make_engine(config)
    state = engine._consolidated_16bit_state_dict()
    if engine.zero_optimization_stage() == 3:
        other = engine._zero3_consolidated_16bit_state_dict()
        assert (other is None) == (state is None)
    return state


@pytest.mark.parametrize("stage", [2, 3])
def test_the_whole_state_dict_is_rank_0s(stage: int) -> None:
    state, nothing = run_ranks(consolidated, 2, make_config(stage, "bf16"))
    assert nothing is None
    plain = make_net().bfloat16().state_dict()
    assert list(state) == list(plain)
    assert all(torch.equal(state[name].to(value.dtype), value) for name, value in plain.items())


def test_only_stage_3_is_consolidated_as_such() -> None:
    with pytest.raises(ValueError, match="not sharded at stage 2"):
        make_engine(make_config(2))._zero3_consolidated_16bit_state_dict()


def test_load_module_state_dict_changes_masters_too() -> None:
    engine = make_engine(make_config(3, "bf16"))
    target = {name: torch.ones_like(value) for name, value in make_net().state_dict().items()}
    engine.load_module_state_dict(target)
    assert all(torch.equal(value, torch.ones_like(value)) for value in weights(engine).values())
    for parameter in engine.module.parameters():
        assert ds_zero.safe_get_full_fp32_param(parameter).eq(1).all()


def test_compile_keeps_the_module() -> None:
    engine = make_engine(make_config(0))
    assert not engine.is_compiled
    engine.compile(backend="eager")
    assert engine.is_compiled and engine.module.greet() == "plain net"
    train(engine, range(1))
