"""What layers may do with what they are given, and what a batch leaves as it was."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from pipe_models import MODELS, WIDTH, Unsplit, batches, loss_fn, state, train_unsplit
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_comm.testing import RankFailure, run_ranks
from ds_pipe import LayerSpec, PipelineError, PipelineModule, pipeline

V = {"num_chunks": 2, "placement": "v"}
Pair = namedtuple("Pair", "left right")


def in_place() -> list[Any]:
    """Every second layer writes to its input: a cut between the two hands it a leaf."""
    return [LayerSpec(nn.Linear, WIDTH, WIDTH), LayerSpec(nn.ReLU, inplace=True)] * 3


class Pairs(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def forward(self, given: Any) -> Any:
        first, second = given if isinstance(given, tuple) else (given, given)
        return Pair(super().forward(first), second)


def last(given: Any) -> torch.Tensor:
    found: torch.Tensor = given[0] + given[1]
    return found


def named() -> list[Any]:
    return [LayerSpec(Pairs) for _ in range(4)] + [last]


class Slope(nn.Module):
    """Gives a derivative of itself, so backward goes through a gradient that was taken in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            at = inputs.detach().requires_grad_()
            height = self.second(self.first(at).tanh()).square().sum()
            (slope,) = torch.autograd.grad(height, at, create_graph=True)
        return inputs + slope


def slopes() -> list[Any]:
    return [layer for _ in range(2) for layer in (LayerSpec(nn.Linear, WIDTH, WIDTH), LayerSpec(Slope))]


class Scaled(torch.autograd.Function):
    """Takes a weight where no torch call shows it."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        return inputs * weight.mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        inputs, weight = ctx.saved_tensors
        return gradients[0] * weight.mean(), ((gradients[0] * inputs).mean()) * torch.ones_like(weight)


class Later(nn.Linear):
    """From its third forward on it uses its weight twice."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        outputs = super().forward(inputs)
        return outputs if self.calls < 3 else outputs + Scaled.apply(inputs, self.weight)  # type: ignore[no-untyped-call]


def later() -> list[Any]:
    return [LayerSpec(Later) for _ in range(4)]


MORE = {"later": later, "in_place": in_place, "named": named, "slopes": slopes}


def train(make: str, schedule: str, options: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    MODELS.update(MORE)
    module = PipelineModule(MODELS[make](), loss_fn=loss_fn, seed_layers=True, partition_method="uniform", **options)
    runner = pipeline(module, schedule=schedule, num_micro_batches=3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, foreach=False)
    data = iter(batches(make, 9))
    losses = [runner.train_batch(data, optimizer).item() for _ in range(2)]
    losses.append(runner.train_batch(data).item())
    return losses, state(module)


RECOMPUTED = {"activation_checkpoint_interval": 1}


@pytest.mark.parametrize(
    ("schedule", "options"), [("1f1b", {}), ("zb_h1", {}), ("zb_h1", RECOMPUTED), ("zb_v", V)], ids=str
)
@pytest.mark.parametrize("model", ["in_place", "later", "named", "slopes"])
def test_layers_of_any_manner(model: str, schedule: str, options: dict[str, Any]) -> None:
    if model == "later" and options == RECOMPUTED:
        pytest.skip("a recompute would be a forward of another kind")
    MODELS.update(MORE)
    losses, weights = train_unsplit(model, 2, 3)
    for found, part in run_ranks(train, 2, model, schedule, options):
        assert found == losses
        for name, value in part.items():
            assert torch.equal(value, weights[name]), name


def modes() -> tuple[list[bool], list[bool]]:
    module = PipelineModule([nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Dropout(), nn.Linear(WIDTH, WIDTH))] * 2)
    runner = pipeline(module, num_micro_batches=2, loss_fn=loss_fn)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.eval()
    before = [part.training for part in module.modules()]
    runner.eval_batch(iter(batches("plain", 2)))
    return before, [part.training for part in module.modules()]


def test_evaluation_leaves_every_module_in_its_mode() -> None:
    for before, after in run_ranks(modes, 2):
        assert after == before and True in before and False in before


