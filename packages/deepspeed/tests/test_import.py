"""`import deepspeed` is nearly free, and everything is reachable from it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import deepspeed

SOURCE = Path(deepspeed.__file__)


def python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=True)


def modules_after(code: str) -> set[str]:
    done = python(f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_a_bare_import_loads_no_heavy_module() -> None:
    added = modules_after("import deepspeed") - modules_after("pass")
    heads = {name.partition(".")[0] for name in added}
    assert not heads & {"torch", "triton", "numba", "numpy", "rich", "pydantic", "tensorboard", "ds_comm", "ds_zero"}
    assert {name for name in added if name.startswith("deepspeed")} == {
        "deepspeed",
        "deepspeed.__about__",
        "deepspeed._lazy",
    }


def test_importtime_shows_a_handful_of_modules() -> None:
    done = python("import deepspeed", "-X", "importtime")
    bare = python("pass", "-X", "importtime")
    assert len(done.stderr.splitlines()) - len(bare.stderr.splitlines()) < 60


def test_a_bare_import_writes_nothing_and_asks_no_device() -> None:
    done = python(
        "import deepspeed, deepspeed.comm, deepspeed.accelerator, deepspeed.zero, torch\n"
        "assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()"
    )
    assert done.stdout == "" and done.stderr == ""


REACHABLE = [
    "zero.Init",
    "zero.GatheredParameters",
    "zero.DeepSpeedZeRoOffload",
    "zero.unwrap_model_for_generation",
    "comm.all_reduce",
    "utils.logger.setLevel",
    "utils.logging.logger",
    "utils.groups._get_sequence_parallel_group",
    "utils.set_z3_leaf_modules",
    "utils.safe_get_full_fp32_param",
    "checkpointing.configure",
    "runtime.lr_schedules.VALID_LR_SCHEDULES",
    "runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3",
    "runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer",
    "runtime.engine.DeepSpeedEngine",
    "runtime.base_optimizer.DeepSpeedOptimizer",
    "runtime.utils.move_to_device",
    "runtime.fp16.loss_scaler.DynamicLossScaler",
    "accelerator.get_accelerator",
    "ops.adam.DeepSpeedCPUAdam",
    "ops.adagrad.DeepSpeedCPUAdagrad",
    "ops.lion.DeepSpeedCPULion",
    "ops.lamb.FusedLamb",
    "runtime.zero.muon.original_muon.MuonWithAuxAdam",
    "set_optimizer_flags",
    "checkpoint.utils.clone_tensors_for_torch_save",
    "monitor.MonitorMaster",
    "PipelineEngine",
    "PipelineModule",
    "init_inference",
    "default_inference_config",
    "inference.engine.InferenceEngine",
    "inference.config.DeepSpeedInferenceConfig",
    "inference.quantization.quantization._init_group_wise_weight_quantization",
    "module_inject.replace_transformer_layer",
    "module_inject.replace_module.revert_transformer_layer",
    "pipe.TiedLayerSpec",
    "runtime.pipe.engine.PipelineEngine",
    "runtime.pipe.module.PipelineModule",
    "runtime.pipe.schedule.TrainSchedule",
    "runtime.pipe.topology.PipelineParallelGrid",
]


def test_reachable_as_attributes_after_a_bare_import() -> None:
    """In one process, where every attribute is asked for first of its package."""
    code = (
        "import json, sys, operator, deepspeed\n"
        "missing = {}\n"
        "for path in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        operator.attrgetter(path)(deepspeed)\n"
        "    except Exception as error:\n"
        "        missing[path] = repr(error)\n"
        "print(json.dumps(missing))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(REACHABLE)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {}


def test_every_name_of_all_exists_and_is_listed() -> None:
    for name in deepspeed.__all__:
        getattr(deepspeed, name)
        assert name in dir(deepspeed) or name in ("HAS_TRITON", "dist")


def test_the_lazy_table_agrees_with_what_type_checkers_see() -> None:
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {*deepspeed._NAMES, *deepspeed._SUBMODULES}


def test_the_function_wins_over_the_submodule_of_the_same_name() -> None:
    done = python(
        "import importlib, deepspeed\n"
        "module = importlib.import_module('deepspeed.initialize')\n"
        "from deepspeed.initialize import initialize\n"
        "assert deepspeed.initialize is initialize is module.initialize, deepspeed.initialize\n"
        "assert deepspeed.comm.comm.__name__ == 'deepspeed.comm.comm'"
    )
    assert done.returncode == 0


@pytest.mark.parametrize("name", ["initialize", "init_distributed", "DeepSpeedEngine"])
def test_patchable_with_autospec(name: str) -> None:
    original = getattr(deepspeed, name)
    with mock.patch(f"deepspeed.{name}", autospec=True) as fake:
        assert getattr(deepspeed, name) is fake
    assert getattr(deepspeed, name) is original
    if name == "initialize":
        with mock.patch("deepspeed.initialize", autospec=True) as fake, pytest.raises(TypeError):
            fake(no_such_argument=1)


def test_aliases_are_one_module() -> None:
    done = python(
        "import deepspeed.zero, deepspeed.checkpointing, sys\n"
        "from unittest import mock\n"
        "assert deepspeed.zero is sys.modules['deepspeed.runtime.zero']\n"
        "real = sys.modules['deepspeed.runtime.activation_checkpointing.checkpointing']\n"
        "assert deepspeed.checkpointing is real\n"
        "with mock.patch('deepspeed.checkpointing.configure') as fake:\n"
        "    assert real.configure is fake\n"
    )
    assert done.returncode == 0


def test_one_engine_class_under_all_paths() -> None:
    assert deepspeed.DeepSpeedEngine is deepspeed.runtime.engine.DeepSpeedEngine


def test_a_name_that_nobody_has_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'init_inferense'$"):
        _ = deepspeed.init_inferense
    assert not hasattr(deepspeed, "DualPipeVModule")


def test_versions() -> None:
    assert deepspeed.__version__ == deepspeed.git_version_info.version
    parts = (deepspeed.__version_major__, deepspeed.__version_minor__, deepspeed.__version_patch__)
    assert parts >= (0, 19, 6)
    assert isinstance(deepspeed.HAS_TRITON, bool)


def test_dist_is_none_before_initialisation() -> None:
    assert python("import deepspeed; print(deepspeed.dist)").stdout == "None\n"
    code = "import deepspeed; deepspeed.init_distributed(); print(deepspeed.dist is deepspeed.comm)"
    assert python(code).stdout.splitlines()[-1] == "True"
