"""Saving and resuming through the engine: exact, at any number of ranks and any stage; exports; bad checkpoints."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import make_config, make_engine, make_net, micro_batch, same, train, weights
from safetensors.torch import load_file

import deepspeed
import ds_comm
import ds_zero
from ds_comm.testing import run_ranks
from ds_zero.checkpoint import durable

WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 8, "warmup_max_lr": 0.02}}


# -- resume -----------------------------------------------------------------------------------------------------------


def straight(config: dict[str, Any], steps: int, count: int, dropout: float) -> Any:
    engine = make_engine(config, make_net(dropout=dropout))
    return train(engine, range(steps), count), weights(engine), engine.get_lr()


def first_half(config: dict[str, Any], folder: Path, steps: int, count: int, dropout: float) -> Any:
    engine = make_engine(config, make_net(dropout=dropout))
    losses = train(engine, range(steps), count)
    engine.save_checkpoint(folder, client_state={"epoch": 3, "best": [1.5, None], "table": torch.arange(3)})
    losses += train(engine, [99], count)  # what is saved does not change any more
    return losses[:-1] if ds_comm.get_world_size() == count else losses[: -(count // ds_comm.get_world_size())]


def second_half(config: dict[str, Any], folder: Path, steps: range, count: int, dropout: float) -> Any:
    torch.manual_seed(12345)
    engine = make_engine(config, make_net(dropout=dropout))
    for parameter in engine.module.parameters():  # nothing but the checkpoint may decide
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            parameter.data.add_(1.0)
    path, state = engine.load_checkpoint(folder)
    assert Path(path).name == f"global_step{steps.start}" == (folder / "latest").read_text()
    assert engine.global_steps == steps.start and engine.skipped_steps == 0
    assert state["epoch"] == 3 and state["best"] == [1.5, None] and state["ds_version"] == deepspeed.__version__
    assert torch.equal(state["table"], torch.arange(3))
    return train(engine, steps, count), weights(engine), engine.get_lr()


@pytest.mark.parametrize("fails", [False, True])
def test_the_tags_folder_is_there_when_saving_returns(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers looks for it to load the best model; what fails later leaves none behind."""
    seen, commit = threading.Event(), durable.replace_directory

    def late(*arguments: Any) -> None:
        seen.wait(30)
        if fails:
            raise OSError("no more")
        commit(*arguments)

    monkeypatch.setattr(durable, "replace_directory", late)
    engine = make_engine(make_config(2, "fp32"))
    train(engine, range(1), 1)
    engine.save_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.glob("global_step*")] == ["global_step1"]
    seen.set()
    if not fails:
        engine.wait_for_checkpoint()
        assert engine.load_checkpoint(tmp_path)[0] is not None
        return
    with pytest.raises(ds_zero.CheckpointError, match="no more"):
        engine.wait_for_checkpoint()
    assert not list(tmp_path.glob("global_step*")) and not (tmp_path / "latest").exists()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_resume_is_exact(stage: int, dtype: str, tmp_path: Path) -> None:
    """Dropout shows that each rank's random numbers go on as well."""
    config = make_config(stage, dtype, scheduler=WARMUP)
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 4}
    whole = run_ranks(straight, 2, config, 6, 2, 0.3)
    before = run_ranks(first_half, 2, config, tmp_path, 3, 2, 0.3)
    after = run_ranks(second_half, 2, config, tmp_path, range(3, 6), 2, 0.3)
    for rank in range(2):
        assert before[rank] + after[rank][0] == whole[rank][0]
        assert same(after[rank][1], whole[rank][1])
        assert after[rank][2] == whole[rank][2]


@pytest.mark.parametrize(("stage", "other"), [(0, 3), (3, 1), (2, 0), (1, 2)])
def test_resume_at_another_stage_is_exact(stage: int, other: int, tmp_path: Path) -> None:
    whole = run_ranks(straight, 2, make_config(stage, "bf16"), 6, 2, 0.0)
    run_ranks(first_half, 2, make_config(stage, "bf16"), tmp_path, 3, 2, 0.0)
    after = run_ranks(second_half, 2, make_config(other, "bf16"), tmp_path, range(3, 6), 2, 0.0)
    assert all(same(after[rank][1], whole[rank][1]) for rank in range(2))