def evaluate_by(rows: Sequence[int]) -> list[float]:
    module = PipelineModule(MODELS["plain"](), loss_fn=loss_fn, seed_layers=True)
    runner = pipeline(module, num_micro_batches=2)
    found = []
    for num in rows:
        found.append(runner.eval_batch(iter(batches("plain", 2, rows=num))).item())
        runner.inference((inputs for inputs, _ in batches("plain", 3, rows=num + 1)), 3)
        runner.train_batch(iter(batches("plain", 2)))
    return found


def test_evaluations_may_have_other_shapes() -> None:
    rows = (4, 1, 7)
    module = Unsplit(MODELS["plain"]())
    with torch.no_grad():
        losses = [[loss_fn(module(inputs), labels) for inputs, labels in batches("plain", 2, rows=n)] for n in rows]
    assert run_ranks(evaluate_by, 2, rows) == [[((a + b) / 2).item() for a, b in losses]] * 2


def no_scalar(schedule: str, kind: str) -> str:
    def per_row(outputs: torch.Tensor, labels: torch.Tensor) -> Any:
        rows = (outputs - labels).square().mean(dim=1)
        return rows if kind == "rows" else rows.mean().item()

    module = PipelineModule([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)], loss_fn=per_row)
    with pytest.raises(PipelineError) as error:
        pipeline(module, schedule=schedule, num_micro_batches=2).train_batch(iter(batches("plain", 2)))
    return str(error.value)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_a_loss_that_is_no_scalar_is_told_on_all_stages(schedule: str) -> None:
    for kind, said in (("rows", r"shape (4,)"), ("number", "float")):
        for text in run_ranks(no_scalar, 2, schedule, kind):
            assert "loss_fn returned" in text and said in text


def loss_of_one_element() -> float:
    def of_shape_one(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss_fn(outputs, labels).reshape(1)

    layers = (LayerSpec(nn.Linear, WIDTH, WIDTH) for _ in range(2))
    module = PipelineModule(layers, loss_fn=of_shape_one, seed_layers=True)  # type: ignore[arg-type]
    return pipeline(module, num_micro_batches=1).train_batch(iter(batches("plain", 1))).item()


def test_a_loss_of_one_element_and_layers_from_a_generator() -> None:
    module = Unsplit([LayerSpec(nn.Linear, WIDTH, WIDTH) for _ in range(2)])
    ((inputs, labels),) = batches("plain", 1)
    assert run_ranks(loss_of_one_element, 2) == [loss_fn(module(inputs), labels).item()] * 2


def learning_later(schedule: str) -> list[list[bool]]:
    """Which parameters get a gradient: one half, then the other, tied weights in both."""
    module = PipelineModule(MODELS["tied"](), loss_fn=loss_fn, seed_layers=True, partition_method="uniform")
    parameters = list(module.parameters())
    runner = pipeline(module, schedule=schedule, num_micro_batches=2)
    found = []
    for half in (0, 1, 0):
        for at, parameter in enumerate(parameters):
            parameter.requires_grad_(at % 2 == half)
            parameter.grad = None
        runner.train_batch(iter(batches("tied", 2)))
        found.append([(p.grad is not None) == p.requires_grad for p in parameters])
    return found


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_what_learns_may_change_between_batches(schedule: str) -> None:
    for found in run_ranks(learning_later, 2, schedule):
        assert all(all(batch) for batch in found)


def reentrant(checkpointable: list[str] | None) -> list[bool]:
    function = partial(checkpoint, use_reentrant=True)
    options: Any = {"activation_checkpoint_func": function, "checkpointable_layers": checkpointable}
    layers = [nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)]
    module = PipelineModule(
        layers, loss_fn=loss_fn, partition_method="uniform", activation_checkpoint_interval=1, **options
    )
    pipeline(module, num_micro_batches=2).train_batch(iter(batches("plain", 2)))
    return [parameter.grad is not None for parameter in module.parameters()]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_that_would_learn_nothing_are_refused() -> None:
    with pytest.raises(RankFailure, match="without a gradient for layers 0 to 0"):
        run_ranks(reentrant, 2, None)
    assert run_ranks(reentrant, 2, ["LayerNorm"]) == [[True] * 4] * 2
