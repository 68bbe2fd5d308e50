"""Whole models out of sharded checkpoints: state dicts, safetensors folders, upstream's names, the command lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ckpt_helpers import BLOCKS, make_map, make_segments, ok, on_threads, save_on_threads, true_value
from safetensors import safe_open
from safetensors.torch import load_file

from ds_zero.checkpoint import export_safetensors, export_torch, full_state_dict, save
from ds_zero.checkpoint.cli import main
from ds_zero.checkpoint.consolidate import LazyTensor, parse_size
from ds_zero.checkpoint.script import SCRIPT
from ds_zero.checkpoint.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    get_model_state_file,
    get_optim_files,
    load_state_dict_from_zero_checkpoint,
)
from ds_zero.checkpoint.zero_to_fp32 import main as zero_to_fp32_main
from ds_zero.errors import CheckpointError

SPECS = [spec for _, specs in BLOCKS for spec in specs]


def expected(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    state = {}
    for spec in SPECS:
        key = "master" if spec.trainable else "param"
        state[spec.name] = true_value(spec.name, key, spec.numel).view(spec.shape).to(dtype)
        state.update(dict.fromkeys(spec.aliases, state[spec.name]))
    return state


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The true model from three ranks, with buffers."""
    shard_map = make_map(3)
    buffers = {"mean": torch.tensor([1.5, 2.5], dtype=torch.bfloat16), "count": torch.tensor(4)}

    def body(peers):
        segments = make_segments(shard_map, peers.rank, export=True)
        save(tmp_path / "ckpt", "t", segments, shard_map=shard_map, peers=peers, buffers=buffers, asynchronous=False)

    ok(on_threads(3, body))
    return tmp_path / "ckpt"


def same(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(truth)
    for name, value in truth.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_full_state_dict(saved: Path) -> None:
    state = full_state_dict(saved)
    buffers = {"mean": torch.tensor([1.5, 2.5]), "count": torch.tensor(4)}
    same(state, {**expected(), **buffers})
    assert state["head.weight"] is state["embed.weight"]
    bf16 = full_state_dict(saved, "t", "bf16")
    same({name: value for name, value in bf16.items() if name not in buffers}, expected(torch.bfloat16))
    assert "layer.0.frozen" not in full_state_dict(saved, exclude_frozen=True)
    with pytest.raises(CheckpointError, match="fp8"):
        full_state_dict(saved, dtype="fp8")


def test_lazy_tensors_are_read_when_asked(saved: Path) -> None:
    state = full_state_dict(saved, lazy=True)
    lazy = state["layer.1.weight"]
    assert isinstance(lazy, LazyTensor)
    assert lazy.shape == (5, 13)
    assert torch.equal(lazy.contiguous(), expected()["layer.1.weight"])
    assert torch.equal(state["mean"].contiguous(), torch.tensor([1.5, 2.5]))
    content = bytearray((saved / "t" / "shard_00000-of-00003.safetensors").read_bytes())
    content[-1] ^= 1
    (saved / "t" / "shard_00000-of-00003.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        [value.contiguous() for value in state.values()]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("limit", ["5GB", 400])
def test_export_safetensors(saved: Path, tmp_path: Path, dtype: str, limit: str | int) -> None:
    files = export_safetensors(saved, tmp_path / "out", dtype=dtype, max_shard_size=limit)
    assert all(file.exists() for file in files)
    truth = expected(torch.float32 if dtype == "fp32" else torch.bfloat16)
    del truth["head.weight"]  # a tie is stored once, as transformers stores it
    found: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        part = load_file(file)
        assert limit == "5GB" or len(part) == 1 or sum(t.nbytes for t in part.values()) <= limit
        found.update(part)
    truth["mean"] = torch.tensor([1.5, 2.5], dtype=truth["embed.weight"].dtype)
    truth["count"] = torch.tensor(4)
    same(found, truth)
    if limit == "5GB":
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(truth)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in truth.values())
        assert all(name.startswith("model-0000") for name in index["weight_map"].values())


def test_export_torch(saved: Path, tmp_path: Path) -> None:
    export_torch(saved, tmp_path / "one")
    state = torch.load(tmp_path / "one" / "pytorch_model.bin", weights_only=True)
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()
    same(state, {**expected(), "mean": torch.tensor([1.5, 2.5]), "count": torch.tensor(4.0)})
    convert_zero_checkpoint_to_fp32_state_dict(saved, tmp_path / "many", max_shard_size=700)
    index = json.loads((tmp_path / "many" / "pytorch_model.bin.index.json").read_text())
    parts = {name: torch.load(tmp_path / "many" / name, weights_only=True) for name in index["weight_map"].values()}
    assert len(parts) > 1
    assert all(name in parts[file] for name, file in index["weight_map"].items())


def test_upstream_names(saved: Path) -> None:
    state = get_fp32_state_dict_from_zero_checkpoint(saved, "t")
    same(state, {**expected(), "mean": torch.tensor([1.5, 2.5]), "count": torch.tensor(4.0)})
    assert Path(get_model_state_file(saved / "t", 3)).name == "manifest.json"
    assert [Path(f).name for f in get_optim_files(saved / "t")] == [
        f"shard_0000{r}-of-00003.safetensors" for r in range(3)
    ]
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        get_optim_files(saved)


def test_load_into_a_plain_model(tmp_path: Path) -> None:
    ok(save_on_threads(tmp_path, "t", 2))

    class Plain(torch.nn.Module):
        def __init__(self, names: list[str]) -> None:
            super().__init__()
            for spec in SPECS:
                for name in (spec.name, *spec.aliases):
                    if name in names:
                        module: torch.nn.Module = self
                        *path, last = name.split(".")
                        for part in path:
                            if not hasattr(module, part):
                                module.add_module(part, torch.nn.Module())
                            module = getattr(module, part)
                        module.register_parameter(last, torch.nn.Parameter(torch.zeros(spec.shape)))

    names = list(expected())
    model = load_state_dict_from_zero_checkpoint(Plain(names), tmp_path)
    same(dict(model.state_dict()), expected())
    with pytest.raises(CheckpointError, match=r"another model.*embed\.weight"):
        load_state_dict_from_zero_checkpoint(Plain(names[1:]), tmp_path)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("7", 7), (9, 9), (None, None)])
