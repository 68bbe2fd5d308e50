"""Plans against what runs: traffic and checkpoint size of an engine, advice that holds, reports, the command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Net, make_config, make_engine, make_net, train
from torch import Tensor, nn

import deepspeed
import ds_comm
from deepspeed import cli
from deepspeed.errors import DeepSpeedConfigError
from deepspeed.planner import Workload, plan_run
from deepspeed.planner.advice import advise
from deepspeed.planner.command import parse_size
from deepspeed.planner.report import as_html, as_json, as_text, readable
from ds_comm.testing import run_ranks


@pytest.fixture(autouse=True)
def world_of_one() -> Iterator[None]:
    yield
    if ds_comm.is_initialized():
        ds_comm.destroy_process_group()


def net_workload(depth: int = 2) -> Workload:
    with torch.device("meta"):
        model = Net(depth=depth)

    def run(fake: nn.Module, micro_batch: int) -> Tensor:
        x = torch.ones(micro_batch, 8, dtype=next(fake.parameters()).dtype)
        return fake(x, x[:, :1])

    return Workload("net", model, run)


def measured(config: dict[str, Any], folder: str) -> dict[str, Any]:
    engine = make_engine(config, make_net())
    ledger = ds_comm.communicator().ledger
    train(engine, range(2))
    ledger.reset()
    train(engine, range(1))
    rows = ledger.summary()
    traffic = {op: rows[op] for op in ("all_gather", "reduce_scatter", "all_reduce") if op in rows}
    held = {
        "parameters": sum(_nbytes(u.storage.shard if u.sharded else u.storage.full) for u in engine.sharded.units),
        "masters": sum(_nbytes(u.master) for u in engine.sharded.units if _has_master(u)),
        "optimizer": sum(_nbytes(v) for s in engine.optimizer.state.values() for v in s.values() if _is_state(v)),
    }
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()
    return {
        "calls": {op: row["count"] for op, row in traffic.items()},
        "wire_nbytes": sum(row["wire_nbytes"] for row in traffic.values()),
        "held": held,
    }


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _has_master(unit: Any) -> bool:
    return unit.master is not None and unit.master is not unit.storage.own


def _is_state(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


@pytest.mark.parametrize(
    ("stage", "dtype", "optimizer"),
    [(0, "fp32", "AdamW"), (2, "bf16", "AdamW"), (3, "bf16", "Muon"), (3, "fp32", "SGD")],
)
def test_states_traffic_and_checkpoint_are_those_of_an_engine(
    stage: int, dtype: str, optimizer: str, tmp_path: Path
) -> None:
    config = make_config(stage, dtype, gradient_accumulation_steps=2)
    config["optimizer"] = {"type": optimizer, "params": {"lr": 1e-3}}
    plan = plan_run(net_workload(), config, world=2)
    found = run_ranks(measured, 2, config, str(tmp_path))[0]
    assert found["calls"] == {op: count for op, count in plan.forecast.calls.items() if count}
    assert found["wire_nbytes"] == pytest.approx(plan.forecast.wire_nbytes, rel=1e-12)
    assert found["held"] == {owner: plan.forecast.peak.held.get(owner, 0) for owner in found["held"]}
    assert sum(_saved_nbytes(file) for file in tmp_path.rglob("*.safetensors")) == plan.checkpoint_nbytes


def _saved_nbytes(file: Path) -> int:
    """Bytes of the tensors in a shard, the ranks' random states left out."""
    content = file.read_bytes()
    entries = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    spans = [e["data_offsets"] for name, e in entries.items() if not name.startswith(("__metadata__", "rank_extra"))]
    return sum(stop - start for start, stop in spans)


def test_muon_keeps_one_state_of_matrices_and_two_of_the_rest() -> None:
    config = make_config(0, optimizer={"type": "Muon", "params": {"lr": 1e-3}})
    plan = plan_run(net_workload(), config, world=1)
    matrices = 2 * 2 * 8 * 16 + 32  # padded to 32 elements where they are smaller
    assert plan.forecast.peak.held["optimizer"] >= 4 * matrices
    adam = plan_run(net_workload(), make_config(0), world=1)
    assert plan.forecast.peak.held["optimizer"] < adam.forecast.peak.held["optimizer"]


