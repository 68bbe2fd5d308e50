"""What else a PipelineEngine does, and how it fails: a clear error on every rank, never a wait."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from pipelines import LAYERS, VOCABULARY, Unsplit, data, loss_fn, make_config, make_pipeline, micro_batch
from torch import nn

import deepspeed
import ds_comm
from deepspeed.events import Callback
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology
from deepspeed.utils import groups
from ds_comm.testing import run_ranks

NUM = 2


def config_of(**changes: Any) -> dict[str, Any]:
    return make_config(1, "fp32", NUM, **changes)


# -- evaluation and data ------------------------------------------------------------------------------------------


def evaluate() -> dict[str, Any]:
    engine = make_pipeline("tied", config_of())
    replica = engine.get_data_parallel_rank()

    def batches() -> Any:
        return data(replica, range(1), 3)

    found = {
        "loss": engine.eval_batch(batches(), num_micro_batches=3).item(),
        "each": engine.eval_batch(batches(), reduce_output=None, num_micro_batches=3).tolist(),
        "logits": engine.eval_batch(batches(), return_logits=True, num_micro_batches=3)[1],
        "own": engine.eval_batch(batches(), bcast_loss=False, num_micro_batches=3),
        "outputs": engine.inference_batch((inputs for inputs, _ in batches()), 3),
        "last": engine.is_last_stage(),
        "replica": replica,
    }
    engine.destroy()
    return found


def test_evaluation_equals_the_unsplit_model() -> None:
    module = Unsplit(LAYERS["tied"]())
    with torch.no_grad():
        outputs = [[module(micro_batch(r, 0, i)[0]) for i in range(3)] for r in range(2)]
        losses = [[loss_fn(outputs[r][i], micro_batch(r, 0, i)[1]) for i in range(3)] for r in range(2)]
    means = [(a + b + c) / 3 for a, b, c in losses]
    for found in run_ranks(evaluate, 4):
        replica = found["replica"]
        assert found["loss"] == ((means[0] + means[1]) / 2).item()
        assert found["each"] == [loss.item() for loss in losses[replica]]
        if not found["last"]:
            assert found["logits"] is None and found["own"] is None and found["outputs"] is None
            continue
        assert found["own"].item() == found["loss"]
        for mine in (found["logits"], found["outputs"]):
            assert all(torch.equal(a, b) for a, b in zip(mine, outputs[replica], strict=True))


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def after_backward(self, engine: Any, loss: torch.Tensor) -> None:
        self.seen.append(loss.item())


def ways_to_give_data() -> list[list[float]]:
    """An iterator as argument, one set before, a loader that repeats, dicts through a batch function."""
    runs = []
    pairs = [micro_batch(0, step, i) for step in range(2) for i in range(NUM)]
    for way in ("argument", "iterator", "loader", "batch_fn"):
        engine = make_pipeline("tied", config_of())
        listener = Losses()
        engine.add_callback(listener)
        given = None
        if way == "argument":
            given = iter(pairs)
        elif way == "iterator":
            engine.set_dataiterator(iter(pairs))
        elif way == "loader":
            engine.set_dataloader(pairs)
        else:
            engine.set_dataloader([{"x": inputs, "y": labels} for inputs, labels in pairs])
            engine.set_batch_fn(lambda batch: (batch["x"], batch["y"]))
        losses = [engine.train_batch(given).item() for _ in range(2)]
        if way in ("loader", "batch_fn"):
            engine.train_batch()  # from its beginning again
        assert listener.seen[:2] == losses and engine.micro_steps == len(listener.seen) * NUM
        runs.append(losses)
        engine.destroy()
    return runs


def test_every_way_to_give_data_trains_alike() -> None:
    for runs in run_ranks(ways_to_give_data, 2):
        assert all(losses == runs[0] for losses in runs)


def changing_batches(schedule: str, options: dict[str, Any]) -> list[float]:
    """More micro-batches, then longer sequences, then larger micro-batches, an evaluation before each step."""
    engine = make_pipeline("plain", config_of(pipeline={"schedule": schedule}), **options)
    replica = engine.get_data_parallel_rank()
    losses = []
    for step, (num, rows, length) in enumerate(SHAPES):
        if num != engine.micro_batches:
            engine.set_train_batch_size(rows * 2 * num)
        if rows != engine.train_micro_batch_size_per_gpu():
            engine.set_train_micro_batch_size(rows)
        elif length != SHAPES[0][2]:
            engine.reset_activation_shape()
        assert engine.get_batch_info() == (rows * 2 * num, rows, num)
        batches = [resized(replica, step, i, rows, length) for i in range(num)]
        engine.eval_batch(iter(batches))
        losses.append(engine.train_batch(iter(batches)).item())
    assert engine.global_samples == sum(rows * 2 * num for num, rows, _ in SHAPES)
    with pytest.raises(ValueError, match="not divisible"):
        engine.set_train_batch_size(9)
    engine.destroy()
    return losses


SHAPES = [(NUM, 2, 5), (3, 2, 5), (3, 2, 7), (3, 4, 7)]
"""Number of micro-batches, samples in each, tokens in each sample."""


def resized(replica: int, step: int, index: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10_000 * replica + 100 * step + index)
    tokens = torch.randint(VOCABULARY, (rows, length), generator=generator)
    return tokens, tokens.roll(1, dims=1)


def changing_batches_unsplit() -> list[float]:
    module = Unsplit(LAYERS["plain"]())
    engine = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config_of())[0]
    losses = []
    for step, (num, rows, length) in enumerate(SHAPES):
        engine.set_train_batch_size(engine.train_micro_batch_size_per_gpu() * 2 * num)
        total = torch.zeros(())
        for i in range(num):
            inputs, labels = resized(ds_comm.get_rank(), step, i, rows, length)
            loss = loss_fn(engine(inputs), labels)
            engine.backward(loss)
            engine.set_gradient_accumulation_boundary(i == num - 1)
            engine.step()
            total += loss.detach()
        mean = total / num
        ds_comm.all_reduce(mean)
        losses.append((mean / 2).item())
    engine.destroy()
    return losses


@pytest.mark.parametrize(("schedule", "options"), [("1f1b", {}), ("zb_v", {"num_chunks": 2, "placement": "v"})])
def test_batches_may_change_and_evaluations_come_between(schedule: str, options: dict[str, Any]) -> None:
    expected = run_ranks(changing_batches_unsplit, 2)[0]
    assert run_ranks(changing_batches, 4, schedule, options) == [expected] * 4


# -- the grid -----------------------------------------------------------------------------------------------------


def ask_the_grid() -> dict[str, Any]:
    engine = make_pipeline("plain", config_of())
    grid, rank = engine.grid, ds_comm.get_rank()
    assert engine.mpu is grid is groups.mpu and engine.module.mpu() is grid
    assert (engine.is_first_stage(), engine.is_last_stage()) == (rank < 2, rank >= 2)
    assert grid.stage_to_global(1 - grid.get_stage_id()) == (rank + 2) % 4
    assert grid.stage_to_global(0, data=1) == 1
    found = {
        "pipe": (grid.get_pipe_parallel_rank(), grid.get_pipe_parallel_world_size(), grid.pp_group),
        "data": (
            grid.get_data_parallel_rank(),
            grid.get_data_parallel_world_size(),
            grid.get_data_parallel_group_ranks(),
        ),
        "model": (grid.get_model_parallel_rank(), grid.get_model_parallel_world_size()),
        "slice": (grid.get_slice_parallel_rank(), grid.get_tensor_model_parallel_world_size()),
        "groups": (grid.dp_groups, grid.p2p_groups),
        "batch": engine.get_batch_info(),
    }
    assert grid.get_data_parallel_group_ranks() == grid.dp_group
    for name, group in (("pp_group", grid.get_pipe_parallel_group()), ("dp_group", grid.get_data_parallel_group())):
        assert ds_comm.get_all_ranks_from_group(group) == getattr(grid, name)
    engine.destroy()
    assert groups.mpu is None
    return found


def test_the_grid_knows_who_is_where() -> None:
    for rank, found in enumerate(run_ranks(ask_the_grid, 4)):
        stage, replica = divmod(rank, 2)
        assert found["pipe"] == (stage, 2, [replica, replica + 2])
        assert found["data"] == (replica, 2, [2 * stage, 2 * stage + 1])
        assert found["model"] == (stage, 2)
        assert found["slice"] == (0, 1)
        assert found["groups"] == ([[0, 1], [2, 3]], [[0, 2], [1, 3], [2, 0], [3, 1]])
        assert found["batch"] == (8, 2, 2)


# -- errors -------------------------------------------------------------------------------------------------------


def texts(*calls: Any) -> list[str]:
    """What each call raises: its class and text."""
    found = []
    for call in calls:
        try:
            call()
            found.append("nothing")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def wrong_calls() -> list[str]:
    engine = make_pipeline("plain", config_of())
    found = texts(lambda: engine(torch.zeros(1)), lambda: engine.backward(torch.zeros(1)), engine.step)
    with torch.no_grad():
        found += texts(lambda: engine.train_batch(data(0, range(1), NUM)))
    untrained = PipelineModule(LAYERS["plain"](), num_stages=2, loss_fn=loss_fn)
    config = {key: value for key, value in config_of().items() if key not in ("optimizer", "scheduler")}
    config["zero_optimization"] = {"stage": 0}
    second = deepspeed.initialize(model=untrained, config=config)[0]
    found += texts(lambda: second.train_batch(data(0, range(1), NUM)))
    second.eval_batch(data(0, range(1), NUM))
    return found


def test_what_a_pipeline_has_no_use_for() -> None:
    for forward, backward, step, no_grad, no_optimizer in run_ranks(wrong_calls, 2):
        assert forward.startswith("PipelineError: forward()") and "train_batch()" in forward
        assert backward.startswith("PipelineError: backward()")
        assert step.startswith("PipelineError: step()")
        assert no_grad.startswith("RuntimeError: train_batch() requires gradients enabled")
        assert no_optimizer.startswith("ZeroStateError: engine.train_batch() needs an optimizer")


def wrong_setups() -> list[str]:
    def start(layers: str = "plain", num_stages: int = 2, options: Any = None, **changes: Any) -> Any:
        return lambda: make_pipeline(layers, config_of(**changes), num_stages, **(options or {}))

    grid = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1)
    module = PipelineModule(LAYERS["plain"](), num_stages=2, loss_fn=loss_fn)
    curriculum = {"enabled": True, "curriculum_type": "seqlen", "min_difficulty": 1, "max_difficulty": 2}
    curriculum |= {"schedule_type": "custom"}
    return texts(
        start(num_stages=3),
        start(options={"topology": PipeDataParallelTopology(num_pp=2, num_dp=1)}),
        start(options={"topology": grid}),
        start(num_stages=4, layers="half_frozen", options={"num_chunks": 2}),
        start(pipeline={"schedule": "dualpipe"}),
        start(pipeline={"schedule": "zb_v"}),
        start(pipeline={"stages": 4}),
        start(train_batch_size=16),
        start(torch_autocast={"enabled": True, "dtype": "bfloat16"}),
        start(curriculum_learning=curriculum),
        lambda: deepspeed.initialize(model=module, config=config_of(), mpu=module.mpu()),
    )


def test_wrong_setups_say_what_is_wrong_on_all_ranks() -> None:
    for found in run_ranks(wrong_setups, 4):
        ranks, small, model_axis, layers, unknown, chunks, stages, triangle, autocast, lengths, mpu = found
        assert ranks.startswith("PipelineError: num_stages is 3, but there are 4 ranks")
        assert small.startswith("PipelineError: the topology has 2 ranks")
        assert model_axis.startswith("PipelineError") and "axis 'model'" in model_axis
        assert layers.startswith("PartitionError") and "4 layers" in layers and "8" in layers
        assert unknown.startswith("DeepSpeedConfigError") and "pipeline.schedule" in unknown and "'zb_h1'" in unknown
        assert chunks.startswith("PipelineError") and "num_chunks" in chunks
        assert stages.startswith("ConfigConflictError: pipeline.stages is 4")
        assert triangle.startswith("ConfigConflictError") and "data-parallel ranks = 2" in triangle
        assert autocast.startswith("DeepSpeedConfigError: torch_autocast")
        assert lengths.startswith("DeepSpeedConfigError: curriculum_learning") and "CurriculumScheduler" in lengths
        assert mpu.startswith("DeepSpeedConfigError: mpu was given")


class Fails(nn.Module):
    """Raises in one process in its third forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(VOCABULARY, VOCABULARY)
        self.calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3 and ds_comm.get_rank() == 3:
            raise ArithmeticError("no third time")
        return self.linear(inputs)