def test_sizes(text: str | int | None, size: int | None) -> None:
    assert parse_size(text) == size
    with pytest.raises(CheckpointError, match="is not a size"):
        parse_size("5 parsecs")


def test_verify_command(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(saved)]) == 0
    assert main(["verify", str(saved / "t")]) == 0  # the tag's own folder
    assert main(["verify", str(saved), "--all"]) == 0
    assert capsys.readouterr().out.count("ok") == 15
    shard = saved / "t" / "shard_00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["verify", str(saved), "-t", "t"]) == 1
    out = capsys.readouterr().out
    assert "shard_00002-of-00003.safetensors: DAMAGED" in out
    assert "cut short" in out
    assert main(["verify", str(saved / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_export_command(saved: Path, tmp_path: Path) -> None:
    assert main(["export", str(saved), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors")["embed.weight"].dtype == torch.bfloat16


def test_zero_to_fp32_script(saved: Path, tmp_path: Path) -> None:
    """The copy next to `latest` works with ds_zero (as a command) and without it (its own reader)."""
    script = saved / "zero_to_fp32.py"
    assert script.read_text() == SCRIPT
    assert script.stat().st_mode & 0o111
    assert zero_to_fp32_main([str(saved), str(tmp_path / "a"), "--safe_serialization", "-t", "t"]) == 0
    blocked = "import sys; sys.modules['ds_zero'] = None; sys.argv = sys.argv[1:]; exec(open(sys.argv[0]).read())"
    arguments = [sys.executable, "-c", blocked, str(script), str(saved), str(tmp_path / "b")]
    subprocess.run(arguments, check=True, timeout=60)
    truth = expected()
    del truth["head.weight"]
    same(load_file(tmp_path / "b" / "model.safetensors"), truth)
    with_ds_zero = load_file(tmp_path / "a" / "model.safetensors")
    same({name: with_ds_zero[name] for name in truth}, truth)
