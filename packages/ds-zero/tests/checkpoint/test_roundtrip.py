"""Save at one layout, load at any other: values, scalars, extras, names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ckpt_helpers import ADAM, BLOCKS, assert_true, make_map, make_segments, ok, on_threads, save_on_threads, true_value
from safetensors import safe_open

from ds_zero.checkpoint import load, open_checkpoint, save
from ds_zero.errors import CheckpointError
from ds_zero.layout import ParamSpec, plan_shard_map


def load_on_threads(directory, size, *, stage=3, shard_map=None, keys=ADAM, **options):
    shard_map = shard_map or make_map(size, stage=stage)

    def body(peers):
        targets = make_segments(shard_map, peers.rank, keys=keys, fill=False)
        return load(directory, targets, shard_map=shard_map, peers=peers, **options), targets

    return on_threads(size, body)


@pytest.mark.parametrize(("writers", "stage"), [(1, 0), (2, 0), (2, 3), (3, 1), (5, 3)])
@pytest.mark.parametrize(("readers", "to_stage"), [(1, 0), (2, 3), (3, 0), (7, 2)])
def test_any_layout_reads_any_other(tmp_path: Path, writers: int, stage: int, readers: int, to_stage: int) -> None:
    ok(save_on_threads(tmp_path, "t", writers, stage=stage))
    for loaded, targets in ok(load_on_threads(tmp_path, readers, stage=to_stage)):
        assert_true(targets)
        assert loaded.tag == "t"
        assert loaded.extra == {"global_steps": 3}
        assert loaded.world_size == writers
        assert all(t.scalars == {"step": 7.0} for t in targets if t.unit.trainable)


def test_reshard_two_three_one(tmp_path: Path) -> None:
    ok(save_on_threads(tmp_path, "two", 2))
    shard_map = make_map(3)

    def reshard(peers):
        targets = make_segments(shard_map, peers.rank, fill=False)
        load(tmp_path, targets, shard_map=shard_map, peers=peers)
        save(tmp_path, "three", targets, shard_map=shard_map, peers=peers, asynchronous=False)

    ok(on_threads(3, reshard))
    [(loaded, targets)] = ok(load_on_threads(tmp_path, 1, stage=0))
    assert loaded.tag == "three"
    assert_true(targets)


def test_other_units_read_the_same_parameters(tmp_path: Path) -> None:
    ok(save_on_threads(tmp_path, "t", 2))
    merged = make_map(3, blocks=[("all", [spec for _, specs in BLOCKS for spec in specs])])
    for _, targets in ok(load_on_threads(tmp_path, 3, shard_map=merged)):
        assert_true(targets)


def test_shards_are_plain_safetensors(tmp_path: Path) -> None:
    """The safetensors library reads them, and the pieces' names say which elements they are."""
    [path, _] = ok(save_on_threads(tmp_path, "t", 2))
    manifest = open_checkpoint(tmp_path).manifest
    counted: dict[str, int] = {}
    for rank in range(2):
        with safe_open(path / f"shard_{rank:05d}-of-00002.safetensors", framework="pt") as file:
            assert file.metadata()["rank"] == str(rank)
            for name in file.keys():  # noqa: SIM118
                key, _, rest = name.partition("/")
                param, _, span = rest.rpartition("/")
                start, stop = map(int, span.split("-"))
                full = true_value(param, key, manifest.params[param].numel)
                assert torch.equal(file.get_tensor(name).float(), full[start:stop])
                counted[f"{key}/{param}"] = counted.get(f"{key}/{param}", 0) + stop - start
    assert counted == {f"{key}/{n}": p.numel for n, p in manifest.params.items() for key in p.keys}
    assert manifest.nbytes == sum(f.stat().st_size for f in path.glob("*.safetensors"))


def test_bytes_per_parameter(tmp_path: Path) -> None:
    blocks = [("big", [ParamSpec("w", (1000, 999), "bf16", True, 0)])]
    shard_map = make_map(2, blocks=blocks)
    ok(save_on_threads(tmp_path, "t", 2, shard_map=shard_map))
    assert sum(f.stat().st_size for f in (tmp_path / "t").iterdir()) < 12 * 999_000 + 8192


