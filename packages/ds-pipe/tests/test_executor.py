"""Pipelines against the unsplit model, to the bit; and every failure a clear error on every stage."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch
from pipe_models import MODELS, WIDTH, Unsplit, batches, loss_fn, plain, state, train_unsplit
from torch import nn

import ds_comm
from ds_comm.testing import run_ranks
from ds_pipe import (
    Action,
    LayerSpec,
    PipelineError,
    PipelineModule,
    PlainSync,
    ScheduleError,
    inference,
    pipeline,
    zb_h1,
    zb_v,
)

Trained = tuple[list[float], dict[str, torch.Tensor]]


def train(model: str, num_steps: int, num_micro_batches: int, schedule: str, options: dict[str, Any]) -> Trained:
    """`num_steps` with an optimizer, then one more batch whose gradients stay."""
    placed = {"zb_v": {"num_chunks": 2, "placement": "v"}, "interleaved": {"num_chunks": 2}}.get(schedule, {})
    options = {**placed, **options}
    dtype, dropout_seed = options.pop("dtype", None), options.pop("dropout_seed", None)
    module = PipelineModule(MODELS[model](), loss_fn=loss_fn, seed_layers=True, **options).to(dtype)
    runner = pipeline(module, schedule=schedule, num_micro_batches=num_micro_batches, dropout_seed=dropout_seed)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, foreach=False) if parameters else None
    data = iter(batches(model, (num_steps + 1) * num_micro_batches, dtype=dtype))
    feed = data if runner.is_first_stage or runner.is_last_stage else None
    losses = [runner.train_batch(feed, optimizer).item() for _ in range(num_steps)]
    losses.append(runner.train_batch(feed).item())
    return losses, state(module)


def check_equal(stages: list[Trained], expected: Trained) -> None:
    losses, weights = expected
    seen = set()
    for stage_losses, stage_weights in stages:
        assert stage_losses == losses
        for name, value in stage_weights.items():
            assert torch.equal(value, weights[name]), name
        seen |= set(stage_weights)
    assert seen == set(weights)
    assert losses[0] != losses[-1]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("num_micro_batches", [1, 2, 5])
@pytest.mark.parametrize("model", sorted(MODELS.keys() - {"everything"}))
def test_two_stages_equal_the_unsplit_model(model: str, num_micro_batches: int, schedule: str) -> None:
    options = {"partition_method": "uniform"}
    stages = run_ranks(train, 2, model, 4, num_micro_batches, schedule, options)
    check_equal(stages, train_unsplit(model, 4, num_micro_batches))


@pytest.mark.parametrize("model", ["plain", "tied"])
def test_three_stages_for_twenty_steps(model: str) -> None:
    stages = run_ranks(train, 3, model, 20, 4, "1f1b", {"partition_method": "uniform"})
    check_equal(stages, train_unsplit(model, 20, 4))


def test_one_stage_is_the_model_itself() -> None:
    check_equal(run_ranks(train, 1, "tied", 3, 2, "1f1b", {}), train_unsplit("tied", 3, 2))


def test_checkpointing_and_dynamic_shape_change_no_bit() -> None:
    options = {"activation_checkpoint_interval": 2, "dynamic_shape": True}
    check_equal(run_ranks(train, 2, "plain", 3, 3, "1f1b", options), train_unsplit("plain", 3, 3))


def test_gloo() -> None:
    stages = run_ranks(train, 2, "tied", 3, 3, "1f1b", {"partition_method": "uniform"}, transport="gloo")
    check_equal(stages, train_unsplit("tied", 3, 3))


class Recording(PlainSync):
    """What the executor calls, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def begin_batch(self, num_micro_batches: int) -> None:
        self.calls.append(f"begin {num_micro_batches}")
        super().begin_batch(num_micro_batches)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        self.calls.append("scaled")
        return super().scaled(loss)

    def end_micro_batch(self, micro_batch: int) -> None:
        self.calls.append(f"end {micro_batch}")

    def tied_sum(self, parameter: nn.Parameter) -> torch.Tensor:
        self.calls.append("tied sum")
        return super().tied_sum(parameter)

    def set_tied_sum(self, parameter: nn.Parameter, total: torch.Tensor) -> None:
        self.calls.append("set tied sum")
        super().set_tied_sum(parameter, total)


