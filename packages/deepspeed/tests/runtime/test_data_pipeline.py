"""Curriculum schedules, indexed files and batches of bounded length: upstream's values and bytes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.errors import DeepSpeedConfigError
from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler
from deepspeed.runtime.data_pipeline.data_sampling import indexed_dataset
from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDataset, MMapIndexedDatasetBuilder
from deepspeed.runtime.data_pipeline.data_sampling.variable_batch_size_and_lr import batch_by_seqlens, scale_lr

STEPS = [0, 1, 2, 5, 6, 10, 11, 25, 49, 50, 60]
LINEAR = {"total_curriculum_step": 50, "difficulty_step": 8}
DISCRETE = {"difficulty": [1, 2, 3], "max_step": [5, 10]}


def curriculum(kind: str, schedule: dict[str, Any] | None, low: int = 8, high: int = 100) -> dict[str, Any]:
    return {"min_difficulty": low, "max_difficulty": high, "schedule_type": kind, "schedule_config": schedule or {}}


# values of DeepSpeed 0.19.8 for STEPS
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (curriculum("fixed_linear", LINEAR), [8, 8, 8, 16, 16, 24, 24, 48, 96, 96, 100]),
        (curriculum("fixed_root", {**LINEAR, "root_degree": 2}), [8, 16, 24, 32, 32, 48, 48, 72, 96, 96, 100]),
        (curriculum("fixed_discrete", DISCRETE, 1, 3), [1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3]),
    ],
)
def test_schedules_have_upstreams_values(config: dict[str, Any], expected: list[int]) -> None:
    scheduler = CurriculumScheduler(config)
    assert scheduler.get_current_difficulty() == config["min_difficulty"]
    assert [scheduler.update_difficulty(step) for step in STEPS] == expected
    assert scheduler.update_difficulty(1) == config["max_difficulty"]
    again = CurriculumScheduler(config)
    again.set_state(scheduler.get_state())
    assert again.get_current_difficulty() == config["max_difficulty"]
    with pytest.raises(ValueError, match="make the scheduler with the saved config"):
        CurriculumScheduler(curriculum("custom", None)).set_state(scheduler.get_state())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_difficulty": None}, "min_difficulty is missing"),
        ({"schedule_type": "linear"}, "expected one of custom, fixed_discrete"),
        ({"schedule_config": {"difficulty_step": 8}}, "lacks total_curriculum_step"),
        ({"max_difficulty": 4}, "below min_difficulty 8"),
        ({"schedule_config": {**LINEAR, "difficulty_step": 0}}, "expected at least 1"),
        ({"schedule_type": "fixed_discrete", "schedule_config": {**DISCRETE, "max_step": [1]}}, "one difficulty more"),
    ],
)
def test_a_schedule_that_makes_no_sense_says_why(changes: dict[str, Any], words: str) -> None:
    config = {**curriculum("fixed_linear", LINEAR), **changes}
    with pytest.raises(ValueError, match=words):
        CurriculumScheduler(config)
    with pytest.raises(DeepSpeedConfigError, match=rf"curriculum_learning: .*{words}"):
        engine_of({"enabled": True, **config})


class Cut(nn.Module):
    """A model that cuts its sequences, and remembers to what."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.lengths: list[int | None] = []

    def forward(self, x: torch.Tensor, curriculum_seqlen: int | None = None) -> torch.Tensor:
        self.lengths.append(curriculum_seqlen)
        return self.layer(x[:, :curriculum_seqlen, None]).square().mean()


def engine_of(section: dict[str, Any], **arguments: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "curriculum_learning": section,
    }
    return deepspeed.initialize(model=Cut(), config=config, **arguments)[0]


def test_the_engine_passes_the_sequence_length_of_the_step() -> None:
    section = {"enabled": True, "curriculum_type": "seqlen"}
    section |= curriculum("fixed_linear", {"total_curriculum_step": 4, "difficulty_step": 2}, 2, 8)
    engine = engine_of(section)
    assert engine.curriculum_enabled_legacy() and engine.curriculum_params_legacy()["max_difficulty"] == 8
    for _ in range(8):
        engine.backward(engine(torch.ones(2, 8)))
        engine.step()
    engine.eval()
    engine(torch.ones(2, 8))
    assert engine.module.lengths == [2, 2, 4, 4, 6, 6, 8, 8, None]


