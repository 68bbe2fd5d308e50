"""From the user's dict to the resolved config: what clients send, what is refused, where each value came from."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from deepspeed.config import ResolvedConfig, parse_config, resolve
from deepspeed.errors import ConfigConflictError, DeepSpeedConfigError


def made(ranks: int = 1, device_type: str = "cpu", **keys: Any) -> ResolvedConfig:
    return resolve({"train_batch_size": 8, **keys}, dp_world_size=ranks, device_type=device_type)


def refusal(**keys: Any) -> str:
    with pytest.raises(DeepSpeedConfigError) as caught:
        made(**keys)
    return str(caught.value)


class TestWhatClientsSend:
    def test_accelerate(self) -> None:
        config = made(
            train_micro_batch_size_per_gpu=4,
            gradient_accumulation_steps=2,
            zero_optimization={
                "stage": 2,
                "offload_optimizer": {"device": "none", "nvme_path": None},
                "offload_param": {"device": "cpu", "nvme_path": None},
                "stage3_gather_16bit_weights_on_model_save": False,
            },
            gradient_clipping=1.0,
            steps_per_print=float("inf"),
            bf16={"enabled": True},
            fp16={"enabled": False},
            zero_allow_untested_optimizer=True,
            msamp={"enabled": True},
        )
        assert config.steps_per_print == float("inf")
        assert config.model_dtype == "bf16"

    def test_transformers_auto_everywhere(self) -> None:
        config = resolve(
            {
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "zero_optimization": {
                    "stage": 3,
                    "reduce_bucket_size": "auto",
                    "stage3_prefetch_bucket_size": 0.9 * 2e8,
                },
                "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.99], "weight_decay": "auto"}},
                "bf16": {"enabled": "auto"},
                "fp16": {"enabled": "auto", "loss_scale": 0},
            },
            dp_world_size=2,
        )
        assert config.optimizer is not None and config.optimizer.params == {"betas": [0.9, 0.99]}
        assert config.zero_optimization.reduce_bucket_size == 500_000_000
        assert config.zero_optimization.stage3_prefetch_bucket_size == 180_000_000
        assert config.sources["gradient_clipping"] == 'default (config dict says "auto")'
        assert config.train_batch_size == 2

    def test_lightning(self) -> None:
        offload = {"device": "cpu", "nvme_path": "/local_nvme", "buffer_count": 5, "pin_memory": False}
        config = made(
            activation_checkpointing={
                "partition_activations": False,
                "cpu_checkpointing": False,
                "contiguous_memory_optimization": False,
                "synchronize_checkpoint_boundary": False,
            },
            aio={
                "block_size": 1048576,
                "queue_depth": 8,
                "single_submit": False,
                "overlap_events": True,
                "thread_count": 1,
            },
            zero_allow_untested_optimizer=True,
            zero_optimization={
                "stage": 3,
                "contiguous_gradients": True,
                "overlap_comm": True,
                "allgather_partitions": True,
                "reduce_scatter": True,
                "allgather_bucket_size": 2e8,
                "reduce_bucket_size": 2e8,
                "sub_group_size": 1e12,
                "offload_optimizer": offload,
                "offload_param": {**offload, "buffer_size": 1e8, "max_in_cpu": 1e9},
            },
            gradient_clipping=0.0,
            fp16={
                "enabled": True,
                "loss_scale": 0,
                "initial_scale_power": 16,
                "loss_scale_window": 1000,
                "hysteresis": 2,
                "min_loss_scale": 1,
            },
            scheduler={"type": "WarmupLR", "params": {"last_batch_iteration": -1, "warmup_num_steps": 10}},
            optimizer={"type": "SGD", "params": {"lr": 1e-3}},
        )
        assert config.zero_optimization.sub_group_size == 10**12
        assert config.fp16.initial_scale == 65536.0

    def test_disabled_blocks_of_features_that_are_not_there(self) -> None:
        made(
            amp={"enabled": False, "opt_level": "O1"},
            flops_profiler={"enabled": False, "profile_step": 3},
            compression_training={"weight_quantization": {"shared_parameters": {"enabled": False}}},
            elasticity={"enabled": False},
            autotuning={"enabled": False, "fast": False},
            curriculum_learning={"enabled": False},
            data_efficiency={"enabled": False, "data_sampling": {"enabled": True}},
            nebula={"enabled": False},
            hybrid_engine={"enabled": False, "max_out_tokens": 128},
            compile={"deepcompile": False, "debug_log": True},
            tensor_parallel={"autotp_size": 1},
            sparse_attention={},
            weight_quantization={"enabled": False},
            zero_optimization={"stage": 1, "zenflow": None, "mics_shard_size": -1},
        )


class TestWords:
    def test_nearest_key_with_path_and_value(self) -> None:
        text = refusal(zero_optimization={"overlap_com": True})
        assert "zero_optimization.overlap_com: unknown key; did you mean overlap_comm? (value True)" in text

    def test_aliases_count_as_known(self) -> None:
        assert "did you mean prefetch_bucket_size?" in refusal(zero_optimization={"prefetch_buket_size": 1})

    @pytest.mark.parametrize("depth", ["offload_optimizer", "leaf_module"])
    def test_at_any_depth(self, depth: str) -> None:
        assert f"zero_optimization.{depth}.nonsense: unknown key" in refusal(zero_optimization={depth: {"nonsense": 1}})

    @pytest.mark.parametrize(
        "section", ["aio", "activation_checkpointing", "checkpoint", "flops_profiler", "data_types"]
    )
    def test_sections_that_upstream_leaves_open(self, section: str) -> None:
        assert f"{section}.tag_validaton: unknown key" in refusal(**{section: {"tag_validaton": 1}})

    def test_key_in_the_wrong_place(self) -> None:
        assert "did you mean zero_optimization.stage?" in refusal(fp16={"stage": 3})

    def test_misspelt_top_level(self) -> None:
        assert "gradient_cliping: unknown key; did you mean gradient_clipping?" in refusal(gradient_cliping=1)
        assert "zero_optimisation: unknown key; did you mean zero_optimization?" in refusal(zero_optimisation={})

    def test_foreign_top_level_key_warns(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="DeepSpeed"):
            made(msamp={"enabled": True}, stage=3, **{"x-comment": "fine"})
        texts = [record.getMessage() for record in caplog.records]
        assert len(texts) == 2
        assert "msamp: unknown top-level key" in texts[0]
        assert "stage: unknown top-level key" in texts[1] and "did you mean zero_optimization.stage?" in texts[1]

    def test_all_problems_at_once(self) -> None:
        text = refusal(zero_optimization={"stage": 4, "overlap_com": 1}, fp16={"loss_scale": -1})
        assert "3 problems" in text
        assert "zero_optimization.stage: got 4; there is no such ZeRO stage; the stages are 0, 1, 2 and 3" in text

    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            ({"train_batch_size": 8.5}, "train_batch_size: got 8.5; input should be a valid integer"),
            ({"train_batch_size": True}, "train_batch_size: got True; expected a number, not a boolean"),
            ({"train_batch_size": 0}, "train_batch_size: got 0; input should be greater than 0"),
            ({"fp16": {"loss_scale": float("inf")}}, "fp16.loss_scale: got inf; input should be a finite number"),
            ({"fp16": {"loss_scale": True}}, "fp16.loss_scale: got True"),
            ({"fp16": {"enabled": True, "loss_scale_window": 0}}, "fp16: loss_scale_window must be at least 1"),
            ({"optimizer": {"params": {}}}, "optimizer.type: missing"),
            ({"zero_optimization": 3}, "zero_optimization: got 3; expected a block"),
            ({"communication_data_type": "fp8"}, "communication_data_type: got 'fp8'"),
            ({"checkpoint": {"tag_validation": "maybe"}}, "checkpoint.tag_validation: got 'MAYBE'"),
            ({"torch_autocast": {"lower_precision_safe_modules": [1]}}, "lower_precision_safe_modules[0]: got 1"),
            ({3: 4}, "3: config keys are strings"),
        ],
    )
    def test_bad_values(self, keys: dict[Any, Any], expected: str) -> None:
        with pytest.raises(DeepSpeedConfigError) as caught:
            resolve({"train_batch_size": 8, **keys}, dp_world_size=1)
        assert expected in str(caught.value)


class TestAliasesAndDeprecatedForms:
    def test_bfloat16(self) -> None:
        config = made(bfloat16={"enabled": True})
        assert config.bf16.enabled
        assert config.sources["bf16.enabled"] == "config dict: bfloat16.enabled"
        with pytest.raises(ConfigConflictError, match="bfloat16 and bf16 are two names of one key"):
            made(bfloat16={"enabled": True}, bf16={"enabled": True})

    def test_short_zero_names(self) -> None:
        config = made(zero_optimization={"stage": 3, "prefetch_bucket_size": 7, "max_live_parameters": 8})
        assert config.zero_optimization.stage3_prefetch_bucket_size == 7
        source = config.sources["zero_optimization.stage3_max_live_parameters"]
        assert source == "config dict: zero_optimization.max_live_parameters"

    def test_deprecated_name_warns_and_clashes(self, caplog: pytest.LogCaptureFixture) -> None:
        old, new = "stage3_gather_fp16_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save"
        with caplog.at_level(logging.WARNING, logger="DeepSpeed"):
            assert made(zero_optimization={old: True}).zero_optimization.stage3_gather_16bit_weights_on_model_save
        assert f"{old} is deprecated" in caplog.text
        with pytest.raises(ConfigConflictError):
            made(zero_optimization={old: True, new: True})

    def test_boolean_zero(self) -> None:
        config = made(zero_optimization=True, allgather_size=1000)
        assert (config.zero_optimization.stage, config.zero_optimization.allgather_bucket_size) == (1, 1000)
        assert made(zero_optimization=False).zero_optimization.stage == 0

    def test_cpu_offload_switches(self) -> None:
        zero = made(zero_optimization={"stage": 3, "cpu_offload": True, "cpu_offload_param": True}).zero_optimization
        assert zero.offload_optimizer is not None and zero.offload_optimizer.device == "cpu"
        assert zero.offload_param is not None and zero.offload_param.device == "cpu"
        with pytest.raises(ConfigConflictError, match="keep offload_optimizer"):
            made(zero_optimization={"cpu_offload": True, "offload_optimizer": {"device": "cpu"}})

    def test_leaf_module_strings_become_lists(self) -> None:
        leaf = made(
            zero_optimization={"leaf_module": {"classes": "Block", "names": ["a", "b", "a"]}}
        ).zero_optimization.leaf_module
        assert (leaf.classes, leaf.names) == (("Block",), ("a", "b"))


class TestRules:
    def test_two_precisions(self) -> None:
        with pytest.raises(AssertionError, match=r"fp16\.enabled and bf16\.enabled are both true"):
            made(fp16={"enabled": True}, bf16={"enabled": True})

    def test_param_dtype_must_match(self) -> None:
        made(bf16={"enabled": True}, data_types={"param_dtype": "bfloat16"})
        with pytest.raises(ConfigConflictError, match=r"data_types\.param_dtype is fp16"):
            made(bf16={"enabled": True}, data_types={"param_dtype": "fp16"})

    def test_partial_offload_needs_stage3(self) -> None:
        block = {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}
        made(zero_optimization={"stage": 3, **block})
        assert "needs stage 3, but stage is 2" in refusal(zero_optimization={"stage": 2, **block})

    def test_contiguous_checkpoints_need_their_companions(self) -> None:
        with pytest.raises(ConfigConflictError, match="needs partition_activations"):
            made(activation_checkpointing={"contiguous_memory_optimization": True})

    def test_max_grad_norm_belongs_to_the_top_level(self) -> None:
        with pytest.raises(ValueError, match="gradient_clipping"):
            made(optimizer={"type": "Adam", "params": {"max_grad_norm": 1.0}})

    @pytest.mark.parametrize("name", ["Adam", "adamw", "ADAGRAD", "SGD", "RAdam", "lamb", "Lion", "MUON"])
    def test_known_optimizers(self, name: str) -> None:
        made(optimizer={"type": name})

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("AdanW", "did you mean"),
            ("sgd", "did you mean SGD?"),
            ("lio", "did you mean Lion?"),
            ("OneBitAdam", "not planned"),
            ("Optimizer", "there is no 'Optimizer'"),
            ("lr_scheduler", "there is no 'lr_scheduler'"),
        ],
    )
    def test_other_optimizers(self, name: str, expected: str) -> None:
        assert expected in refusal(optimizer={"type": name})

    def test_schedulers(self) -> None:
        made(scheduler={"type": "OneCycle"})
        made(scheduler={"type": "CosineAnnealingLR", "params": {"T_max": 10}})
        assert "did you mean WarmupLR?" in refusal(scheduler={"type": "WarmUpLR"})

    def test_communication_dtype_may_be_wider_only(self) -> None:
        assert made(bf16={"enabled": True}, communication_data_type="fp32").communication_data_type == "fp32"
        assert "communication_data_type bf16 with a fp32 model" in refusal(communication_data_type="bf16")
        assert "communication_data_type fp16 with a bf16 model" in refusal(
            bf16={"enabled": True}, communication_data_type="fp16"
        )

    @pytest.mark.parametrize(("stage", "block"), [(1, "offload_optimizer"), (3, "offload_param")])
    def test_offload_devices(self, stage: int, block: str, caplog: pytest.LogCaptureFixture) -> None:
        zero = {"stage": stage, block: {"device": "cpu"}}
        with caplog.at_level(logging.INFO, logger="DeepSpeed"):
            made(zero_optimization=zero)
        assert f"zero_optimization.{block}.device (states are in host memory anyway)" in caplog.text
        with pytest.raises(DeepSpeedConfigError, match="not supported yet"):
            made(device_type="cuda", zero_optimization=zero)
        assert "device nvme" in refusal(zero_optimization={"stage": stage, block: {"device": "nvme"}})
        made(zero_optimization={"stage": 0, block: {"device": "nvme"}})  # stage 0 has no shards to place

    def test_data_parallel_size_is_checked(self) -> None:
        made(ranks=2, data_parallel_size=2, sequence_parallel_size=1)
        with pytest.raises(ConfigConflictError, match="data_parallel_size is 4"):
            made(ranks=2, data_parallel_size=4)


class TestResult:
    def test_frozen(self) -> None:
        config = made(zero_optimization={"stage": 1})
        with pytest.raises(ValueError):
            config.gradient_clipping = 3.0  # type: ignore[misc]
        with pytest.raises(ValueError):
            config.zero_optimization.stage = 3  # type: ignore[misc]

    def test_the_users_dict_is_neither_copied_nor_touched(self) -> None:
        given: dict[str, Any] = {
            "train_batch_size": 8,
            "bfloat16": {"enabled": "auto"},
            "zero_optimization": {"cpu_offload": True, "stage": 1},
        }
        config = resolve(given, dp_world_size=1)
        assert config.raw is given
        assert given["zero_optimization"] == {"cpu_offload": True, "stage": 1}
        assert given["bfloat16"] == {"enabled": "auto"}

    def test_provenance(self, tmp_path: Path) -> None:
        path = tmp_path / "ds.json"
        path.write_text('{"train_batch_size": 8, "zero_optimization": {"stage": 3}}')
        config = resolve(path, dp_world_size=2, arguments={"gradient_accumulation_steps": 2, "bf16.enabled": True})
        assert config.sources["zero_optimization.stage"] == f"file {path}: zero_optimization.stage"
        assert config.sources["gradient_accumulation_steps"] == "argument"
        assert config.sources["bf16.enabled"] == "argument" and config.bf16.enabled
        assert config.sources["train_micro_batch_size_per_gpu"].startswith("derived")
        assert config.sources["gradient_clipping"] == "default"
        assert config.sources["communication_data_type"] == "derived: the model dtype"
        lines = config.explain().splitlines()
        assert any("gradient_clipping" in line and line.endswith("<- default") for line in lines)
        assert any("zero_optimization.stage " in line and str(path) in line for line in lines)
        short = str(config).splitlines()
        assert len(short) < 15 and not any(line.endswith("<- default") for line in short)

    def test_an_argument_against_the_config(self) -> None:
        with pytest.raises(ConfigConflictError, match=r"gradient_clipping is 1\.0 in the config"):
            resolve(
                {"train_batch_size": 8, "gradient_clipping": 1.0}, dp_world_size=1, arguments={"gradient_clipping": 2.0}
            )
        config = resolve(
            {"train_batch_size": 8, "gradient_clipping": "auto"}, dp_world_size=1, arguments={"gradient_clipping": 2.0}
        )
        assert config.gradient_clipping == 2.0

    def test_ignored_keys_are_said_once_and_only_when_they_differ(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="DeepSpeed"):
            made(prescale_gradients=True, aio={"thread_count": 1, "block_size": 1048576})
        assert len(caplog.records) == 1
        assert "prescale_gradients (gradients are summed in fp32" in caplog.text
        assert "aio.thread_count" in caplog.text and "block_size" not in caplog.text

    def test_parse_knows_no_world(self) -> None:
        model = parse_config({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"})
        assert model.zero_optimization.stage == 3 and model.train_micro_batch_size_per_gpu is None
        with pytest.raises(DeepSpeedConfigError, match="unknown key"):
            parse_config({"zero_optimization": {"stge": 3}})

    def test_copies_keep_everything(self) -> None:
        config = made(zero_optimization={"stage": 2})
        for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            assert twin == config
            assert twin.sources == config.sources and twin.origin == config.origin and twin.raw == config.raw