def gradients_left(steps: int) -> tuple[list[str], dict[str, torch.Tensor]]:
    module = PipelineModule(MODELS["tied"](), loss_fn=loss_fn, seed_layers=True, partition_method="uniform")
    sync = Recording()
    runner = pipeline(module, num_micro_batches=2, gradient_sync=sync)
    data = iter(batches("tied", 2 * steps))
    for _ in range(steps):
        runner.train_batch(data)
    return sync.calls, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_without_optimizer_gradients_stay_and_add_up() -> None:
    unsplit = Unsplit(MODELS["tied"]())
    for inputs, labels in batches("tied", 4):
        (loss_fn(unsplit(inputs), labels) / 2).backward()
    first, last = run_ranks(gradients_left, 2, 2)
    for name, grad in (*first[1].items(), *last[1].items()):
        assert torch.equal(grad, unsplit.get_parameter(name).grad), name
    assert first[0] == ["begin 2", "end 0", "end 1", "tied sum"] * 2
    assert last[0] == ["begin 2", "scaled", "end 0", "scaled", "end 1", "set tied sum"] * 2


def with_dropout() -> list[Any]:
    return [*plain(2), LayerSpec(nn.Dropout, 0.5), LayerSpec(nn.Linear, WIDTH, WIDTH)]


def evaluate() -> tuple[float, float, bool, bool]:
    module = PipelineModule(with_dropout(), loss_fn=loss_fn, seed_layers=True).train()
    runner = pipeline(module, num_micro_batches=2)
    first = runner.eval_batch(iter(batches("plain", 2))).item()
    runner.train_batch(iter(batches("plain", 2)), torch.optim.SGD(module.parameters(), lr=0.0))
    again = runner.eval_batch(iter(batches("plain", 3)), num_micro_batches=3).item()
    return first, again, module.training, any(p.grad is not None for p in module.parameters())


def test_evaluation() -> None:
    unsplit = Unsplit(with_dropout()).eval()
    with torch.no_grad():
        losses = [loss_fn(unsplit(inputs), labels) for inputs, labels in batches("plain", 3)]
    first, again = (losses[0] + losses[1]) / 2, (losses[0] + losses[1] + losses[2]) / 3
    assert run_ranks(evaluate, 2) == [(first.item(), again.item(), True, False)] * 2


def ways_to_evaluate(schedule: str) -> dict[str, Any]:
    placed: dict[str, Any] = {"zb_v": {"num_chunks": 2, "placement": "v"}, "interleaved": {"num_chunks": 2}}
    module = PipelineModule(MODELS["everything"](), loss_fn=loss_fn, seed_layers=True, **placed.get(schedule, {}))
    pipe = pipeline(module, schedule=schedule, num_micro_batches=4)
    data = batches("everything", 3)
    unlabelled = [(tokens, None) for tokens, _ in data]
    return {
        "last": pipe.is_last_stage,
        "default": pipe.eval_batch(iter(data), num_micro_batches=3),
        "single": pipe.eval_batch(iter(data), reduce_output=None, num_micro_batches=3),
        "here": pipe.eval_batch(iter(data), bcast_loss=False, num_micro_batches=3),
        "pair": pipe.eval_batch(iter(data), return_logits=True, num_micro_batches=3),
        "outputs": pipe.eval_batch(iter(unlabelled), compute_loss=False, reduce_output=None, num_micro_batches=3),
        "mean": pipe.eval_batch(iter(unlabelled), compute_loss=False, num_micro_batches=3),
        "inference": pipe.inference(iter([tokens for tokens, _ in data]), num_micro_batches=3),
        "step": pipe.step,
    }


def equal(mine: Any, theirs: Any) -> bool:
    if isinstance(theirs, list | tuple):
        return len(mine) == len(theirs) and all(map(equal, mine, theirs))
    return mine is None if theirs is None else torch.equal(mine, theirs)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb_v"])
def test_ways_to_evaluate(schedule: str) -> None:
    unsplit = Unsplit(MODELS["everything"]()).eval()
    with torch.no_grad():
        outputs = [unsplit(tokens) for tokens, _ in batches("everything", 3)]
        losses = torch.stack(
            [loss_fn(out, labels) for out, (_, labels) in zip(outputs, batches("everything", 3), strict=True)]
        )
    mean = (losses[0] + losses[1] + losses[2]) / 3
    found = run_ranks(ways_to_evaluate, 2, schedule)
    assert [rank["last"] for rank in found] == ([True, False] if schedule == "zb_v" else [False, True])
    for rank in found:
        last = rank["last"]
        assert equal(rank["default"], mean) and equal(rank["single"], losses)
        assert equal(rank["here"], mean if last else None)
        assert equal(rank["pair"], (mean, outputs if last else None))
        assert equal(rank["outputs"], outputs if last else None) and equal(rank["inference"], outputs if last else None)
        assert equal(rank["mean"], (outputs[0] + outputs[1] + outputs[2]) / 3 if last else None)
        assert rank["step"] == 0


