"""The trainers of transformers, PEFT and TRL on two ranks: the losses of one process without DeepSpeed, resume, export.

Each test runs a script (train_tiny.py) as a user would: through the launcher, at a ZeRO stage, and without DeepSpeed.
Needs transformers and accelerate, and deepspeed as an installed distribution.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from client_scripts import require, run_script

require("transformers", "accelerate")

TINY = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokenizer and, where PEFT is there, an adapter of it."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
    special = {"eos_token": "t1", "pad_token": "t2", "unk_token": "t0"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    try:
        import peft
    except ImportError:
        return folder
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(model, adapter).save_pretrained(folder / "lora")
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs in one process without DeepSpeed, by their options."""
    runs: dict[tuple[str, ...], dict[str, Any]] = {}

    def of(*options: str) -> dict[str, Any]:
        if options not in runs:
            out = tmp_path_factory.mktemp("plain")
            runs[options] = run_script("train_tiny.py", out, options[0], folder, out, *options[1:])
        return runs[options]

    return of


CASES = [
    ("full", 1, ("--accumulation", "2"), 1e-5),
    ("full", 2, ("--accumulation", "2"), 1e-5),
    ("full", 3, ("--accumulation", "2"), 1e-5),
    ("full", 2, ("--bf16",), 0.05),
    ("full", 3, ("--bf16",), 0.05),
    ("lora", 2, (), 1e-5),
    ("lora", 3, (), 1e-5),
    ("sft", 2, (), 1e-5),
    ("sft", 3, (), 1e-5),
    ("resize", 3, (), 1e-5),
]


@pytest.mark.parametrize(("kind", "stage", "options", "tolerance"), CASES)
def test_two_ranks_train_as_one_process_does(
    kind: str, stage: int, options: tuple[str, ...], tolerance: float, folder: Path, plain: Any, tmp_path: Path
) -> None:
    if kind in ("lora", "sft"):
        pytest.importorskip({"lora": "peft", "sft": "trl"}[kind])
    found = run_script("train_tiny.py", tmp_path, kind, folder, tmp_path, "--stage", stage, *options, ranks=2)
    expected = plain("full" if kind == "resize" else kind, *options)
    assert len(found["losses"]) == 4
    assert (found["world"], found["engine"]) == (2, "DeepSpeedEngine")
    for (loss, norm), (loss_alone, norm_alone) in zip(found["losses"], expected["losses"], strict=True):
        assert loss == pytest.approx(loss_alone, rel=tolerance)
        assert norm == pytest.approx(norm_alone, rel=tolerance * 10)
    assert found["again"] == found["losses"]
    check_saved(kind, tmp_path, tolerance)


def check_saved(kind: str, out: Path, tolerance: float) -> None:
    """What save_model left loads without DeepSpeed and knows what was learnt."""
    from safetensors.torch import load_file

    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    saved = load_file(out / "final" / name)
    assert saved and all(value.numel() and bool(value.isfinite().all()) for value in saved.values())
    if kind == "lora":
        assert sum(value.abs().sum().item() for key, value in saved.items() if "lora_B" in key) > 0
        return
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(out / "final", dtype=torch.float32)
    rows = torch.tensor([[(i + j) % 64 for j in range(12)] for i in range(32)])
    assert model(input_ids=rows, labels=rows).loss.item() < 4.0
