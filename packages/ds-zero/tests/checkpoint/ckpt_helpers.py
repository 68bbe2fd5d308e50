"""A model of plain tensors laid out by the shard map, and ranks as threads, for checkpoint tests without a runtime."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ds_zero.layout import FROZEN, ParamSpec, ShardMap, plan_shard_map
from ds_zero.state import MASTER, PARAM, StateSegment

BLOCKS = [
    ("embed", [ParamSpec("embed.weight", (23, 7), "bf16", True, 0, ("head.weight",))]),
    ("layer.0", [
        ParamSpec("layer.0.weight", (7, 7), "bf16", True, 0),
        ParamSpec("layer.0.bias", (7,), "bf16", True, 1),
        ParamSpec("layer.0.scale", (), "bf16", True, 1),
        ParamSpec("layer.0.frozen", (3, 11), "bf16", False, FROZEN),
    ]),
    ("layer.1", [
        ParamSpec("layer.1.weight", (5, 13), "bf16", True, 0),
        ParamSpec("layer.1.bias", (5,), "bf16", True, 1),
    ]),
]  # fmt: skip
ADAM = (MASTER, "exp_avg", "exp_avg_sq")


def make_map(num_shards: int, *, stage: int = 3, blocks: Sequence[Any] = tuple(BLOCKS)) -> ShardMap:
    return plan_shard_map(blocks, num_shards=num_shards, state_shards=1 if stage == 0 else num_shards)


def true_value(name: str, key: str, numel: int) -> torch.Tensor:
    """The value that `key` of a parameter has everywhere in these tests (exact in bf16)."""
    seed = sum(ord(c) * (i + 1) for i, c in enumerate(f"{key}/{name}"))
    return torch.randint(-128, 128, (numel,), generator=torch.Generator().manual_seed(seed)).float() / 8


def make_segments(
    shard_map: ShardMap, rank: int, *, keys: Sequence[str] = ADAM, fill: bool = True, export: bool = False
) -> list[StateSegment]:
    """This rank's segments; true values or NaN. `export`: as export_state(), each element on one rank."""
    segments: list[StateSegment] = []
    for unit in shard_map.units:
        low, high = unit.shard_range(rank) if export else shard_map.state_range(unit, rank)
        for cut in unit.segments(low, high):
            names = keys if unit.trainable else (PARAM,)
            dtype = torch.float32 if unit.trainable else torch.bfloat16
            tensors = {key: torch.full((cut.numel,), torch.nan, dtype=dtype) for key in names}
            segment = StateSegment(
                unit, cut.group, low + cut.offset, cut.numel, tensors, {"step": 7.0 if fill else 0.0}
            )
            if fill:
                for piece in unit.pieces(segment.start, segment.stop):
                    for key, tensor in tensors.items():
                        value = true_value(piece.slot.name, key, piece.slot.numel)[piece.start : piece.stop]
                        tensor[piece.offset : piece.offset + piece.numel] = value
            segments.append(segment)
    return segments


def assert_true(segments: Sequence[StateSegment], *, keys: Sequence[str] | None = None) -> None:
    """Every element of every segment has its true value (a rank that owns only padding has no segment)."""
    for segment in segments:
        for piece in segment.unit.pieces(segment.start, segment.stop):
            for key, tensor in segment.tensors.items():
                if keys is None or key in keys:
                    value = true_value(piece.slot.name, key, piece.slot.numel)[piece.start : piece.stop]
                    assert torch.equal(tensor[piece.offset : piece.offset + piece.numel].float(), value), (
                        piece.slot.name
                    )


class _Board:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.values: list[Any] = [None] * size


class ThreadPeers:
    """One of several ranks that are threads of this process."""

    def __init__(self, rank: int, board: _Board) -> None:
        self.rank = rank
        self.size = len(board.values)
        self._board = board

    def all_gather(self, value: Any, *, label: str) -> list[Any]:
        self._board.values[self.rank] = value
        self._board.barrier.wait()
        found = list(self._board.values)
        self._board.barrier.wait()
        return found


def on_threads(size: int, function: Callable[[ThreadPeers], Any]) -> list[Any]:
    """Run `function(peers)` on `size` ranks; per rank its result or the exception it raised."""
    board = _Board(size)
    results: list[Any] = [None] * size

    def body(rank: int) -> None:
        try:
            results[rank] = function(ThreadPeers(rank, board))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def save_on_threads(directory: Any, tag: str, size: int, *, stage: int = 3, **options: Any) -> list[Any]:
    """Save the true model from `size` ranks and wait; per rank the path or the exception."""
    from ds_zero.checkpoint import save

    shard_map = options.pop("shard_map", None) or make_map(size, stage=stage)
    keys = options.pop("keys", ADAM)
    options.setdefault("extra", {"global_steps": 3})

    def body(peers: ThreadPeers) -> Any:
        segments = make_segments(shard_map, peers.rank, keys=keys, export=True)
        return save(directory, tag, segments, shard_map=shard_map, peers=peers, **options).wait()

    return on_threads(size, body)


def ok(results: Sequence[Any]) -> list[Any]:
    """The results, after raising the first exception among them."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return list(results)