def test_weights_only_leaves_the_optimizer(tmp_path: Path) -> None:
    ok(save_on_threads(tmp_path, "t", 2))
    for _, targets in ok(load_on_threads(tmp_path, 2, weights_only=True)):
        assert_true(targets, keys=("master", "param"))
        for target in targets:
            assert target.scalars == {"step": 0.0}
            assert all(t.isnan().all() for key, t in target.tensors.items() if key.startswith("exp"))


def test_master_into_bf16_parameters(tmp_path: Path) -> None:
    """An engine without an optimizer asks for "param" in the model's dtype and gets the masters, rounded."""
    ok(save_on_threads(tmp_path, "t", 2))
    blocks = [(n, [ParamSpec(s.name, s.shape, "bf16", False, -1, s.aliases) for s in specs]) for n, specs in BLOCKS]
    shard_map = plan_shard_map(blocks, num_shards=3)
    for loaded, targets in ok(load_on_threads(tmp_path, 3, shard_map=shard_map)):
        assert loaded.missing == loaded.unexpected == ()
        for target in targets:
            assert target.tensors["param"].dtype == torch.bfloat16
            for piece in target.unit.pieces(target.start, target.stop):
                key = "param" if "frozen" in piece.slot.name else "master"
                value = true_value(piece.slot.name, key, piece.slot.numel)[piece.start : piece.stop]
                assert torch.equal(target.tensors["param"][piece.offset :][: piece.numel].float(), value)


def test_extra_rank_extra_and_buffers(tmp_path: Path) -> None:
    shard_map = make_map(2)
    extra = {
        "global_steps": 5,
        "lr": [1e-3, float("inf")],
        "client_state": {"t": torch.arange(6).view(2, 3), "pair": (1, "x", None), 3: {"$ds": True}, "raw": b"\0\xff"},
        "numpy": np.random.RandomState(0).get_state(),
        "np_scalar": np.float64(2.5),
    }

    def body(peers):
        own = {"rng": torch.full((4,), peers.rank, dtype=torch.uint8), "cursor": peers.rank * 10}
        buffers = {"bn.mean": torch.tensor([1.5, 2.5]), "bn.count": torch.tensor(4), "empty": torch.empty(0, 3)}
        segments = make_segments(shard_map, peers.rank, export=True)
        save(tmp_path, "t", segments, shard_map=shard_map, peers=peers, extra=extra, rank_extra=own, buffers=buffers)
        return load(tmp_path, make_segments(shard_map, peers.rank), shard_map=shard_map, peers=peers, tag="t")

    for rank, loaded in enumerate(ok(on_threads(2, body))):
        assert loaded.rank_extra["cursor"] == rank * 10
        assert loaded.rank_extra["rng"].tolist() == [rank] * 4
        assert loaded.buffers["bn.mean"].tolist() == [1.5, 2.5]
        assert loaded.buffers["bn.count"].shape == ()
        assert loaded.buffers["empty"].shape == (0, 3)
        state = loaded.extra["client_state"]
        assert torch.equal(state["t"], torch.arange(6).view(2, 3))
        assert state["pair"] == (1, "x", None)
        assert state[3] == {"$ds": True}
        assert state["raw"] == b"\0\xff"
        assert loaded.extra["lr"] == [1e-3, float("inf")]
        assert loaded.extra["np_scalar"] == 2.5
        other = np.random.RandomState(1)
        other.set_state(loaded.extra["numpy"])
        assert other.rand() == np.random.RandomState(0).rand()
    [(loaded, _)] = ok(load_on_threads(tmp_path, 1))
    assert loaded.rank_extra is None


