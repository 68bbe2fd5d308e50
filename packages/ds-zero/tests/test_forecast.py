"""What is foreseen equals what runs: states, collectives and wire exactly, the whole peak within a tenth."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import zero_helpers as z
from torch import Tensor, nn

import ds_comm
import ds_zero
from ds_comm.testing import run_ranks
from ds_zero.forecast import forecast

WIDTH, DEPTH, TOKENS = 768, 4, 384


def build(name: str, freeze: bool = False) -> nn.Module:
    model = z.build(name)
    model.blocks[1].requires_grad_(not freeze)
    return model


def step(name: str, stage: int, dtype: str | None, micro: int, freeze: bool, kind: str) -> None:
    """Hold the forecast against the ledger of the second step of a run."""
    config = z.zero_config(stage, dtype=dtype, gradient_accumulation_steps=micro)
    expected = forecast(
        build(name, freeze), lambda m: m(z.batch(0)), config=config, num_shards=ds_comm.get_world_size(), kind=kind
    )
    model = build(name, freeze)
    trained = [p for p in model.parameters() if p.requires_grad]
    model, zero = ds_zero.shard(model, z.OPTIMIZERS["adamw"](trained), config=config)
    assert zero is not None and expected.shard_map == zero.shard_map
    ledger = ds_comm.communicator().ledger
    assert ds_comm.communicator().kind == kind
    for _ in range(2):
        ledger.reset()
        for _ in range(micro):
            zero.backward(model(z.batch(0)))
        zero.step()
    counts: dict[str, int] = {}
    for (op, _), count in ledger.counts.items():
        counts[op] = counts.get(op, 0) + count
    wanted = ("all_gather", "reduce_scatter", "all_reduce")
    found = {op: counts.get(op, 0) for op in wanted}
    assert found == {op: expected.calls.get(op, 0) for op in wanted}, name
    assert ledger.wire_elements == pytest.approx(expected.wire_elements, rel=1e-15)
    rows = ledger.summary()
    sent = sum(rows[op]["wire_nbytes"] for op in wanted if op in rows)
    assert sent == pytest.approx(expected.wire_nbytes, rel=1e-15)


@pytest.mark.parametrize(("dtype", "micro", "freeze"), [("bf16", 1, False), (None, 3, True)])
@pytest.mark.parametrize("stage", range(4))
def test_collectives_and_wire_are_those_of_the_run(stage: int, dtype: str | None, micro: int, freeze: bool) -> None:
    run_ranks(step, 2, "Net", stage, dtype, micro, freeze, "shm")
    if stage == 3:
        run_ranks(step, 3, "Net", stage, dtype, micro, freeze, "gloo", transport="gloo")


KINDS = (
    "Tied Frozen Unused Twice Checkpointed CheckpointedReentrant CheckpointedWhole Attention RootParameters Recurrent"
)


@pytest.mark.parametrize("name", [*KINDS.split(), "Mixed"])
def test_models_of_every_kind(name: str) -> None:
    run_ranks(step, 2, name, 3, None, 1, False, "shm")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.float().square().mean()


def stack_loss(model: nn.Module) -> Tensor:
    return model(torch.ones(TOKENS, WIDTH, dtype=next(model.parameters()).dtype))


def held(pid: int) -> int:
    """Bytes of data that a process holds now: anonymous memory, and its share of what is shared with others."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))


def trainer(rank: int, stage: int, dtype: str | None, folder: str, go: Any, ready: Any) -> None:
    """A fresh process: warm up on a small model, say so, then train the large one for three steps."""
    ds_comm.init_distributed("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    warm = nn.Linear(64, 64)
    _, small = ds_zero.shard(warm, torch.optim.AdamW(warm.parameters()), config={"stage": stage, "dtype": dtype})
    assert small is not None and ds_comm.communicator().kind == "shm"
    for _ in range(2):
        small.backward(warm(torch.ones(1, 64, dtype=warm.weight.dtype)).float().sum())
        small.step()
    ready.wait()
    go.wait()
    model = Stack()
    config = {"stage": stage, "dtype": dtype, "param_persistence_threshold": 0}
    _, zero = ds_zero.shard(model, torch.optim.AdamW(model.parameters()), config=config)
    assert zero is not None
    for _ in range(2):
        zero.backward(stack_loss(model))
        zero.step()
    ready.wait()
    go.wait()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("stage", "dtype"), [(2, None), (3, None)])
def test_the_whole_peak_is_within_a_tenth(
    stage: int, dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed is given back: live bytes, not malloc's heap
    with torch.device("meta"):
        model = Stack()
    config = ds_zero.ZeroConfig(stage=stage, dtype=dtype, param_persistence_threshold=0)
    expected = forecast(model, stack_loss, config=config, num_shards=2, kind="shm").peak.total
    context = multiprocessing.get_context("spawn")
    go, ready = context.Barrier(3), context.Barrier(3)
    ranks = [context.Process(target=trainer, args=(r, stage, dtype, str(tmp_path), go, ready)) for r in range(2)]
    for process in ranks:
        process.start()
    try:
        ready.wait(120)
        pids = [process.pid for process in ranks if process.pid is not None]
        before, peaks = [held(pid) for pid in pids], [0, 0]
        go.wait(120)
        watch = threading.Thread(target=ready.wait, args=(120,))
        watch.start()
        while watch.is_alive():
            peaks = [max(peak, held(pid)) for peak, pid in zip(peaks, pids, strict=True)]
        go.wait(120)
    finally:
        for process in ranks:
            process.join(30)
            process.kill()
    measured = max(peak - was for peak, was in zip(peaks, before, strict=True))
    assert measured == pytest.approx(expected, rel=0.1), (measured, expected)