def test_resume_at_other_numbers_of_ranks(tmp_path: Path) -> None:
    """Two ranks, then one, then three: six micro-batches each step, so only the order of their sum differs. The
    gradients agree to fp32 rounding, and so do weights after Adam (1e-5); from two ranks to one that accumulates in
    the same order nothing differs where a rank has one micro-batch."""
    per_rank = {1: 6, 2: 3, 3: 2}
    whole = run_ranks(straight, 1, make_config(2, gradient_accumulation_steps=6), 6, 6, 0.0)[0]
    run_ranks(first_half, 2, make_config(2, gradient_accumulation_steps=per_rank[2]), tmp_path, 2, 6, 0.0)
    run_ranks(middle, 1, make_config(3, gradient_accumulation_steps=per_rank[1]), tmp_path, range(2, 4))
    after = run_ranks(
        second_half, 3, make_config(1, gradient_accumulation_steps=per_rank[3]), tmp_path, range(4, 6), 6, 0.0
    )
    for _, state, _ in after:
        assert same(state, after[0][1])
        for name, value in state.items():
            torch.testing.assert_close(value, whole[1][name], rtol=1e-5, atol=1e-5)


def middle(config: dict[str, Any], folder: Path, steps: range) -> None:
    engine = make_engine(config)
    engine.load_checkpoint(folder)
    train(engine, steps, 6)
    engine.save_checkpoint(folder, client_state={"epoch": 3, "best": [1.5, None], "table": torch.arange(3)})


def test_two_ranks_to_one_with_the_same_sums_is_exact(tmp_path: Path) -> None:
    whole = run_ranks(straight, 2, make_config(2, "bf16"), 6, 2, 0.0)
    run_ranks(first_half, 2, make_config(2, "bf16"), tmp_path, 3, 2, 0.0)
    after = run_ranks(
        second_half, 1, make_config(0, "bf16", gradient_accumulation_steps=2), tmp_path, range(3, 6), 2, 0.0
    )
    assert same(after[0][1], whole[0][1])


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
        lambda params: torch.optim.Adagrad(params, lr=0.1),
        lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5, centered=True),
    ],
    ids=["sgd", "amsgrad", "adagrad", "rmsprop"],
)
def test_any_optimizers_state_comes_back(make: Any, tmp_path: Path) -> None:
    config = make_config(2, "bf16")
    del config["optimizer"]
    whole = make_engine(config, optimizer=make)
    train(whole, range(4))
    half = make_engine(config, optimizer=make)
    train(half, range(2))
    half.save_checkpoint(tmp_path)
    rest = make_engine(config, optimizer=make)
    rest.load_checkpoint(tmp_path)
    train(rest, range(2, 4))
    assert same(weights(rest), weights(whole))


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3], gamma=0.1),
    ],
    ids=["lambda", "onecycle", "multistep"],
)
def test_torchs_schedulers_resume(make: Any, tmp_path: Path) -> None:
    whole = make_engine(make_config(1), lr_scheduler=make)
    train(whole, range(4))
    half = make_engine(make_config(1), lr_scheduler=make)
    train(half, range(2))
    half.save_checkpoint(tmp_path)
    rest = make_engine(make_config(1), lr_scheduler=make)
    rest.load_checkpoint(tmp_path)
    train(rest, range(2, 4))
    assert rest.get_lr() == whole.get_lr() and same(weights(rest), weights(whole))


def test_the_loss_scale_goes_on_where_it_was(tmp_path: Path) -> None:
    config = make_config(2, "fp16")
    config["fp16"] = {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 3}
    engine = make_engine(config)
    train(engine, range(4))
    engine.save_checkpoint(tmp_path)
    other = make_engine(config)
    other.load_checkpoint(tmp_path)
    assert other.optimizer.loss_scale == engine.optimizer.loss_scale == 2**7
    train(engine, range(4, 7))
    train(other, range(4, 7))
    assert other.optimizer.loss_scale == engine.optimizer.loss_scale == 2**8