def failing(how: str) -> list[str]:
    layers = [LayerSpec(nn.Embedding, VOCABULARY, VOCABULARY), LayerSpec(Fails)]
    module = PipelineModule(layers, num_stages=2, loss_fn=loss_fn)
    engine = deepspeed.initialize(model=module, config=config_of())[0]
    source = data(0, range(2), NUM)
    if how == "data" and engine.get_data_parallel_rank() == 1:
        source = iter([micro_batch(0, 0, i) for i in range(NUM + 1)])
    engine.train_batch(source)
    return texts(lambda: engine.train_batch(source), lambda: engine.train_batch(source))


@pytest.mark.parametrize(("how", "text"), [("layer", "no third time"), ("data", "ran dry after 1 of 2 micro-batches")])
def test_the_failure_of_one_rank_is_one_of_all(how: str, text: str) -> None:
    for first, second in run_ranks(failing, 4, how, timeout=30):
        assert first.startswith("PipelineError") and text in first
        assert second.startswith("PipelineError") and "cannot go on" in second


class Dies(nn.Linear):
    """Ends one process in its third forward."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3 and ds_comm.get_rank() == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(inputs)


def one_dies() -> list[str]:
    layers = [LayerSpec(nn.Embedding, VOCABULARY, VOCABULARY), LayerSpec(Dies, VOCABULARY, VOCABULARY)]
    module = PipelineModule(layers, num_stages=2, loss_fn=loss_fn)
    engine = deepspeed.initialize(model=module, config=config_of())[0]
    source = data(engine.get_data_parallel_rank(), range(2), NUM)
    engine.train_batch(source)
    return texts(lambda: engine.train_batch(source))


def test_a_rank_that_dies_is_an_error_on_the_others() -> None:
    *others, death = run_ranks(one_dies, 4, expect_death=[3], timeout=40)
    assert death.exit_code == -signal.SIGKILL
    assert all(text.startswith("PipelineError") for (text,) in others), others


def nonfinite() -> list[str]:
    """fp32 does not skip: the error names the parameter, on a stage that does not have it as well."""
    engine = make_pipeline("plain", config_of())
    if not engine.is_first_stage():
        with torch.no_grad():
            engine.module.get_parameter("5.weight").fill_(float("inf"))
    source = data(engine.get_data_parallel_rank(), range(1), NUM)
    return texts(lambda: engine.train_batch(source))


def test_a_gradient_that_is_not_finite_is_named_on_all_stages() -> None:
    found = run_ranks(nonfinite, 4)
    assert all(text.startswith("NonFiniteGradientError: the gradient of 0.weight") for (text,) in found), found


def no_iterator() -> list[str]:
    """A loader is no iterator: each step would begin anew with its first batches."""
    engine = make_pipeline("plain", config_of())
    return texts(lambda: engine.train_batch([micro_batch(0, 0, i) for i in range(2 * NUM)]))


def test_data_that_are_no_iterator_are_refused() -> None:
    for (text,) in run_ranks(no_iterator, 2):
        assert text.startswith("PipelineError") and "iter(loader)" in text