def test_larger_worlds_and_batches() -> None:
    config = make_config(3, train_micro_batch_size_per_gpu=1)
    small, large = (plan_run(net_workload(), config, world=world, device="cuda") for world in (2, 512))
    assert large.forecast.peak.held["parameters"] < small.forecast.peak.held["parameters"]
    more = plan_run(net_workload(), make_config(3, train_micro_batch_size_per_gpu=64), world=2, device="cuda")
    assert more.forecast.peak.held["activations"] > 30 * small.forecast.peak.held["activations"] / 2
    assert small.checkpoint_nbytes == large.checkpoint_nbytes


def test_the_model_is_left_as_it_is() -> None:
    model = make_net()
    before = dict(model.named_parameters())
    workload = Workload("real", model, net_workload().run)
    plan_run(workload, make_config(3), world=4)
    assert dict(model.named_parameters()) == before
    assert type(model.blocks[0].up._parameters) is dict and model.seen.item() == 0
    assert all(p.grad is None and type(p.data) is Tensor for p in model.parameters())


def test_advice_holds_and_ends_with_what_fits() -> None:
    config = make_config(0, train_micro_batch_size_per_gpu=64)
    plan = plan_run(net_workload(), config, world=4, device="cuda")
    assert advise(plan, plan.peak_nbytes) == []
    variants = advise(plan, plan.peak_nbytes // 2)
    assert variants and variants[-1].fits and not any(v.fits for v in variants[:-1])
    final = json.loads(json.dumps(config))
    for path, value in variants[-1].keys.items():
        *parents, name = path.split(".")
        block = final
        for parent in parents:
            block = block.setdefault(parent, {})
        block[name] = value
    again = plan_run(net_workload(), final, world=4, device="cuda")
    assert again.peak_nbytes == variants[-1].peak_nbytes <= plan.peak_nbytes // 2
    hopeless = advise(plan, 10)
    assert hopeless and not any(v.fits for v in hopeless)
    assert "no key of the config makes it fit" in as_text(plan, 10, hopeless)


def test_reports() -> None:
    plan = plan_run(net_workload(), make_config(2), world=2)
    text, page, document = as_text(plan), as_html(plan, 10**9), json.loads(as_json(plan, 10**9))
    for owner in ("parameters", "optimizer", "activations", "units in flight"):
        assert owner in text and owner in page
    assert sum(document["peak"]["held"].values()) == document["peak"]["total"] == plan.peak_nbytes
    assert document["fits"] and "fits in 1.00 GB" in page
    assert page.startswith("<!doctype html>") and not any(word in page for word in ("<script", "http:", "https:"))
    assert readable(999) == "999 B" and readable(1_500_000) == "1.50 MB"


def test_without_an_optimizer_section_and_with_a_split_model() -> None:
    config = make_config(0)
    del config["optimizer"]
    assert "planned for AdamW" in plan_run(net_workload(), config, world=1).notes[0]
    with pytest.raises(DeepSpeedConfigError):
        plan_run(net_workload(), make_config(0, train_batch_size=3, train_micro_batch_size_per_gpu=2), world=2)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("80GB", 80 * 10**9), ("2GiB", 2**31), ("16e9", 16 * 10**9), ("5m", 5 * 10**6)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


def test_a_bad_size() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected one such as"):
        parse_size("much")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="the command reads transformers' configs")
    model = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(model))
    (tmp_path / "ds.json").write_text(json.dumps(make_config(3, "bf16")))
    arguments = ["plan", "--model", str(tmp_path), "--config", str(tmp_path / "ds.json"), "--world", "2"]
    assert cli.main([*arguments, "--html", str(tmp_path / "plan.html"), "--device-memory", "1GB"]) == 0
    assert "ZeRO stage 3, 2 data-parallel ranks on cuda" in capsys.readouterr().out
    assert (tmp_path / "plan.html").read_text().count("<tr>") == 10
    assert cli.main([*arguments, "--json", "--gradient-checkpointing", "--seq-len", "8", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "cpu"
    assert cli.main([*arguments, "--device-memory", "1KB"]) == 1
    assert "does NOT fit" in capsys.readouterr().out
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(arguments) == 2
    assert 'no "model_type"' in capsys.readouterr().err


def test_reached_through_the_package() -> None:
    assert deepspeed.planner.plan_run is plan_run