def drawn(seed: int | None) -> tuple[list[float], bool]:
    module = PipelineModule(with_dropout(), loss_fn=loss_fn, seed_layers=True)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    pipe = pipeline(module, num_micro_batches=2, dropout_seed=seed)
    batch = batches("plain", 1)[0]
    losses = [pipe.train_batch(iter([batch, batch])).item() for _ in range(2)]
    pipe.step = 0
    losses.append(pipe.train_batch(iter([batch, batch])).item())
    return losses, torch.equal(before, torch.get_rng_state())


def test_dropout_seeds() -> None:
    one, two = (run_ranks(drawn, 2, seed)[0] for seed in (1, 2))
    assert one[1] and two[1]  # the generators are left alone
    assert one[0][0] != one[0][1] and one[0][0] == one[0][2] and one[0] != two[0]
    assert not run_ranks(drawn, 2, None)[1][1]


def plain_stages() -> list[float]:
    """Any module per rank is a stage."""
    torch.manual_seed(ds_comm.get_rank())
    module = nn.Linear(WIDTH, WIDTH)
    runner = pipeline(module, num_micro_batches=2, loss_fn=loss_fn)
    data = iter(batches("plain", 6))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return [runner.train_batch(data, optimizer).item() for _ in range(3)]


def test_plain_modules() -> None:
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(nn.Linear(WIDTH, WIDTH))
    unsplit = nn.Sequential(*models)
    optimizer = torch.optim.SGD(unsplit.parameters(), lr=0.1, foreach=False)
    data, expected = iter(batches("plain", 6)), []
    for _ in range(3):
        losses = [loss_fn(unsplit(inputs), labels) for inputs, labels in (next(data), next(data))]
        for loss in losses:
            (loss / 2).backward()
        expected.append(((losses[0] + losses[1]) / 2).item())
        optimizer.step()
        optimizer.zero_grad()
    assert run_ranks(plain_stages, 2) == [expected] * 2


