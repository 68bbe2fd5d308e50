"""Weights from every form of checkpoint: whole, by parts, into memory or onto meta; and what is refused, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ds_inference import CheckpointError, ModelError, init_inference
from ds_inference.checkpoints import load_into, save_shards


class Net(nn.Module):
    base_model_prefix = "net"

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.fc = nn.Linear(8, 6)
        self.register_buffer("position_ids", torch.arange(4).expand(1, -1), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc(self.embed(tokens))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


def same(model: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def halves(folder: Path, dim: int = 0) -> list[str]:
    """Two tensor-parallel files: fc's rows split, the embedding whole."""
    state = net().state_dict()
    names = []
    for rank in range(2):
        part = {name: value for name, value in state.items() if name.startswith("embed")}
        part["fc.weight"] = state["fc.weight"].chunk(2, dim)[rank].clone()
        part["fc.bias"] = state["fc.bias"].chunk(2)[rank].clone() if dim == 0 else state["fc.bias"]
        torch.save({"module": part}, folder / f"mp_{rank}.pt")
        names.append(f"mp_{rank}.pt")
    return names


def forms(folder: Path) -> dict[str, Any]:
    state = net().state_dict()
    (folder / "hf").mkdir()
    save_file(state, folder / "hf" / "model.safetensors")
    (folder / "bin").mkdir()
    torch.save(state, folder / "bin" / "pytorch_model.bin")
    torch.save({"embed.weight": state["embed.weight"]}, folder / "a.pt")
    torch.save({"fc.weight": state["fc.weight"], "fc.bias": state["fc.bias"]}, folder / "b.pt")
    (folder / "pp.json").write_text(json.dumps({"type": "BLOOM", "version": 1.0, "checkpoints": ["a.pt", "b.pt"]}))
    prefixed = {f"net.{name}": value for name, value in state.items()}
    save_file(prefixed, folder / "prefixed.safetensors")
    tp = {"type": "Megatron", "version": 1, "parallelization": "tp", "mp_size": 2, "checkpoints": halves(folder)}
    both = {"type": "ds_model", "checkpoints": {"non_tp": ["a.pt"], "tp": halves(folder)}, "base_dir": str(folder)}
    return {
        "folder": str(folder / "hf"), "file": str(folder / "hf" / "model.safetensors"), "bin": str(folder / "bin"),
        "list": str(folder / "pp.json"), "prefixed": str(folder / "prefixed.safetensors"),
        "ranks": tp | {"base_dir": str(folder)}, "both": both,
    }  # fmt: skip


@pytest.mark.parametrize("form", ["folder", "file", "bin", "list", "prefixed", "ranks", "both"])
def test_every_form_fills_models_with_and_without_memory(form: str, tmp_path: Path) -> None:
    source = forms(tmp_path)[form]
    for model in (net(1), on_meta()):
        load_into(model, source)
        assert same(model, net()) and model.position_ids.tolist() == [[0, 1, 2, 3]]
        assert model.fc.weight.requires_grad


def test_parts_are_joined_along_the_dimension_that_fits(tmp_path: Path) -> None:
    described = {"type": "Megatron", "mp_size": 2, "checkpoints": halves(tmp_path, dim=1), "base_dir": str(tmp_path)}
    model = net(1)
    load_into(model, described)
    assert same(model, net())


def test_by_the_engine_in_the_dtype_asked_for(tmp_path: Path) -> None:
    engine = (
        init_inference(on_meta(), dtype="bf16", checkpoint="hf", base_dir=str(tmp_path)) if forms(tmp_path) else None
    )
    assert engine is not None and engine.dtype == torch.bfloat16
    assert same(engine.module, net().bfloat16())


def test_saved_shards_load_again(tmp_path: Path) -> None:
    engine = init_inference(net(), dtype="fp32", save_mp_checkpoint_path=str(tmp_path / "out"))
    again = init_inference(on_meta(), dtype="fp32", checkpoint=str(tmp_path / "out" / "ds_inference_config.json"))
    assert same(again.module, engine.module)
    assert save_shards(net(), tmp_path / "more").is_file()


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

    save_file({"embed.weight": torch.rand(11, 8)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Tied()
    load_into(model, tmp_path)
    assert model.head.weight is model.embed.weight and not model.head.weight.is_meta


def test_what_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    paths = forms(tmp_path)
    state = dict(net().state_dict())
    cases: list[tuple[Any, str]] = []

    def saved(name: str, tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, tmp_path / name)
        return str(tmp_path / name)

    cases.append((saved("less.safetensors", {"fc.bias": state["fc.bias"]}), r"lacks embed\.weight, fc\.weight"))
    cases.append(
        (saved("more.safetensors", state | {"extra": torch.ones(1)}), r"has extra, for which Net has no place")
    )
    cases.append((saved("shape.safetensors", state | {"fc.bias": torch.ones(7)}), r"fc\.bias is \(7,\).*\(6,\)"))
    cases.append((str(tmp_path / "nowhere"), "is not there"))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:200])
    here = {"base_dir": str(tmp_path)}
    cases.append(({"type": "BLOOM", "checkpoints": ["cut.pt"]} | here, r"cut\.pt is cut short"))
    cases.append(({"type": "BLOOM", "checkpoints": ["gone.pt"]} | here, r"gone\.pt is not there"))
    cases.append(({"type": "GGML", "checkpoints": ["a.pt"]} | here, r"type 'GGML'"))
    cases.append(({"type": "BLOOM"} | here, "no list of files"))
    cases.append(({"type": "BLOOM", "files": ["a.pt"]} | here, "unknown key 'files'"))
    cases.append((paths["ranks"] | {"mp_size": 3}, "mp_size 3 and 2 files"))
    (tmp_path / "torn.json").write_text("{")
    cases.append((str(tmp_path / "torn.json"), r"torn\.json cannot be read"))
    for source, said in cases:
        with pytest.raises(CheckpointError, match=said):
            load_into(net(1), source)


def test_pickles_with_code_are_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": Path("x"), "more": print}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match=r"code\.pt .*holds more than tensors"):
        load_into(net(1), {"type": "BLOOM", "checkpoints": ["code.pt"], "base_dir": str(tmp_path)})


def test_meta_without_a_checkpoint_is_refused() -> None:
    with pytest.raises(ModelError, match=r"meta device; give their place with checkpoint"):
        init_inference(on_meta(), dtype="fp32")


def test_a_buffer_that_nothing_tells(tmp_path: Path) -> None:
    model = on_meta()
    model.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(ModelError, match=r"table is a buffer on the meta device"):
        load_into(model, forms(tmp_path)["folder"])
