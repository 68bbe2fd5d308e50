"""Recomputation as a setting: the bits of a run without it, less memory, and no collective more."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from engines import WIDTH, Block, Net, make_config, make_engine, micro_batch, same, train, weights

import deepspeed
import ds_comm
from deepspeed.errors import DeepSpeedConfigError
from deepspeed.runtime.activation_checkpointing import policy
from deepspeed.runtime.activation_checkpointing.policy import KeptBytes
from ds_comm.testing import run_ranks


class Mixed(Net):
    """Dropout, a tied and a frozen weight, and blocks of two kinds in one list each."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3, depth=4)
        self.blocks[2].up.weight = self.blocks[0].up.weight
        self.blocks[1].down.weight.requires_grad_(False)
        self.tail = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for layer in self.tail:
            x = layer(x)
        return super().forward(x, target)


def mixed() -> Mixed:
    torch.manual_seed(7)
    return Mixed()


def run(stage: int, dtype: str = "fp32", **section: Any) -> tuple[list[float], Any, int, dict[str, int], list[str]]:
    """Losses, weights, bytes that a forward keeps, collectives of the training, and what is recomputed."""
    model = mixed()
    trainable = [p for p in model.parameters() if p.requires_grad]
    config = make_config(stage, dtype, gradient_accumulation_steps=2, activation_checkpointing=section)
    engine = make_engine(config, model, model_parameters=trainable)
    torch.manual_seed(5 + ds_comm.get_rank())
    ledger = engine.optimizer.comm.ledger
    ledger.reset()
    losses = train(engine, range(3))
    calls = dict(ledger.counts)
    with KeptBytes() as kept:
        loss = engine(*micro_batch(9, 0, next(model.parameters()).dtype))
    nbytes = kept.nbytes
    engine.backward(loss)
    modes = list(engine.recompute.modes.values()) if engine.recompute is not None else []
    return losses, weights(engine), nbytes, calls, modes


POLICIES: list[dict[str, Any]] = [
    {"policy": "none"},
    {"policy": "full"},
    {"policy": "selective"},
    {"policy": "full", "policy_interval": 2},
    {"policy": "full", "cpu_checkpointing": True},
    {"policy": "budget", "policy_budget": 1000},
]


def compare(stage: int, dtype: str) -> list[int]:
    plain = run(stage, dtype)
    kept = [plain[2]]
    for section in POLICIES:
        losses, values, nbytes, calls, modes = run(stage, dtype, **section)
        deepspeed.checkpointing.reset()
        assert losses == plain[0], section
        assert same(values, plain[1]), section
        assert calls == plain[3], section  # also at stage 3: nothing is gathered again for the recomputation
        assert len(modes) == 6
        kept.append(nbytes)
    return kept


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_same_bits_and_collectives_and_less_memory(stage: int, dtype: str) -> None:
    plain, none, full, selective, every_second, offloaded, budget = compare(stage, dtype)
    assert plain == none
    assert full == offloaded  # host memory is where a CPU's activations are anyway
    assert full < selective < none
    assert full < every_second < none
    assert full < budget <= none


@pytest.mark.parametrize("stage", [2, 3])
def test_on_two_ranks(stage: int) -> None:
    for plain, none, full, selective, *_ in run_ranks(compare, 2, stage, "fp32"):
        assert plain == none > selective > full


def test_a_budget_is_kept_with_as_little_recomputation_as_it_allows() -> None:
    model = Net(dropout=0.1, depth=4)
    outside = kept_by(model, "full") - 4 * 2 * WIDTH * 4  # four results of blocks, two rows, fp32
    everything, nothing = kept_by(model, "none") - outside, kept_by(model, "full") - outside
    plans = []
    for budget in (everything, everything - 1, everything - 300, nothing + 200, nothing):
        plan = deepspeed.checkpointing.apply_policy(model, "budget", budget=budget)
        with KeptBytes() as kept:
            loss = model(*micro_batch(0, 0))
        assert nothing <= kept.nbytes - outside <= budget
        plans.append(list(plan.modes.values()))
        del loss
    assert plans[0] == ["none"] * 4
    assert plans[1] == ["selective", "none", "none", "none"]
    assert set(plans[2]) == {"selective", "none"}
    assert set(plans[3]) == {"full", "selective"}
    assert plans[4] == ["full"] * 4


def kept_by(model: nn.Module, policy: Any) -> int:
    deepspeed.checkpointing.apply_policy(model, policy)
    with KeptBytes() as kept:
        loss = model(*micro_batch(0, 0))
    nbytes = kept.nbytes
    del loss
    return nbytes


def test_shorter_inputs_are_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, measured = Net(depth=3), []

    def sizes_of(*_: Any) -> dict[str, int]:
        measured.append(1)
        return {"none": 9, "selective": 8, "full": 7}

    monkeypatch.setattr(policy, "_sizes_of", sizes_of)
    deepspeed.checkpointing.apply_policy(model, "budget", budget=2000)
    for rows, runs in ((6, 1), (5, 1), (4, 1), (6, 1), (7, 2)):
        x = torch.randn(rows, WIDTH)
        model(x, x.sum(dim=1, keepdim=True))
        assert len(measured) == runs * len(model.blocks)