def test_custom_schedules_and_other_types() -> None:
    engine = engine_of({"enabled": True, "curriculum_type": "seqlen", **curriculum("custom", None, 1, 9)})
    with pytest.raises(RuntimeError, match="set_custom_curriculum_learning_schedule"):
        engine(torch.ones(2, 8))
    with pytest.raises(DeepSpeedConfigError, match=r"no curriculum for 'words'.*'seqlen'"):
        engine.set_custom_curriculum_learning_schedule({"words": lambda step: step})
    engine.set_custom_curriculum_learning_schedule({"seqlen": lambda step: 3 * step})
    engine(torch.ones(2, 8))
    assert engine.module.lengths == [3]
    other = engine_of({"enabled": True, "curriculum_type": "words", **curriculum("fixed_linear", LINEAR)})
    other(torch.ones(2, 8))
    assert other.module.lengths == [None]
    assert other.curriculum_scheduler_legacy.get_current_difficulty() == 8
    plain = engine_of({"enabled": False})
    plain(torch.ones(2, 8))
    assert plain.module.lengths == [None] and not plain.curriculum_enabled_legacy()


def test_batches_pass_through_the_clients_function() -> None:
    engine = engine_of({"enabled": False}, training_data=torch.arange(8.0).view(8, 1))
    engine.set_data_post_process_func(lambda batch, state: (batch * 2, state))
    batch, state = next(iter(engine.training_dataloader))
    plain = next(iter(engine_of({"enabled": False}, training_data=torch.arange(8.0).view(8, 1)).training_dataloader))
    torch.testing.assert_close(batch, plain * 2)
    assert state["num_samples"] == 8 and state["consumed"] == 2
    with pytest.raises(ValueError, match="training_data"):
        engine_of({"enabled": False}).set_data_post_process_func(lambda batch, state: batch)


# The index that DeepSpeed 0.19.8 writes for the sequences of `write`.
UPSTREAM_INDEX = bytes.fromhex(
    "4d4d494449445800000100000000000000040700000000000000040000000000000001000000020000000300000004000000"
    "050000000200000001000000000000000000000004000000000000000c00000000000000180000000000000028000000000000003c"
    "0000000000000044000000000000000000000000000000020000000000000004000000000000000700000000000000"
)


def write(prefix: Path, dtype: Any = np.int32) -> str:
    builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for number in range(5):
        builder.add_item(torch.arange(number + 1) * 3)
        if number % 2:
            builder.end_document()
    builder.add_items([np.array([7, 8]), np.array([9])])
    builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_files_have_upstreams_bytes(tmp_path: Path) -> None:
    prefix = write(tmp_path / "data")
    assert (tmp_path / "data.idx").read_bytes() == UPSTREAM_INDEX
    tokens = [0, 0, 3, 0, 3, 6, 0, 3, 6, 9, 0, 3, 6, 9, 12, 7, 8, 9]
    assert (tmp_path / "data.bin").read_bytes() == np.array(tokens, np.int32).tobytes()
    data = indexed_dataset.make_dataset(prefix, "mmap")
    assert len(data) == 7 and data.dtype is np.int32 and data.size(3) == 4
    assert data.sizes.tolist() == [1, 2, 3, 4, 5, 2, 1] and data.doc_idx.tolist() == [0, 2, 4, 7]
    assert data[2].tolist() == [0, 3, 6] and data[-1].tolist() == [9]
    assert [row.tolist() for row in data[4:6]] == [[0, 3, 6, 9, 12], [7, 8]]
    assert data.get(4, 1, 2).tolist() == [3, 6] and data.get(4, offset=3).tolist() == [9, 12]
    assert pickle.loads(pickle.dumps(data))[5].tolist() == [7, 8]
    assert indexed_dataset.infer_dataset_impl(prefix) == "mmap" and indexed_dataset.dataset_exists(prefix, "mmap")


def test_datasets_are_merged(tmp_path: Path) -> None:
    first = write(tmp_path / "first")
    builder = indexed_dataset.make_builder(f"{tmp_path}/all.bin", "mmap")
    builder.add_item(torch.arange(4))
    builder.end_document()
    builder.merge_file_(first)
    builder.finalize(f"{tmp_path}/all.idx")
    merged = MMapIndexedDataset(f"{tmp_path}/all")
    assert merged.doc_idx.tolist() == [0, 1, 3, 5, 8] and merged.sizes.tolist() == [4, 1, 2, 3, 4, 5, 2, 1]
    assert merged[5].tolist() == [0, 3, 6, 9, 12]
    small = indexed_dataset.make_builder(f"{tmp_path}/small.bin", "mmap", vocab_size=1000)
    with pytest.raises(ValueError, match="tokens of int32, expected uint16"):
        small.merge_file_(first)
    with pytest.raises(ValueError, match=r"sequence 0 has tokens from 1 to 70000, which uint16"):
        small.add_item(torch.tensor([1, 70000]))
    small.finalize(f"{tmp_path}/small.idx")
    assert len(MMapIndexedDataset(f"{tmp_path}/small")) == 0


