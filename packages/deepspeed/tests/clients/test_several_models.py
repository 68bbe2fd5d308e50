"""accelerate with several DeepSpeed plugins: one model trains beside one that answers, or two train, on two ranks.

The numbers are those of one process without accelerate and DeepSpeed.
"""

from __future__ import annotations

from typing import Any

import hf_cases
import pytest
import torch
from client_scripts import require

from ds_comm.testing import run_ranks

require("accelerate", "transformers")

STEPS, BATCH = 4, 4


def make(seed: int, width: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.Tanh(), torch.nn.Linear(width, 3))


def inputs(step: int) -> torch.Tensor:
    return torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(step))


def plugin(stage: int, ranks: int) -> Any:
    from accelerate import DeepSpeedPlugin

    config = {
        "train_micro_batch_size_per_gpu": BATCH // ranks,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    return DeepSpeedPlugin(hf_ds_config=config)


def own(x: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    return x[rank * len(x) // ranks : (rank + 1) * len(x) // ranks]


def distil(student: Any, teacher: Any, optimizer: Any, backward: Any, rank: int = 0, ranks: int = 1) -> list[float]:
    losses = []
    for step in range(STEPS):
        x = own(inputs(step), rank, ranks)
        with torch.no_grad():
            wanted = teacher(x)
        loss = torch.nn.functional.mse_loss(student(x), wanted)
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def distil_on_ranks(stages: tuple[int, int]) -> list[float]:
    """The student trains at the first stage, the teacher answers at the second."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    hf_cases.fresh()
    ranks = hf_cases.world_size()
    plugins = {"student": plugin(stages[0], ranks), "teacher": plugin(stages[1], ranks)}
    accelerator = Accelerator(deepspeed_plugins=plugins, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    student, whole_teacher = make(1, 5), make(2, 7)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    student, optimizer = accelerator.prepare(student, optimizer)
    accelerator.state.select_deepspeed_plugin("teacher")
    teacher = accelerator.prepare(whole_teacher)
    teacher.eval()
    resident = sum(parameter.numel() for parameter in whole_teacher.parameters())
    assert (resident == 0) == (stages[1] == 3)
    accelerator.state.select_deepspeed_plugin("student")
    return distil(student, teacher, optimizer, accelerator.backward, accelerator.process_index, ranks)


@pytest.mark.parametrize("stages", [(2, 3), (3, 3)])
def test_one_trains_and_one_answers(stages: tuple[int, int]) -> None:
    student = make(1, 5)
    expected = distil(
        student, make(2, 7), torch.optim.AdamW(student.parameters(), lr=1e-2), lambda loss: loss.backward()
    )
    found = run_ranks(distil_on_ranks, 2, stages, timeout=150)
    means = [(one + two) / 2 for one, two in zip(*found, strict=True)]
    assert means == pytest.approx(expected, rel=1e-5)


def train_both(models: Any, optimizers: Any, backwards: Any, rank: int = 0, ranks: int = 1) -> list[float]:
    """Each model's output is the other's target."""
    losses = []
    for step in range(STEPS):
        x = own(inputs(step), rank, ranks)
        for mine, (model, optimizer, backward) in enumerate(zip(models, optimizers, backwards, strict=True)):
            with torch.no_grad():
                wanted = models[1 - mine](x)
            loss = torch.nn.functional.mse_loss(model(x), wanted)
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def train_both_on_ranks() -> list[float]:
    """Two accelerators, as accelerate's documentation says: each backward goes to its own engine."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    hf_cases.fresh()
    ranks = hf_cases.world_size()
    plugins = {"one": plugin(2, ranks), "two": plugin(3, ranks)}
    first = Accelerator(deepspeed_plugins=plugins, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    second = Accelerator()
    models, optimizers = [], []
    for name, accelerator, model in (("one", first, make(1, 5)), ("two", second, make(2, 7))):
        accelerator.state.select_deepspeed_plugin(name)
        prepared = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        models.append(prepared[0])
        optimizers.append(prepared[1])
    return train_both(models, optimizers, (first.backward, second.backward), first.process_index, ranks)


def test_two_train() -> None:
    models = make(1, 5), make(2, 7)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    expected = train_both(models, optimizers, [lambda loss: loss.backward()] * 2)
    found = run_ranks(train_both_on_ranks, 2, timeout=150)
    means = [(one + two) / 2 for one, two in zip(*found, strict=True)]
    assert means == pytest.approx(expected, rel=1e-5)