def test_a_budget_is_decided_anew_for_larger_inputs_and_too_small_a_one_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Net(depth=3)
    plan = deepspeed.checkpointing.apply_policy(model, "budget", budget=2000)
    model(*micro_batch(0, 0))
    assert set(plan.modes.values()) == {"none"}
    x = torch.randn(8, WIDTH)
    model(x, x.sum(dim=1, keepdim=True))
    assert set(plan.modes.values()) <= {"selective", "full"}
    logging.getLogger("DeepSpeed").addHandler(caplog.handler)
    try:
        deepspeed.checkpointing.apply_policy(model, "budget", budget=7)
        model(*micro_batch(0, 0))
    finally:
        logging.getLogger("DeepSpeed").removeHandler(caplog.handler)
    assert "more than policy_budget 7" in caplog.text


class Stubborn(Block):
    """A block that needs to see numbers, and so does not run on tensors without content."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.detach().sum()) == float("inf"):
            raise ValueError("no")
        return super().forward(x)


def test_a_block_whose_bytes_cannot_be_known_is_recomputed_in_full(caplog: pytest.LogCaptureFixture) -> None:
    model = Net(depth=2)
    model.blocks = nn.ModuleList(Stubborn(0.0) for _ in range(2))
    plan = deepspeed.checkpointing.apply_policy(model, "budget", budget=1 << 30)
    logging.getLogger("DeepSpeed").addHandler(caplog.handler)
    try:
        model(*micro_batch(0, 0)).backward()
    finally:
        logging.getLogger("DeepSpeed").removeHandler(caplog.handler)
    assert set(plan.modes.values()) == {"full"}
    assert "Stubborn does not run on tensors without content" in caplog.text


class SelfMade(Block):
    """A block that checkpoints itself when told to, as those of transformers do."""

    gradient_checkpointing = False
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and self.training:
            out: torch.Tensor = torch.utils.checkpoint.checkpoint(self.inside, x, use_reentrant=False)
            return out
        return self.inside(x)

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        SelfMade.calls += 1
        return super().forward(x)


@pytest.mark.parametrize(("own", "policy", "calls"), [(True, "full", 4), (True, None, 4), (False, "full", 4)])
def test_a_block_that_checkpoints_itself_is_recomputed_once(own: bool, policy: Any, calls: int) -> None:
    model = Net(depth=2)
    model.blocks = nn.ModuleList(SelfMade(0.0) for _ in range(2))
    for block in model.blocks:
        block.gradient_checkpointing = own
    if policy is not None:
        deepspeed.checkpointing.apply_policy(model, policy)
    SelfMade.calls = 0
    model(*micro_batch(0, 0)).backward()
    assert SelfMade.calls == calls


def test_closing_and_none_restore_the_blocks() -> None:
    model = Net(depth=2)
    plan = deepspeed.checkpointing.apply_policy(model, "full")
    assert "forward" in model.blocks[0].__dict__
    plan.close()
    assert "forward" not in model.blocks[0].__dict__
    deepspeed.checkpointing.apply_policy(model, "selective")
    deepspeed.checkpointing.apply_policy(model, "none")
    assert "forward" not in model.blocks[0].__dict__
    engine = make_engine(make_config(3, activation_checkpointing={"policy": "full"}))
    engine.destroy()
    assert "forward" not in engine.module.blocks[0].__dict__


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_blocks_are_recomputed_too(policy: str, backend: str) -> None:
    def trained(compiles: bool) -> tuple[list[float], Any]:
        torch.manual_seed(3)
        engine = make_engine(make_config(3, activation_checkpointing={"policy": policy}), Net(dropout=0.3, depth=2))
        if compiles:
            engine.compile(backend=backend, compile_kwargs={"fullgraph": True})
        torch.manual_seed(4)
        return train(engine, range(2)), weights(engine)

    expected, found = trained(False), trained(True)
    torch._dynamo.reset()
    assert found[0] == expected[0]
    assert same(found[1], expected[1])


def test_what_is_refused_says_what_to_do() -> None:
    model = Net()
    with pytest.raises(DeepSpeedConfigError, match="policy is 'half'; expected 'none', 'full'"):
        deepspeed.checkpointing.apply_policy(model, "half")  # type: ignore[arg-type]
    with pytest.raises(DeepSpeedConfigError, match="policy_interval is 0"):
        deepspeed.checkpointing.apply_policy(model, "full", interval=0)
    with pytest.raises(DeepSpeedConfigError, match="policy_budget is 5; give bytes"):
        deepspeed.checkpointing.apply_policy(model, "full", budget=5)
    with pytest.raises(DeepSpeedConfigError, match="policy_budget is None"):
        make_engine(make_config(1, activation_checkpointing={"policy": "budget"}))
    with pytest.raises(DeepSpeedConfigError, match="activation_checkpoint_interval 2 and"):
        make_engine(
            make_config(1, activation_checkpointing={"policy": "full"}, pipeline={"activation_checkpoint_interval": 2})
        )