class Fails(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        raise ValueError("no more of this")


def failing(how: str, rank: int) -> tuple[str, str]:
    """Both texts: of the failure, and of the next call."""
    layers: list[Any] = [nn.Linear(WIDTH, WIDTH) for _ in range(2 * ds_comm.get_world_size())]
    if how == "layer":
        layers[2 * rank] = Fails()
    runner = pipeline(
        PipelineModule(layers, loss_fn=loss_fn, partition_method="uniform"), num_micro_batches=3, schedule="gpipe"
    )
    data = batches("plain", 3)
    if ds_comm.get_rank() == rank and how == "dry":
        data = data[:2]
    if how == "shape":
        data[1] = batches("plain", 1, rows=2)[0]
    if how == "second step":
        runner.train_batch(iter(data))
        data = data if ds_comm.get_rank() != rank else []
    with pytest.raises(PipelineError) as info:
        runner.train_batch(iter(data))
    with pytest.raises(PipelineError) as again:
        runner.train_batch(iter(data))
    return str(info.value), str(again.value)


def fails_in_schedule(schedule: str, rank: int) -> str:
    layers: list[Any] = [nn.Linear(WIDTH, WIDTH) for _ in range(8)]
    placed: dict[str, Any] = {"zb_v": {"num_chunks": 2, "placement": "v"}, "interleaved": {"num_chunks": 2}}
    if ds_comm.get_rank() == rank:
        layers = [Late() for _ in range(8)]
    module = PipelineModule(layers, loss_fn=loss_fn, partition_method="uniform", **placed.get(schedule, {}))
    pipe = pipeline(module, schedule=schedule, num_micro_batches=4)
    with pytest.raises(PipelineError) as info:
        pipe.train_batch(iter(batches("plain", 4)))
    return str(info.value)


class Late(nn.Linear):
    """Fails in the backward of its third micro-batch."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.count = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = super().forward(input)
        output.register_hook(self.gradient)
        return output

    def gradient(self, _: torch.Tensor) -> None:
        self.count += 1
        if self.count == 3:
            raise ValueError("no more of this")


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb_h1", "zb_v"])
def test_a_failure_in_backward_is_an_error_on_every_stage(schedule: str) -> None:
    for rank in (0, 1):
        for text in run_ranks(fails_in_schedule, 2, schedule, rank, timeout=40):
            assert f"stage {rank}: ValueError: no more of this" in text


@pytest.mark.parametrize(
    ("how", "rank", "text"),
    [
        ("layer", 0, "stage 0: ValueError: no more of this"),
        ("layer", 1, "stage 1: ValueError: no more of this"),
        ("dry", 0, "stage 0: the data iterator ran dry after 2 of 3 micro-batches"),
        ("dry", 1, "stage 1: the data iterator ran dry after 2 of 3 micro-batches"),
        ("second step", 1, "stage 1: the data iterator ran dry after 0 of 3 micro-batches"),
        ("shape", 0, "changed from [float32 (4, 8)] to [float32 (2, 8)]"),
    ],
)
def test_a_failure_is_an_error_on_every_stage(how: str, rank: int, text: str) -> None:
    for first, again in run_ranks(failing, 2, how, rank, timeout=40):
        assert text in first
        assert again == f"this pipeline has failed before and cannot go on: {first}"


def test_three_stages_fail_together() -> None:
    assert all("stage 2: ValueError" in first for first, _ in run_ranks(failing, 3, "layer", 2, timeout=40))


class Dies(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return inputs


def one_dies() -> str:
    layer = Dies() if ds_comm.get_rank() == 1 else nn.Linear(WIDTH, WIDTH)
    runner = pipeline(layer, loss_fn=loss_fn, num_micro_batches=2)
    with pytest.raises(PipelineError) as info:
        runner.train_batch(iter(batches("plain", 2)))
    return str(info.value)


def test_a_stage_that_dies_is_an_error_on_the_others() -> None:
    text, death = run_ranks(one_dies, 2, expect_death=[1], timeout=40)
    # Either a wait ended, which ds-comm explains, or a message could not be started on the broken connection.
    assert "rank 1" in text or text.startswith("stage 0: RuntimeError")
    assert death.exit_code == -signal.SIGKILL


@pytest.fixture
def world() -> Any:
    ds_comm.init_distributed()
    yield
    ds_comm.destroy_process_group()


@pytest.mark.usefixtures("world")
def test_refusals() -> None:
    module = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(PipelineError, match="no loss_fn"):
        pipeline(module)
    with pytest.raises(PipelineError, match="schedule 'inference' only goes forward"):
        pipeline(module, loss_fn=loss_fn, schedule=inference(1, 1))
    with pytest.raises(PipelineError, match=r"'zb_v' has 2 chunk\(s\) per stage.*; the module has 1, on"):
        pipeline(module, loss_fn=loss_fn, schedule=zb_v(1, 1))
    with pytest.raises(PipelineError, match="2 stages and 1 micro-batches; expected the group's 1 ranks"):
        pipeline(module, loss_fn=loss_fn, schedule=zb_h1(2, 1))
    with pytest.raises(ScheduleError, match="2f2b"):
        pipeline(module, loss_fn=loss_fn, schedule="2f2b")
    with pytest.raises(ScheduleError, match="zb_v has 2 chunk"):
        pipeline(PipelineModule(plain(), num_chunks=3), loss_fn=loss_fn, schedule="zb_v")
    with pytest.raises(ScheduleError, match="1f1b has 1 chunk"):
        pipeline(PipelineModule(plain(), num_chunks=2), loss_fn=loss_fn)
    with pytest.raises(PipelineError, match="on the stages"):
        pipeline(PipelineModule(plain()), loss_fn=loss_fn, schedule="interleaved")
    with pytest.raises(PipelineError, match="reduce_output is 'sum'"):
        pipeline(module, loss_fn=loss_fn).eval_batch(iter([]), reduce_output="sum")
    with pytest.raises(PipelineError, match="say which: forward"):
        PipelineModule(plain(), num_chunks=2)(torch.ones(1, WIDTH))
    with pytest.raises(PipelineError, match="data_iter is list"):
        pipeline(module, loss_fn=loss_fn).train_batch([])  # type: ignore[arg-type]


def out_of_order() -> str:
    """Input gradients may come in any order, but not with tied weights."""
    plan = zb_h1(2, 3)
    codes = ["0F0 0F1 0F2 0I0 0I2 0I1 0W0 0W1 0W2", "1F0 1F1 1F2 1I0 1I2 1I1 1W0 1W1 1W2"]
    actions = tuple(tuple(map(Action.parse, line.split())) for line in codes)
    plan = replace(plan, name="mine", actions=actions, peak_live=(3, 3))
    for model in ("plain", "tied"):
        module = PipelineModule(MODELS[model](), loss_fn=loss_fn, partition_method="uniform")
        try:
            pipeline(module, schedule=plan, num_micro_batches=3).train_batch(iter(batches(model, 3)))
        except PipelineError as error:
            return f"{model}: {error}"
    return "nothing"


def test_tied_weights_need_backwards_in_order() -> None:
    found = run_ranks(out_of_order, 2)
    assert all("tied: schedule 'mine': 0I2 comes where micro-batch 1 is next" in text for text in found)
