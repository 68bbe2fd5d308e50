"""The engine over tensor-parallel ranks: the tokens of one rank, injected or not; checkpoints by parts, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import make, padded

from ds_comm.testing import run_ranks
from ds_inference import init_inference

pytest.importorskip("transformers")


def _generated(name: str, inject: bool, sample: bool) -> list[list[int]]:
    engine = init_inference(make(name), dtype="fp32", tensor_parallel={"tp_size": 2}, replace_with_kernel_inject=inject)
    assert engine.tensor_parallel is not None and engine.tensor_parallel.size == 2
    tokens, mask = padded([9, 4], "left")
    torch.manual_seed(3 if not sample else 3 + engine.tensor_parallel.rank)
    kwargs = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": sample}
    return engine.generate(tokens, **kwargs).tolist()


@pytest.mark.parametrize(("name", "inject"), [("llama", True), ("llama", False), ("gpt2", True), ("mistral", True)])
def test_two_ranks_give_the_tokens_of_one(name: str, inject: bool) -> None:
    tokens, mask = padded([9, 4], "left")
    expected = make(name).generate(tokens, attention_mask=mask, max_new_tokens=16, do_sample=False).tolist()
    assert run_ranks(_generated, 2, name, inject, False) == [expected, expected]


def test_ranks_sample_the_same_tokens_whatever_they_draw() -> None:
    first, second = run_ranks(_generated, 2, "llama", True, True)
    assert first == second


def _saved(folder: str) -> None:
    init_inference(make("llama"), dtype="fp32", tensor_parallel={"tp_size": 2}, save_mp_checkpoint_path=folder)


def _loaded(folder: str) -> Any:
    with torch.device("meta"):
        model = make("llama", 1)
    engine = init_inference(model, dtype="fp32", tensor_parallel={"tp_size": 2}, checkpoint=folder)
    return engine.generate(padded([6], "left")[0], max_new_tokens=8, do_sample=False).tolist()


def test_checkpoints_of_ranks(tmp_path: Path) -> None:
    """Saved by two ranks, loaded by one and by two; a folder of transformers loaded by two."""
    run_ranks(_saved, 2, str(tmp_path / "mp"))
    original = make("llama")
    expected = original.generate(padded([6], "left")[0], max_new_tokens=8, do_sample=False).tolist()
    description = str(tmp_path / "mp" / "ds_inference_config.json")
    one = init_inference(make("llama", 1), dtype="fp32", checkpoint=description)
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in one.module.state_dict().items())
    original.save_pretrained(tmp_path / "hf")
    for folder in (description, str(tmp_path / "hf")):
        assert run_ranks(_loaded, 2, folder) == [expected, expected]