def test_random_numbers_of_all_generators_go_on(tmp_path: Path) -> None:
    engine = make_engine(make_config(0))
    train(engine, range(1))
    engine.save_checkpoint(tmp_path)
    expected = (torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist(), random.gauss(0, 1))
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    engine.load_checkpoint(tmp_path)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist(), random.gauss(0, 1)) == expected


def test_the_data_cursor_goes_on(tmp_path: Path) -> None:
    data = [(x, y) for step in range(8) for x, y in zip(*micro_batch(step, 0), strict=True)]

    def run(engine: Any, batches: Iterator[Any], count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = engine(*next(batches))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses

    whole = make_engine(make_config(1), make_net(dropout=0.3), training_data=data)
    expected = run(whole, iter(whole.training_dataloader), 7)
    half = make_engine(make_config(1), make_net(dropout=0.3), training_data=data)
    begun = run(half, iter(half.training_dataloader), 3)
    half.save_checkpoint(tmp_path)
    rest = make_engine(make_config(1), make_net(dropout=0.3), training_data=data)
    rest.load_checkpoint(tmp_path)
    assert begun + run(rest, iter(rest.training_dataloader), 4) == expected


def test_buffers_come_back(tmp_path: Path) -> None:
    engine = make_engine(make_config(3))
    train(engine, range(4))
    engine.save_checkpoint(tmp_path)
    other = make_engine(make_config(0))
    other.load_checkpoint(tmp_path)
    assert other.module.seen.item() == 4


# -- what of a checkpoint is loaded -----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    engine = make_engine(make_config(2, "bf16", scheduler=WARMUP))
    train(engine, range(3))
    engine.save_checkpoint(tmp_path, client_state={"note": "hello"})
    engine.wait_for_checkpoint()
    return tmp_path


def test_without_latest_and_tag_nothing_is_loaded(tmp_path: Path) -> None:
    engine = make_engine(make_config(2))
    before = weights(engine)
    assert engine.load_checkpoint(tmp_path) == (None, None)
    assert engine.load_checkpoint(tmp_path / "nowhere") == (None, None)
    assert same(weights(engine), before)


def test_a_tag_that_is_not_there_is_an_error(saved: Path) -> None:
    engine = make_engine(make_config(2, "bf16"))
    with pytest.raises(ds_zero.CheckpointError, match="global_step3"):
        engine.load_checkpoint(saved, tag="global_step7")


def test_load_module_only_leaves_everything_else(saved: Path) -> None:
    engine = make_engine(make_config(1, "bf16", scheduler=WARMUP))
    rates = engine.get_lr()
    _, state = engine.load_checkpoint(saved, load_module_only=True)
    assert state["note"] == "hello" and engine.global_steps == 0 and engine.get_lr() == rates
    assert engine.lr_scheduler.last_batch_iteration == -1
    assert not any(s.get("step", 0) for s in engine.optimizer.state.values())


def test_without_optimizer_states_weights_and_counters_come_back(saved: Path) -> None:
    full, partial = make_engine(make_config(2, "bf16")), make_engine(make_config(2, "bf16"))
    full.load_checkpoint(saved)
    partial.load_checkpoint(saved, load_optimizer_states=False, load_lr_scheduler_states=False)
    assert same(weights(full), weights(partial)) and partial.global_steps == 3
    train(full, [3])
    train(partial, [3])
    assert not same(weights(full), weights(partial))


def test_masters_may_come_from_the_16_bit_weights(saved: Path) -> None:
    config = make_config(2, "bf16")
    config["zero_optimization"]["load_from_fp32_weights"] = False
    engine, usual = make_engine(config), make_engine(make_config(2, "bf16"))
    engine.load_checkpoint(saved)
    usual.load_checkpoint(saved)
    rounded = [ds_zero.safe_get_full_fp32_param(p) for p in engine.module.parameters()]
    exact = [ds_zero.safe_get_full_fp32_param(p) for p in usual.module.parameters()]
    assert all(torch.equal(r, e.bfloat16().float()) for r, e in zip(rounded, exact, strict=True))
    assert not all(torch.equal(r, e) for r, e in zip(rounded, exact, strict=True))


def test_a_custom_load_function_gets_the_whole_state_dict(saved: Path) -> None:
    engine = make_engine(make_config(3, "bf16"), make_net(depth=1))

    def load(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
        own = dst.state_dict()
        dst.load_state_dict({name: value for name, value in src.items() if name in own})

    engine.load_checkpoint(saved, custom_load_fn=load, load_module_only=True)
    reference = make_engine(make_config(0, "bf16"))
    reference.load_checkpoint(saved)
    expected = weights(reference)
    assert all(torch.equal(value, expected[name]) for name, value in weights(engine).items())


def test_an_engine_without_optimizer_loads_the_weights(saved: Path) -> None:
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    engine = deepspeed.initialize(model=make_net(), config=config)[0]
    engine.load_checkpoint(saved, load_optimizer_states=False)
    reference = make_engine(make_config(0, "bf16"))
    reference.load_checkpoint(saved)
    assert same(weights(engine), weights(reference))


def test_a_checkpoint_of_another_model_is_refused(saved: Path) -> None:
    engine = make_engine(make_config(2, "bf16"), make_net(depth=3))
    before = weights(engine)
    with pytest.raises(ds_zero.CheckpointError, match=r"(?s)another model.*blocks\.2"):
        engine.load_checkpoint(saved)
    assert same(weights(engine), before)
    engine.load_checkpoint(saved, load_module_strict=False)
    reference = make_engine(make_config(0, "bf16"))
    reference.load_checkpoint(saved)
    after = weights(engine)
    assert all(torch.equal(after[name], value) for name, value in weights(reference).items())


def test_tags_may_be_numbers_and_paths(tmp_path: Path) -> None:
    engine = make_engine(make_config(1))
    train(engine, range(1))
    engine.save_checkpoint(str(tmp_path), 5)
    engine.save_checkpoint(tmp_path, Path("second"), save_latest=False)
    engine.wait_for_checkpoint()
    assert (tmp_path / "latest").read_text() == "5" and (tmp_path / "second").is_dir()
    assert engine.load_checkpoint(tmp_path, Path("second"))[0] == str(tmp_path / "second")
    assert engine.load_checkpoint(tmp_path, 5)[0] == str(tmp_path / "5")


@pytest.mark.parametrize("tag", ["../up", "a/b", ""])
def test_tags_that_leave_the_folder_are_refused(tag: str, tmp_path: Path) -> None:
    engine = make_engine(make_config(1))
    with pytest.raises((ds_zero.CheckpointError, ValueError), match="tag"):
        engine.save_checkpoint(tmp_path, tag)


def test_bad_arguments_of_save(tmp_path: Path) -> None:
    engine = make_engine(make_config(1))
    with pytest.raises(ValueError, match="empty"):
        engine.save_checkpoint("")
    with pytest.raises(TypeError, match=r"client_state.*thing"):
        engine.save_checkpoint(tmp_path, client_state={"thing": object()})
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        engine.save_checkpoint(tmp_path / "file" / "below")


def test_model_parallel_parts_do_not_overwrite_each_other(tmp_path: Path) -> None:
    engine = make_engine(make_config(1))
    engine.mp_world_size = 2
    with pytest.raises(ds_zero.CheckpointError, match="model-parallel"):
        engine.save_checkpoint(tmp_path)
    assert not list(tmp_path.iterdir())


def test_frozen_parameters_may_be_left_out(tmp_path: Path) -> None:
    model = make_net()
    model.blocks.requires_grad_(False)
    engine = make_engine(make_config(3), model, model_parameters=[p for p in model.parameters() if p.requires_grad])
    train(engine, range(2))
    engine.save_checkpoint(tmp_path, exclude_frozen_parameters=True)
    engine.wait_for_checkpoint()
    state = deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert set(state) == {"head.weight", "head.bias", "seen"}
    model = make_net()
    model.blocks.requires_grad_(False)
    other = make_engine(make_config(2), model, model_parameters=model.head.parameters())
    other.load_checkpoint(tmp_path)
    assert same(weights(other), weights(engine))
    assert set(engine.module_state_dict(exclude_frozen_parameters=True)) == {"head.weight", "head.bias", "seen"}


# -- whole models -----------------------------------------------------------------------------------------------------


def save_whole(config: dict[str, Any], folder: Path, name: str) -> tuple[bool, dict[str, torch.Tensor]]:
    engine = make_engine(config)
    train(engine, range(2))
    return engine.save_16bit_model(folder, name), weights(engine)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_the_16_bit_model_loads_into_a_plain_one(stage: int, name: str, tmp_path: Path) -> None:
    (written, expected), _ = run_ranks(save_whole, 2, make_config(stage, "bf16"), tmp_path / "out", name)
    assert written
    path = tmp_path / "out" / name
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    plain = make_net().bfloat16()
    plain.load_state_dict(state)
    assert all(torch.equal(p.float(), expected[n]) for n, p in plain.named_parameters())
    assert [child.name for child in (tmp_path / "out").iterdir()] == [name]


def test_stage_3_without_the_gather_key_saves_nothing(tmp_path: Path) -> None:
    config = make_config(3)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
    engine = make_engine(config)
    assert engine.save_16bit_model(tmp_path) is False
    assert not list(tmp_path.iterdir()) and not engine.zero_gather_16bit_weights_on_model_save()


def test_zero_to_fp32_and_verify_as_commands(saved: Path, tmp_path: Path) -> None:
    def command(*args: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True)

    good = command("-m", "deepspeed.checkpoint", "verify", saved)
    assert good.returncode == 0 and "ok" in good.stdout, good.stderr
    made = command(saved / "zero_to_fp32.py", saved, tmp_path / "out")
    assert made.returncode == 0, made.stderr
    reference = make_engine(make_config(0, "bf16"))
    reference.load_checkpoint(saved)
    state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    for name, parameter in reference.module.named_parameters():
        assert torch.equal(state[name], ds_zero.safe_get_full_fp32_param(parameter))
    tools = deepspeed.utils.zero_to_fp32
    tag = saved / "global_step3"
    assert Path(tools.get_model_state_file(tag, 2)).is_file()
    assert [Path(path).suffix for path in tools.get_optim_files(tag)] == [".safetensors"]
    plain = tools.load_state_dict_from_zero_checkpoint(make_net(), saved)
    assert torch.equal(plain.head.weight, state["head.weight"])

    shard = next(tag.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    bad = command("-m", "deepspeed.checkpoint", "verify", saved)
    assert bad.returncode == 1 and "DAMAGED" in bad.stdout


def test_the_model_is_ordinary_after_destroy() -> None:
    engine = make_engine(make_config(2))
    train(engine, range(1))
    expected = weights(engine)
    model = engine.module
    engine.destroy()
    assert same({name: p.detach() for name, p in model.named_parameters()}, expected)
    model(*micro_batch(0, 0)).backward()
    assert model.head.weight.grad is not None


def test_a_checkpoint_inside_an_accumulation_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(2, gradient_accumulation_steps=2)
    engine = make_engine(config)
    train(engine, range(1))
    engine.save_checkpoint(tmp_path, "whole")
    assert "inside an accumulation" not in caplog.text
    engine.backward(engine(*micro_batch(1, 0)))
    engine.step()
    engine.save_checkpoint(tmp_path, "half")
    assert "inside an accumulation" in caplog.text
    other = make_engine(config)
    other.load_checkpoint(tmp_path, "half")
    assert other.micro_steps == 2 and not other.is_gradient_accumulation_boundary()
