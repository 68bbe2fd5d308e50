"""The trainers of transformers, PEFT and TRL on two ranks: the losses of one process without DeepSpeed, resume, export.

The cases are in hf_cases.py. Needs transformers and accelerate, and deepspeed as an installed distribution.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_cases
import pytest
import torch
from client_scripts import require

from ds_comm.testing import run_ranks

require("transformers", "accelerate")

NEEDS = {"lora": "peft", "sft": "trl", "dpo": "trl"}
RANKS_TIMEOUT = 150.0
"""Seconds for one call: the first one imports transformers, TRL and datasets in every rank."""


@pytest.fixture(scope="session")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs in this process without DeepSpeed, by their options, each once."""
    runs: dict[str, dict[str, Any]] = {}

    def of(kind: str, **options: Any) -> dict[str, Any]:
        key = json.dumps([kind, options], sort_keys=True)
        if key not in runs:
            out = tmp_path_factory.mktemp("plain")
            runs[key] = hf_cases.train(kind, folder, out, None, again=False, **options)
        return runs[key]

    return of


def check_losses(found: Any, expected: Any, tolerance: float) -> None:
    assert len(found) == 4
    for (loss, norm), (loss_alone, norm_alone) in zip(found, expected, strict=True):
        assert loss == pytest.approx(loss_alone, rel=tolerance)
        assert norm == pytest.approx(norm_alone, rel=tolerance * 10)


CASES = [
    ("full", 1, {"accumulation": 2}, 1e-5),
    ("full", 2, {"accumulation": 2}, 1e-5),
    ("full", 3, {"accumulation": 2}, 1e-5),
    ("full", 2, {"bf16": True}, 0.05),
    ("full", 3, {"bf16": True}, 0.05),
    ("lora", 2, {}, 1e-5),
    ("lora", 3, {}, 1e-5),
    ("sft", 2, {}, 1e-5),
    ("sft", 3, {}, 1e-5),
    ("dpo", 2, {}, 1e-4),
    ("dpo", 3, {}, 1e-4),
    ("resize", 3, {}, 1e-5),
    ("kernels", 2, {}, 1e-5),
    ("kernels", 3, {}, 1e-5),
    ("full", 2, {"torch_compile": True, "torch_compile_backend": "aot_eager"}, 1e-5),
    ("full", 3, {"torch_compile": True, "torch_compile_backend": "aot_eager"}, 1e-5),
]


@pytest.mark.parametrize(("kind", "stage", "options", "tolerance"), CASES)
def test_two_ranks_train_as_one_process_does(
    kind: str, stage: int, options: dict[str, Any], tolerance: float, folder: Path, plain: Any, tmp_path: Path
) -> None:
    pytest.importorskip(NEEDS.get(kind, "transformers"))
    expected = plain("full" if kind in ("resize", "kernels") else kind, **options)
    config = hf_cases.ds_config(stage)
    found, _ = run_ranks(hf_cases.train, 2, kind, folder, tmp_path, config, **options, timeout=RANKS_TIMEOUT)
    assert (found["world"], found["engine"]) == (2, "DeepSpeedEngine")
    check_losses(found["losses"], expected["losses"], tolerance)
    if kind == "full":  # at stage 3 from_pretrained makes the model in shards, before there is an engine
        assert (found["resident"] < expected["resident"]) == (stage == 3)
    assert found["again"] == found["losses"]
    check_saved(kind, tmp_path, folder)


def check_saved(kind: str, out: Path, folder: Path) -> None:
    """What save_model left loads without DeepSpeed and knows what was learnt."""
    from safetensors.torch import load_file

    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    saved = load_file(out / "final" / name)
    assert saved and all(value.numel() and bool(value.isfinite().all()) for value in saved.values())
    from transformers import LlamaForCausalLM

    learnt = LlamaForCausalLM.from_pretrained(folder if kind == "lora" else out / "final", dtype=torch.float32)
    if kind == "lora":
        from peft import PeftModel

        assert sum(value.abs().sum().item() for key, value in saved.items() if "lora_B" in key) > 0
        untrained = PeftModel.from_pretrained(learnt, folder / "lora")
        before = loss_of(untrained)
        untrained.load_adapter(str(out / "final"), "trained")
        untrained.set_adapter("trained")
        assert loss_of(untrained) < before
    elif kind != "dpo":  # which prefers, and may read either text worse than before
        assert loss_of(learnt) < 4.0


def loss_of(model: Any) -> float:
    rows = torch.tensor(hf_cases.ROWS)
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_resumes_at_another_number_of_ranks(stage: int, folder: Path, plain: Any, tmp_path: Path) -> None:
    """Two ranks save, one goes on; one saves, two go on: always the same eight samples a step."""
    config, expected = hf_cases.ds_config(stage), plain("full")["losses"]
    for first, then in ((2, 1), (1, 2)):
        out = tmp_path / f"from-{first}"
        run_ranks(hf_cases.train, first, "full", folder, out, config, again=False, timeout=RANKS_TIMEOUT)
        for found in run_ranks(hf_cases.resume, then, "full", folder, out, config):
            check_losses(found, expected, 1e-5)


def test_values_that_the_trainer_fills_in_and_a_config_in_a_file(folder: Path, plain: Any, tmp_path: Path) -> None:
    """The config's optimizer with every value "auto" trains as the trainer's own; the config may be a file."""
    expected = plain("full")["losses"]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(hf_cases.ds_config(3, **hf_cases.AUTO_OPTIMIZER)))
    found, _ = run_ranks(hf_cases.train, 2, "full", folder, tmp_path, str(path), timeout=RANKS_TIMEOUT)
    check_losses(found["losses"], expected, 1e-5)
    assert found["again"] == found["losses"]


@pytest.mark.parametrize("stage", [2, 3])
def test_evaluates_loads_the_best_model_at_the_end_and_predicts(stage: int, folder: Path, tmp_path: Path) -> None:
    expected = hf_cases.evaluate(folder, tmp_path / "plain", None)
    config = hf_cases.ds_config(stage)
    for found in run_ranks(hf_cases.evaluate, 2, folder, tmp_path / "ranks", config, timeout=RANKS_TIMEOUT):
        assert found["engine"] == "DeepSpeedEngine" and found["best"] == expected["best"]
        assert found["seen"] == pytest.approx(expected["seen"], rel=1e-5)
        assert found["last"] == pytest.approx(min(expected["seen"]), rel=1e-5)
        assert (found["logits"] - expected["logits"]).abs().max() < 1e-4