def test_damaged_files_and_wrong_kinds_are_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "data")
    whole = (tmp_path / "data.idx").read_bytes()
    for name, damaged in {
        "cut short": whole[:-8],
        "no index": b"x" * 60,
        "version 1": whole[:9] + b"\x07" + whole[10:],
    }.items():
        (tmp_path / "data.idx").write_bytes(damaged)
        with pytest.raises(ValueError, match=name):
            MMapIndexedDataset(prefix)
    (tmp_path / "data.idx").write_bytes(whole)
    (tmp_path / "data.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"data.bin has 4 bytes, its index says 72"):
        MMapIndexedDataset(prefix)
    with pytest.raises(FileNotFoundError, match=r"none.idx is missing"):
        indexed_dataset.make_dataset(str(tmp_path / "none"), "infer")
    with pytest.raises(ValueError, match="lazy and cached files are not read"):
        indexed_dataset.make_dataset(prefix, "lazy")
    with pytest.raises(ValueError, match="no dtype float32"):
        MMapIndexedDatasetBuilder(f"{tmp_path}/f.bin", dtype=np.float32)


LENGTHS = [3, 5, 2, 8, 1, 9, 4]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ([(0, [0, 1, 2]), (1, [3, 4]), (2, [5]), (3, [6])], [3, 2, 1, 1], [5, 8, 9, 4])),
        ({"effective_batch_size": 2}, ([(0, [0, 1, 2]), (0, [3, 4]), (1, [5]), (1, [6])], [5, 2], [8, 9])),
        ({"effective_batch_size": 3}, ([(0, [0, 1, 2]), (0, [3, 4]), (0, [5])], [6], [9])),
        (
            {"sequence_picking_order": "seqlen", "max_tokens": 9},
            ([(0, [4, 2, 0]), (1, [6, 1]), (2, [3]), (3, [5])], [3, 2, 1, 1], [3, 5, 8, 9]),
        ),
        ({"min_batch_size": 2, "max_batch_size": 2}, ([(0, [0, 1]), (1, [2, 3]), (2, [4, 5])], [2, 2, 2], [5, 8, 9])),
        (
            {"effective_batch_size": 2, "required_microbatches_of_same_size": True},
            ([(0, [0, 1]), (0, [2, 3]), (1, [4]), (1, [5])], [4, 2], [8, 9]),
        ),
        ({"sequence_ids_per_mb": [[0, 1], [3, 4], [6]]}, ([(0, [0, 1]), (1, [3, 4]), (2, [6])], [2, 2, 1], [5, 8, 4])),
        ({"max_tokens": 8}, ([(0, [0, 1]), (1, [2]), (2, [3]), (3, [4, 6])], [2, 1, 1, 2], [5, 2, 8, 4])),
    ],
)
def test_batches_of_bounded_length(arguments: dict[str, Any], expected: Any) -> None:
    assert batch_by_seqlens(LENGTHS, **{"max_tokens": 10, **arguments}) == expected


def test_random_batches_and_their_errors() -> None:
    one, other = (batch_by_seqlens(LENGTHS, 10, sequence_picking_order="random", seed=3) for _ in range(2))
    assert one == other
    assert sorted(number for _, ids in one[0] for number in ids) == list(range(7))
    assert all(sum(LENGTHS[number] for number in ids) <= 10 for _, ids in one[0])
    with pytest.raises(ValueError, match="expected at least 8 for one batch"):
        batch_by_seqlens(LENGTHS, 10, effective_batch_size=8)
    with pytest.raises(ValueError, match="expected dataloader, random or seqlen"):
        batch_by_seqlens(LENGTHS, 10, sequence_picking_order="length")


def test_learning_rates_scale_with_the_batch() -> None:
    rates = [scale_lr(8, 32, 0.1, method) for method in ("linear", "sqrt", "none", None)]
    assert rates == pytest.approx([0.4, 0.2, 0.1, 0.1])
    with pytest.raises(ValueError, match="expected linear, sqrt or none"):
        scale_lr(8, 32, 0.1, "cubic")
