"""Layer files: the same model at any number of stages, and clear errors on every rank for anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pipe_models import MODELS, WIDTH, plain
from torch import nn

import ds_comm
from ds_comm.testing import run_ranks
from ds_pipe import LayerSpec, PipeDataParallelTopology, PipelineError, PipelineModule, PipeModelDataParallelTopology

Weights = dict[str, torch.Tensor]


def make(model: str, seed: int, **options: Any) -> PipelineModule:
    return PipelineModule(MODELS[model](), seed_layers=True, base_seed=seed, partition_method="uniform", **options)


def weights(module: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def save(folder: str, model: str, options: dict[str, Any]) -> Weights:
    module = make(model, 1, **options)
    module.save_state_dict(folder)
    return weights(module)


def load(folder: str, model: str, options: dict[str, Any]) -> Weights:
    module = make(model, 2, **options)
    module.load_state_dir(folder)
    return weights(module)


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (2, 3)])
def test_any_number_of_stages(model: str, writers: int, readers: int, tmp_path: Path) -> None:
    written = run_ranks(save, writers, str(tmp_path), model, {})
    expected = {name: value for stage in written for name, value in stage.items()}
    seen = set()
    for stage in run_ranks(load, readers, str(tmp_path), model, {}):
        assert all(torch.equal(value, expected[name]) for name, value in stage.items())
        seen |= set(stage)
    assert seen == set(expected)
    assert not list(tmp_path.glob(".*"))


def test_chunks_and_ties_in_a_v(tmp_path: Path) -> None:
    """The tied layers are both on the first rank, and on the first and the last with one chunk each."""
    chunked = {"num_chunks": 2, "placement": "v"}
    written = run_ranks(save, 2, str(tmp_path), "tied", chunked)
    expected = {name: value for stage in written for name, value in stage.items()}
    for stage in run_ranks(load, 2, str(tmp_path), "tied", {}):
        assert all(torch.equal(value, expected[name]) for name, value in stage.items())
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [*(f"layer_0{index}-model_states.safetensors" for index in (0, 1, 3, 4)), "layers.json"]


def replicas(folder: str) -> tuple[bool, str]:
    module = PipelineModule(
        plain(), seed_layers=True, partition_method="uniform", topology=PipeDataParallelTopology(2, 2)
    )
    if ds_comm.get_rank() % 2:  # what the second replica holds must not be written
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
    module.save_state_dict(folder)
    module.load_state_dir(folder)
    return all(bool(p.any()) for p in module.parameters()), Path(module.ckpt_layer_path(folder, 0)).name


def test_one_replica_writes(tmp_path: Path) -> None:
    found = run_ranks(replicas, 4, str(tmp_path))
    assert [fine for fine, _ in found] == [True] * 4
    assert [name for _, name in found] == [f"layer_0{index}-model_states.safetensors" for index in (0, 0, 5, 5)]


def model_parallel(folder: str) -> tuple[str, bool]:
    topology = PipeModelDataParallelTopology(num_pp=1, num_mp=2, num_dp=1)
    module = PipelineModule([LayerSpec(nn.Linear, 2, 2)], topology=topology)
    with torch.no_grad():
        module.get_parameter("0.weight").fill_(ds_comm.get_rank())
    module.save_state_dict(folder)
    module.load_state_dir(folder)
    same = bool((module.get_parameter("0.weight") == ds_comm.get_rank()).all())
    return Path(module.ckpt_prefix(folder, "t")).relative_to(folder).as_posix(), same


def test_ranks_of_another_axis_have_files_of_their_own(tmp_path: Path) -> None:
    assert run_ranks(model_parallel, 2, str(tmp_path)) == [("t/model_00", True), ("t/model_01", True)]
    files = [f"layer_00-model_0{rank}-model_states.safetensors" for rank in (0, 1)]
    assert sorted(path.name for path in tmp_path.glob("layer_*")) == files
    listed = run_ranks(listing, 1, str(tmp_path))[0]
    assert [Path(path).name for path in listed] == files


def listing(folder: str) -> list[str]:
    return PipelineModule([nn.Linear(2, 2)]).ckpt_layer_path_list(folder, 0)


def refused(folder: str, layers: int, strict: bool) -> str:
    module = PipelineModule(plain(layers), partition_method="uniform")
    with pytest.raises(PipelineError) as info:
        module.load_state_dir(folder, strict=strict)
    return str(info.value)


def spoil(folder: Path, how: str) -> None:
    files = sorted(folder.glob("layer_*"))
    index = json.loads((folder / "layers.json").read_text())
    if how == "missing":
        files[-1].unlink()
    elif how == "cut":
        files[-1].write_bytes(files[-1].read_bytes()[:-9])
    elif how == "other save":
        index["save"] = "0" * 16
    elif how == "format":
        index["format"] = 2
    elif how == "shape":
        files[-1].write_bytes(files[0].read_bytes())
    if how == "no index":
        (folder / "layers.json").unlink()
    else:
        (folder / "layers.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("missing", "stage 1: .*layer_08-model_states.safetensors is not there"),
        ("cut", "stage 1: .*layer_08-model_states.safetensors cannot be read"),
        ("other save", "is of another save than layers.json"),
        ("format", "has format 2; expected 1"),
        ("shape", r"of layer 8 in layer_08-model_states.safetensors is \(11.*\); expected \(8.*\)"),
        ("no index", r"layers.json cannot be read: .*; expected a folder written by"),
    ],
)
def test_what_cannot_be_loaded_is_an_error_on_every_rank(how: str, text: str, tmp_path: Path) -> None:
    run_ranks(save, 2, str(tmp_path), "plain", {})
    spoil(tmp_path, how)
    first, second = run_ranks(refused, 2, str(tmp_path), 5, True)
    assert first == second
    with pytest.raises(PipelineError, match=text):
        raise PipelineError(first)


@pytest.fixture
def world() -> Any:
    ds_comm.init_distributed()
    yield
    ds_comm.destroy_process_group()


@pytest.mark.usefixtures("world")
def test_names_and_strictness(tmp_path: Path) -> None:
    frozen = make("frozen", 1)
    frozen.save_state_dict(tmp_path, exclude_frozen_params=True)
    assert not (tmp_path / "layer_00-model_states.safetensors").exists()
    with pytest.raises(PipelineError, match=r"layer 0 in .* lacks \['bias', 'weight'\] and has \[\]"):
        frozen.load_state_dir(tmp_path)
    frozen.load_state_dir(tmp_path, strict=False)
    with pytest.raises(PipelineError, match="holds 5 layers; expected the model's 10"):
        make("plain", 1).load_state_dir(tmp_path)


class Shared(nn.Module):
    """One weight under two names, and a buffer that is a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.one.weight
        self.register_buffer("whole", torch.arange(4.0))
        self.register_buffer("piece", self.whole[:2])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.other(self.one(inputs))


