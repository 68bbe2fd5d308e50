"""Clients started as users start them: by our launcher and by `accelerate launch`, with DeepSpeed in files or flags.

All that needs no launcher is in the other modules, whose ranks are shared by many cases.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from client_scripts import require, run_script

require("transformers", "accelerate")

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
YAML = """\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  deepspeed_config_file: {config}
  zero3_init_flag: true
machine_rank: 0
num_machines: 1
num_processes: 2
main_process_port: 0
use_cpu: false
"""


def test_the_launcher_starts_a_trainer(folder: Path, tmp_path: Path) -> None:
    """The case itself, and its numbers, are test_trainers.py's."""
    found = run_script("launched_trainer.py", tmp_path, folder, tmp_path, 3, ranks=2)
    assert (found["world"], found["engine"]) == (2, "DeepSpeedEngine")
    assert len(found["losses"]) == 4 and found["again"] == found["losses"]
    assert found["losses"][-1][0] < found["losses"][0][0]


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("plain")
    return run_script("launched_loop.py", out, folder, out)


@pytest.mark.parametrize(("stage", "by"), [(2, "flags"), (3, "yaml")])
def test_accelerate_launch_with_a_deepspeed_config_file(
    stage: int, by: str, folder: Path, plain: Any, tmp_path: Path
) -> None:
    config, settings = tmp_path / "ds.json", tmp_path / "accelerate.yaml"
    zero = {**DS_CONFIG["zero_optimization"], "stage": stage}  # type: ignore[dict-item]
    # With a loader to prepare accelerate fills the micro-batch in itself.
    config.write_text(json.dumps({**DS_CONFIG, "zero_optimization": zero}))
    settings.write_text(YAML.format(config=config))
    flags = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no"]
    flags += ["--dynamo_backend", "no", "--use_deepspeed", "--deepspeed_config_file", str(config)]
    launcher = ["-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(settings)] if by == "yaml" else flags
    found = run_script("launched_loop.py", tmp_path, folder, tmp_path, launcher=launcher)
    assert (found["ranks"], found["engine"]) == (2, "DeepSpeedEngine")
    assert len(found["losses"]) == 8 and found["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert (found["resident"] < plain["resident"]) == (stage == 3)

    from transformers import LlamaForCausalLM

    saved = LlamaForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    rows = torch.tensor([[(i + j) % 64 for j in range(12)] for i in range(32)])
    assert saved(input_ids=rows, labels=rows).loss.item() < plain["losses"][0] - 0.1
