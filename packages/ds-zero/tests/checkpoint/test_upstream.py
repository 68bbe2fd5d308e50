"""Checkpoints that upstream DeepSpeed 0.19.8 wrote (data/make_upstream_fixtures.py) load with their true values."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from ckpt_helpers import ok, on_threads
from safetensors import safe_open

from ds_zero.checkpoint import load, open_checkpoint
from ds_zero.checkpoint.unpickle import Inert, load_inert
from ds_zero.errors import CheckpointError
from ds_zero.layout import FROZEN, ParamSpec, ShardMap, plan_shard_map
from ds_zero.state import StateSegment

DATA = Path(__file__).parent / "data"
CASES = [(stage, dtype) for stage in (1, 2, 3) for dtype in ("bf16", "fp32")]


def unpack(tmp_path: Path, stage: int, dtype: str) -> Path:
    target = tmp_path / f"{stage}_{dtype}"
    with tarfile.open(DATA / f"upstream_{stage}_{dtype}.tar.xz") as archive:
        archive.extractall(target, filter="data")
    return target


def read_truth(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path / "truth.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def tiny_map(size: int, dtype: str) -> ShardMap:
    specs = [
        ParamSpec("embed.weight", (11, 7), dtype, True, 0, ("head.weight",)),
        ParamSpec("norm.weight", (7,), dtype, True, 1),
        ParamSpec("norm.bias", (7,), dtype, True, 1),
        ParamSpec("frozen.weight", (7, 7), dtype, False, FROZEN),
        ParamSpec("frozen.bias", (7,), dtype, False, FROZEN),
        ParamSpec("inner.weight", (13, 7), dtype, True, 0),
        ParamSpec("inner.bias", (13,), dtype, True, 1),
        ParamSpec("outer.weight", (7, 13), dtype, True, 0),
    ]
    return plan_shard_map([("a", specs[:3]), ("b", specs[3:])], num_shards=size)


def load_all(directory: Path, size: int, dtype: str, **options: Any) -> tuple[dict[str, torch.Tensor], Any, list[Any]]:
    """Load on `size` ranks; the full tensors by "key/name", rank 0's result, all segments."""
    shard_map = tiny_map(size, dtype)
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]

    def body(peers: Any) -> Any:
        targets = []
        for unit in shard_map.units:
            low, high = unit.shard_range(peers.rank)
            for cut in unit.segments(low, high):
                keys = {"master": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
                keys = keys if unit.trainable else {"param": torch_dtype}
                tensors = {key: torch.full((cut.numel,), torch.nan, dtype=kind) for key, kind in keys.items()}
                targets.append(StateSegment(unit, cut.group, low + cut.offset, cut.numel, tensors, {}))
        loaded = load(directory, targets, shard_map=shard_map, peers=peers, allow_pickle=True, **options)
        return loaded, targets

    results = ok(on_threads(size, body))
    segments = [target for _, targets in results for target in targets]
    full: dict[str, torch.Tensor] = {}
    for segment in segments:
        for piece in segment.unit.pieces(segment.start, segment.stop):
            for key, tensor in segment.tensors.items():
                whole = full.setdefault(f"{key}/{piece.slot.name}", torch.empty(piece.slot.numel, dtype=tensor.dtype))
                whole[piece.start : piece.stop] = tensor[piece.offset : piece.offset + piece.numel]
    return full, results[0][0], segments


@pytest.mark.parametrize(("stage", "dtype"), CASES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_masters_and_states(tmp_path: Path, stage: int, dtype: str, size: int) -> None:
    path = unpack(tmp_path, stage, dtype)
    truth, _ = read_truth(path)
    full, loaded, segments = load_all(path, size, dtype)
    for name, value in truth.items():
        assert torch.equal(full[name], value.reshape(-1)), name
    # Below stage 3 upstream's accessor gives no optimizer state: it is the same training, so stage 3's, up to rounding.
    other, _ = read_truth(unpack(tmp_path, 3, dtype)) if stage != 3 else (truth, {})
    for name, value in other.items():
        if name.startswith("exp_avg"):
            rtol, atol = (5e-2, 2e-4) if dtype == "bf16" else (1e-4, 1e-8)
            torch.testing.assert_close(full[name], value.reshape(-1), rtol=rtol, atol=atol)
    assert all(segment.scalars == {"step": 3.0} for segment in segments if segment.unit.trainable)
    assert loaded.buffers["scale"].tolist() == [0.5, 2.0, 3.25]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_counters_and_client_state(tmp_path: Path, stage: int) -> None:
    _, loaded, _ = load_all(unpack(tmp_path, stage, "bf16"), 1, "bf16")
    assert loaded.extra["upstream"] is True
    assert loaded.extra["counters"] == {"global_steps": 3, "global_samples": 12, "skipped_steps": 0}
    assert loaded.extra["client_state"] == {"note": "tiny", "numbers": [1, 2, 3]}
    assert [group["lr"] for group in loaded.extra["param_groups"]] == [1e-2, 5e-3]
    assert loaded.extra["loss_scaler"]["scale"] == 1.0
    assert loaded.rank_extra is None
    assert loaded.world_size == 2


def test_groups_are_as_the_script_made_them(tmp_path: Path) -> None:
    _, metadata = read_truth(unpack(tmp_path, 1, "fp32"))
    groups = json.loads(metadata["groups"])
    shard_map = tiny_map(1, "fp32")
    assert {n: shard_map.find(n)[1].group for names in groups.values() for n in names} == {
        n: int(g) for g, names in groups.items() for n in names
    }


def test_the_opt_in_is_explicit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = unpack(tmp_path, 2, "bf16")
    shard_map = tiny_map(1, "bf16")
    monkeypatch.delenv("DEEPSPEED_ALLOW_PICKLE", raising=False)
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        load(path, [], shard_map=shard_map)
    with pytest.raises(CheckpointError, match="upstream DeepSpeed"):
        open_checkpoint(path)
    monkeypatch.setenv("DEEPSPEED_ALLOW_PICKLE", "1")
    assert load(path, [], shard_map=shard_map) is not None


def test_weights_only(tmp_path: Path) -> None:
    path = unpack(tmp_path, 3, "bf16")
    full, _, _ = load_all(path, 2, "bf16", weights_only=True)
    truth, _ = read_truth(path)
    assert torch.equal(full["master/outer.weight"], truth["master/outer.weight"].reshape(-1))
    assert full["exp_avg/outer.weight"].isnan().all()


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    path = unpack(tmp_path, 2, "bf16")
    (path / "step3" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="written by 2 ranks"):
        load(path, [], shard_map=tiny_map(1, "bf16"), allow_pickle=True)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = unpack(tmp_path, 2, "bf16")
    file = path / "step3" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:-600])
    with pytest.raises(CheckpointError, match="zero_pp_rank_1_mp_rank_00_optim_states"):
        load(path, [], shard_map=tiny_map(1, "bf16"), allow_pickle=True)


class _Bomb:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('a pickle ran code')",))


def test_pickles_run_nothing(tmp_path: Path) -> None:
    torch.save({"bomb": _Bomb(), "t": torch.arange(3), "dtype": torch.bfloat16}, tmp_path / "x.pt")
    content = load_inert(tmp_path / "x.pt")
    assert isinstance(content["bomb"], Inert)
    assert content["bomb"].inert_class.endswith("exec")
    assert content["t"].tolist() == [0, 1, 2]
    assert content["dtype"] is torch.bfloat16