@pytest.mark.usefixtures("world")
def test_shared_memory(tmp_path: Path) -> None:
    first, second = PipelineModule([Shared()]), PipelineModule([Shared()])
    first.save_state_dict(tmp_path)
    second.load_state_dir(tmp_path)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def unwritable(folder: str) -> str:
    module = make("plain", 1)
    with pytest.raises(PipelineError) as info:
        module.save_state_dict(Path(folder) / ("file" if ds_comm.get_rank() else "fine"))
    return str(info.value)


def test_a_rank_that_cannot_write_is_an_error_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    first, second = run_ranks(unwritable, 2, str(tmp_path))
    assert first == second
    assert first.startswith("stage 1: ") and "file" in first


def sharded(folder: str) -> list[str]:
    module = PipelineModule([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
    module.save_state_dict(folder)
    if ds_comm.get_rank():
        weight = module.get_parameter("1.weight")
        weight.ds_numel = weight.numel()  # type: ignore[attr-defined]  # as ZeRO stage 3 leaves it
        weight.data = torch.empty(0)
    found = []
    for act in (module.load_state_dir, module.save_state_dict):
        with pytest.raises(PipelineError) as error:
            act(folder)
        found.append(str(error.value))
    return found


def test_sharded_parameters_are_refused_on_every_rank(tmp_path: Path) -> None:
    """Files without their elements would look like a save."""
    for texts in run_ranks(sharded, 2, str(tmp_path)):
        assert all("stage 1: weight is sharded" in text for text in texts)


def replicas_that_cannot(folder: str) -> str:
    """Only the first replica writes; the second learns that it could not."""
    module = PipelineModule([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)], num_stages=2)
    (Path(folder) / "file").write_text("")
    with pytest.raises(PipelineError) as error:
        module.save_state_dict(Path(folder) / "file")
    return str(error.value)


def test_replicas_do_not_wait_for_one_that_cannot_write(tmp_path: Path) -> None:
    texts = run_ranks(replicas_that_cannot, 4, str(tmp_path), timeout=30)
    assert len(set(texts)) == 1 and texts[0].startswith("stage 0: ")
