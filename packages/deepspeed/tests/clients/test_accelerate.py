"""accelerate drives the engine: prepare, backward, accumulation, clipping, save and load, on two CPU ranks.

Needs accelerate, and deepspeed as an installed distribution (which is how accelerate finds it).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from client_scripts import require

sys.path.insert(0, str(Path(__file__).parents[1]))

from engines import make_net, micro_batch, same, weights

import deepspeed
import ds_comm
from ds_comm.testing import run_ranks

require("accelerate")

ENVIRONMENT = {"ACCELERATE_USE_DEEPSPEED": "true"}


def make_accelerator(stage: int, precision: str, accumulation: int) -> Any:
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import InitProcessGroupKwargs

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    plugin = DeepSpeedPlugin(
        zero_stage=stage, gradient_accumulation_steps=accumulation, gradient_clipping=1.0, zero3_save_16bit_model=True
    )
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
    return Accelerator(
        deepspeed_plugin=plugin, mixed_precision=precision, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")]
    )


def drive(accelerator: Any, prepared: tuple[Any, Any, Any], steps: range, accumulation: int) -> list[float]:
    engine, optimizer, scheduler = prepared
    losses = []
    dtype = next(engine.module.parameters()).dtype
    for step in steps:
        for index in range(accumulation):
            with accelerator.accumulate(engine):
                loss = engine(*micro_batch(step, accelerator.process_index * accumulation + index, dtype))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(engine.parameters(), 1.0)
                    assert norm is None or isinstance(norm, (int, float))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    return losses


def prepare(accelerator: Any) -> tuple[Any, Any, Any]:
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t)
    return accelerator.prepare(model, optimizer, scheduler)  # type: ignore[no-any-return]


def train_and_resume(stage: int, precision: str, accumulation: int, folder: Path) -> Any:
    accelerator = make_accelerator(stage, precision, accumulation)
    assert accelerator.num_processes == ds_comm.get_world_size()
    engine, optimizer, scheduler = prepare(accelerator)
    assert type(engine) is deepspeed.DeepSpeedEngine and accelerator.unwrap_model(engine) is engine.module
    drive(accelerator, (engine, optimizer, scheduler), range(2), accumulation)
    accelerator.save_state(str(folder))
    begun = engine.global_steps
    rest = drive(accelerator, (engine, optimizer, scheduler), range(2, 4), accumulation)
    expected = weights(engine)
    state = accelerator.get_state_dict(engine)
    if state is not None:
        for name, value in expected.items():
            assert torch.equal(state[name].float(), value)
    accelerator.free_memory()

    accelerator = make_accelerator(stage, precision, accumulation)
    engine, optimizer, scheduler = prepare(accelerator)
    accelerator.load_state(str(folder))
    assert engine.global_steps == begun == 2
    again = drive(accelerator, (engine, optimizer, scheduler), range(2, 4), accumulation)
    assert again == rest and same(weights(engine), expected)
    return expected


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("precision", "accumulation"), [("no", 2), ("bf16", 1)])
def test_train_save_and_resume(stage: int, precision: str, accumulation: int, tmp_path: Path) -> None:
    one, two = run_ranks(train_and_resume, 2, stage, precision, accumulation, tmp_path, env=ENVIRONMENT)
    assert same(one, two)


def train_from_the_config(folder: Path) -> list[float]:
    """accelerate's placeholders: optimizer and scheduler come from the config, "auto" values from the placeholders."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DummyOptim, DummyScheduler, InitProcessGroupKwargs

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "fp16": {"enabled": True, "initial_scale_power": 4},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
                "total_num_steps": "auto",
            },
        },
        "steps_per_print": float("inf"),
    }
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        mixed_precision="fp16",
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    model = make_net()
    optimizer = DummyOptim(model.parameters(), lr=1e-2, weight_decay=0.0)
    scheduler = DummyScheduler(optimizer, total_num_steps=8, warmup_num_steps=2)
    prepared = accelerator.prepare(model, optimizer, scheduler)
    losses = drive(accelerator, prepared, range(4), 1)
    assert type(prepared[0].lr_scheduler).__name__ == "WarmupDecayLR" and prepared[0].global_steps == 4
    assert not prepared[1].step_was_skipped
    return losses


def test_optimizer_and_scheduler_from_the_config(tmp_path: Path) -> None:
    for losses in run_ranks(train_from_the_config, 2, tmp_path, env=ENVIRONMENT):
        assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)


def train_offloaded() -> str:
    """Offload to the CPU makes accelerate replace AdamW by DeepSpeedCPUAdam."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import InitProcessGroupKwargs

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    plugin = DeepSpeedPlugin(zero_stage=2, offload_optimizer_device="cpu", offload_param_device="cpu")
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
    accelerator = Accelerator(
        deepspeed_plugin=plugin, mixed_precision="fp16", kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")]
    )
    prepared = prepare(accelerator)
    losses = drive(accelerator, prepared, range(3), 1)
    assert len(losses) == 3
    return type(prepared[0].basic_optimizer).__name__


def test_offload_to_the_cpu_takes_upstreams_cpu_adam() -> None:
    assert run_ranks(train_offloaded, 1, env=ENVIRONMENT) == ["DeepSpeedCPUAdam"]
