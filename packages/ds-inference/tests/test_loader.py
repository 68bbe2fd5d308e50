"""Checkpoints: whole and by ranges, with and without an index, and everything that may be wrong with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ds_inference.errors import CheckpointError
from ds_inference.loader import INDEX, open_checkpoint
from ds_inference.tp.plan import ModelFacts, ModuleInfo, plan_tensor_parallel

Folder = Callable[..., Path]


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    at = "model.layers.0.self_attn."
    found = {at + f"{name}_proj.weight": torch.randn(12, 8, generator=generator) for name in "qkv"}
    found[at + "o_proj.weight"] = torch.randn(8, 12, generator=generator)
    found["model.norm.weight"] = torch.randn(8, generator=generator).bfloat16()
    found["model.scale"] = torch.tensor(3.0)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A checkpoint in `num_files` files, with an index or without."""

    def make(num_files: int = 3, index: bool = True) -> Path:
        names, weight_map = list(tensors()), {}
        for number in range(num_files):
            file = f"model-{number + 1:05}-of-{num_files:05}.safetensors" if num_files > 1 else "model.safetensors"
            held = names[number::num_files]
            save_file({name: tensors()[name] for name in held}, tmp_path / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(held, file)
        if index:
            (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return tmp_path

    return make


@pytest.mark.parametrize(("num_files", "index"), [(1, False), (1, True), (3, True), (3, False)])
def test_every_tensor_is_read_as_it_was_saved(folder: Folder, num_files: int, index: bool) -> None:
    with open_checkpoint(folder(num_files, index)) as checkpoint:
        assert set(checkpoint.names) == set(tensors()) and "model.norm.weight" in checkpoint
        for name, expected in tensors().items():
            got = checkpoint.read(name)
            assert torch.equal(got, expected) and got.dtype == expected.dtype
            assert checkpoint.shape(name) == tuple(expected.shape)


def test_one_file_by_its_path(folder: Folder) -> None:
    with open_checkpoint(str(folder(1, False) / "model.safetensors")) as checkpoint:
        assert len(checkpoint.names) == len(tensors())


def test_ranges_are_read_into_memory_of_their_own_size(folder: Folder) -> None:
    path = folder()
    name = "model.layers.0.self_attn.o_proj.weight"
    with open_checkpoint(path) as checkpoint:
        got = checkpoint.read(name, 1, [(1, 3), (8, 12)], dtype=torch.bfloat16)
        rows = checkpoint.read(name, 0, [(2, 5)])
        whole = checkpoint.read("model.norm.weight")
    for file in path.iterdir():
        file.unlink()  # what was read does not live in the file
    original = tensors()[name]
    assert torch.equal(got, torch.cat([original[:, 1:3], original[:, 8:12]], 1).bfloat16())
    assert torch.equal(rows, original[2:5]) and torch.equal(whole, tensors()["model.norm.weight"])
    assert got.untyped_storage().nbytes() == 8 * 6 * 2 and rows.untyped_storage().nbytes() == 3 * 12 * 4


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_parts_of_all_ranks_are_the_tensors(folder: Folder, num_ranks: int) -> None:
    whole = {name: value for name, value in tensors().items() if name.endswith("weight")}
    modules = [
        ModuleInfo(name.removesuffix(".weight"), "linear" if value.dim() == 2 else "norm", tuple(value.shape))
        for name, value in whole.items()
    ]
    plan = plan_tensor_parallel(modules, ModelFacts(6, 6), num_ranks)
    with open_checkpoint(folder()) as checkpoint:
        ranks = [dict(checkpoint.read_parts(plan.tensors(rank))) for rank in range(num_ranks)]
    for name, expected in whole.items():
        part = plan.tensors(0)[name]
        if part is None:
            assert all(torch.equal(rank[name], expected) for rank in ranks)
        else:
            assert torch.equal(torch.cat([rank[name] for rank in ranks], part[0]), expected)


def test_a_shard_that_is_missing_is_named_before_anything_is_read(folder: Folder) -> None:
    path = folder()
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard .*model-00002-of-00003\.safetensors, which should hold .*k_proj"):
        open_checkpoint(path)
    (path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"has 2 of 3 shards model-\*; missing are 2"):
        open_checkpoint(path)


@pytest.mark.parametrize("cut", [-5, 100, 3, 0])
def test_a_shard_that_is_cut_short_is_named(folder: Folder, cut: int) -> None:
    path = folder()
    file = path / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors.* is cut short .* bytes\)"):
        open_checkpoint(path)


def test_a_shard_of_another_checkpoint(folder: Folder) -> None:
    path = folder()
    save_file({"other": torch.zeros(1)}, path / "model-00001-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003.* lacks .*q_proj.*different checkpoints"):
        open_checkpoint(path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor x is in .*a\.safetensors and in .*b\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": [1]}', '{"weight_map": {"x": 3}}'])
def test_a_broken_index(folder: Folder, text: str) -> None:
    path = folder()
    (path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index .*index\.json cannot be read .*weight_map"):
        open_checkpoint(path)


def test_an_index_that_points_elsewhere(folder: Folder) -> None:
    path = folder()
    (path / INDEX).write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"places x in '\.\./secret\.safetensors'; expected a file beside it"):
        open_checkpoint(path)


def test_folders_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not there; expected a folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no safetensors file \(it has nothing\)"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"it has pytorch_model\.bin\); save the model with save_pretrained"):
        open_checkpoint(tmp_path)


def test_names_and_ranges_that_there_are_not(folder: Folder) -> None:
    with open_checkpoint(folder()) as checkpoint:
        with pytest.raises(CheckpointError, match=r"no tensor norm\.weight among its 6; it has model\.norm\.weight"):
            checkpoint.read("norm.weight")
        with pytest.raises(CheckpointError, match="lacks a, b; it is not one of this model"):
            checkpoint.read_parts({"a": None, "model.scale": None, "b": None})
        for dim, ranges in ((1, [(0, 1)]), (0, [(4, 9)]), (0, [(3, 3)]), (0, [])):
            with pytest.raises(ValueError, match=r"model\.norm\.weight"):
                checkpoint.read("model.norm.weight", dim, ranges)
    with pytest.raises(ValueError, match="is closed"):
        checkpoint.read("model.scale")