def test_objects_in_client_state_are_refused_on_every_rank(tmp_path: Path) -> None:
    class Thing:
        pass

    ok(save_on_threads(tmp_path, "good", 2))
    for result in save_on_threads(tmp_path, "bad", 2, extra={"client_state": {"args": [1, Thing()]}}):
        assert isinstance(result, TypeError)
        assert "extra['client_state']['args'][1]" in str(result)
        assert "Thing" in str(result)
    assert {p.name for p in tmp_path.iterdir()} == {"good", "latest", "zero_to_fp32.py"}


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    ok(save_on_threads(tmp_path, "t", 2))
    blocks = [
        ("a", [ParamSpec("layer.0.weight", (7, 8), "bf16", True, 0), ParamSpec("new", (2,), "bf16", True, 0)]),
        ("b", [ParamSpec(f"extra.{i}", (2,), "bf16", True, 0) for i in range(30)]),
    ]
    shard_map = make_map(2, blocks=blocks)
    for result in load_on_threads(tmp_path, 2, shard_map=shard_map):
        assert isinstance(result, CheckpointError)
        text = str(result)
        assert "another model" in text
        assert "31 missing from the checkpoint: new, extra.0" in text
        assert "and 21 more" in text
        assert "6 unexpected in the checkpoint" in text
        assert "layer.0.weight [7, 7] (the model's is [7, 8])" in text


def test_not_strict_loads_what_is_common(tmp_path: Path) -> None:
    ok(save_on_threads(tmp_path, "t", 2))
    blocks = [*BLOCKS[:2], ("new", [ParamSpec("new.weight", (4,), "bf16", True, 0)])]
    shard_map = make_map(2, blocks=blocks)
    for loaded, targets in ok(load_on_threads(tmp_path, 2, shard_map=shard_map, strict=False)):
        assert loaded.missing == ("new.weight",)
        assert set(loaded.unexpected) == {"layer.1.weight", "layer.1.bias"}
        assert_true([t for t in targets if t.unit.name != "new"])
        assert all(t.tensors["master"].isnan().all() for t in targets if t.unit.name == "new")


def test_another_optimizer(tmp_path: Path) -> None:
    ok(save_on_threads(tmp_path, "t", 1, keys=("master", "momentum_buffer")))
    [result] = load_on_threads(tmp_path, 1)
    assert isinstance(result, CheckpointError)
    assert "embed.weight[exp_avg]" in str(result)
    assert "embed.weight[momentum_buffer]" in str(result)


def test_exclude_frozen(tmp_path: Path) -> None:
    ok(save_on_threads(tmp_path, "t", 2, exclude_frozen=True))
    assert "layer.0.frozen" not in open_checkpoint(tmp_path).manifest.params
    for _, targets in ok(load_on_threads(tmp_path, 2)):
        assert_true([t for t in targets if t.unit.trainable])
        assert all(t.tensors["param"].isnan().all() for t in targets if not t.unit.trainable)


def test_an_incomplete_export_is_refused(tmp_path: Path) -> None:
    shard_map = make_map(2)

    def body(peers):
        segments = make_segments(shard_map, peers.rank, export=True)
        segments = [s for s in segments if not (peers.rank == 1 and s.unit.name == "embed")]
        return save(tmp_path, "t", segments, shard_map=shard_map, peers=peers).wait()

    for result in on_threads(2, body):
        assert isinstance(result, CheckpointError)
        assert "embed.weight" in str(result)
    assert not (tmp_path / "t").exists()
    assert not (tmp_path / "latest").exists()


def test_nothing_to_load(tmp_path: Path) -> None:
    assert ok(load_on_threads(tmp_path, 2))[0][0] is None
    assert ok(load_on_threads(tmp_path / "nowhere", 1))[0][0] is None


def test_manifest_is_json(tmp_path: Path) -> None:
    [path] = ok(save_on_threads(tmp_path, "t", 1))
    body = json.loads((path / "manifest.json").read_text())
    assert body["params"]["embed.weight"]["aliases"] == ["head.weight"]
    assert body["params"]["embed.weight"]["shape"] == [23, 7]
    assert (tmp_path / "latest").read_text() == "t"
