"""The verb `load`: fill live memory from a checkpoint written by any number of ranks at any stage.

Each rank intersects what it needs (`ZeroOptimizer.import_targets()`) with what is stored and reads only that.
Collective at its end: if one rank cannot read, all raise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ds_comm.log import get_logger
from ds_zero.checkpoint import durable
from ds_zero.checkpoint.commit import wait_for_pending_saves
from ds_zero.checkpoint.format import dtype_from_name
from ds_zero.checkpoint.peers import Peers, peers_of
from ds_zero.checkpoint.progress import byte_progress
from ds_zero.checkpoint.read import Checkpoint, Want, other_tags, resolve_tag
from ds_zero.checkpoint.tree import decode_tree
from ds_zero.checkpoint.upstream import UpstreamCheckpoint, is_upstream
from ds_zero.errors import CheckpointError
from ds_zero.layout import ParamSlot, Piece, ShardMap
from ds_zero.state import MASTER, PARAM, StateSegment

__all__ = ["LoadedCheckpoint", "load", "state_keys"]

_LOGGER = get_logger(__name__)
_VALUES = (MASTER, PARAM)
_MAX_NAMES = 10
_Source = Checkpoint | UpstreamCheckpoint


@dataclasses.dataclass(frozen=True)
class LoadedCheckpoint:
    """What `load` read besides the segments.

    `rank_extra` is None when the checkpoint was written by another number of ranks. `missing` are the model's names
    that the checkpoint lacks (they keep their values), `unexpected` the checkpoint's that the model lacks.
    """

    path: Path
    tag: str
    extra: dict[str, Any]
    rank_extra: dict[str, Any] | None
    buffers: dict[str, torch.Tensor]
    world_size: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@dataclasses.dataclass
class _Differences:
    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    mismatched: list[str] = dataclasses.field(default_factory=list)

    def describe(self) -> str:
        parts = []
        for what, names in (
            ("missing from the checkpoint", self.missing),
            ("unexpected in the checkpoint", self.unexpected),
            ("of another shape", self.mismatched),
        ):
            if names:
                more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
                parts.append(f"{len(names)} {what}: {', '.join(names[:_MAX_NAMES])}{more}")
        return "; ".join(parts)


def load(
    directory: str | os.PathLike[str],
    targets: Sequence[StateSegment],
    *,
    shard_map: ShardMap,
    tag: str | None = None,
    peers: Peers | None = None,
    group: Any = None,
    weights_only: bool = False,
    strict: bool = True,
    allow_pickle: bool | None = None,
) -> LoadedCheckpoint | None:
    """Read a checkpoint into `targets`; collective over `peers` (default: the ranks of `group`).

    Args:
        targets: writable views of everything this rank needs; their scalars are replaced too.
        shard_map: the layout of the whole model, for comparing names and shapes.
        tag: default: what `latest` names.
        weights_only: leave the optimizer's state and scalars alone.
        strict: raise when parameters or state keys differ; otherwise what is common is loaded.
        allow_pickle: opt in to reading a checkpoint of upstream DeepSpeed 0.19, stages 1-3 (default: only if the
            environment says DEEPSPEED_ALLOW_PICKLE=1). Its `extra` is that of `UpstreamCheckpoint.extra`.
    Returns:
        None if `tag` is None and there is no `latest`.
    Raises:
        CheckpointError: on all ranks; nothing to load, damaged (file, chunk, checksums, and which other tags are
            complete), or of another model. After a damaged file the targets may be partly overwritten.
    """
    peers = peers_of(group) if peers is None else peers
    result: LoadedCheckpoint | None = None
    error: str | None = None
    try:
        wait_for_pending_saves()
    except OSError as failure:
        error = str(failure)
    peers.all_gather(None, label=f"load_checkpoint {tag}: earlier saves are done")  # rank 0 moves `latest` last
    try:
        root = Path(directory).absolute()
        source = _open(root, tag, allow_pickle)
        if source is not None:
            result = _load(source, targets, shard_map, peers, weights_only, strict)
    except OSError as failure:
        error = str(failure)
    outcomes = peers.all_gather((error, result.tag if result else None), label=f"load_checkpoint {tag}: loaded")
    failed = [(rank, text) for rank, (text, _) in enumerate(outcomes) if text is not None]
    if failed:
        same = len(failed) == peers.size and len({text for _, text in failed}) == 1
        where = "" if same else f"rank {failed[0][0]}: "
        raise CheckpointError(where + failed[0][1])
    if len({name for _, name in outcomes}) > 1:
        raise CheckpointError(f"the ranks found different tags in {directory}: {[name for _, name in outcomes]}")
    return result


def state_keys(
    directory: str | os.PathLike[str], tag: str | None = None, *, allow_pickle: bool | None = None
) -> dict[str, torch.dtype]:
    """The optimizer's per-element states that a checkpoint holds, with their dtypes: what to allocate before `load`.

    Empty if there is no checkpoint or it holds only weights.
    """
    source = _open(Path(directory).absolute(), tag, allow_pickle)
    found: dict[str, torch.dtype] = {}
    for param in source.manifest.params.values() if source is not None else ():
        found.update((key, dtype_from_name(record.dtype)) for key, record in param.keys.items() if key not in _VALUES)
    return found


def _open(root: Path, tag: str | None, allow_pickle: bool | None) -> _Source | None:
    named = durable.read_latest(root) if tag is None else tag
    if named and is_upstream(root / named):
        return UpstreamCheckpoint(root, named, allow_pickle)
    found = resolve_tag(root, tag)
    if found is None:
        return None
    with _naming_alternatives(root, found):
        return Checkpoint(root, found)


def _load(
    checkpoint: _Source,
    targets: Sequence[StateSegment],
    shard_map: ShardMap,
    peers: Peers,
    weights_only: bool,
    strict: bool,
) -> LoadedCheckpoint:
    differences = compare(checkpoint, shard_map, targets, weights_only=weights_only)
    text = differences.describe()
    if differences.mismatched or (text and strict):
        raise CheckpointError(f"{checkpoint.path} is a checkpoint of another model: {text}")
    if text:
        _LOGGER.warning("%s: %s", checkpoint.path, text)
    wants = list(_wants(checkpoint, targets, weights_only))
    with _naming_alternatives(checkpoint.directory, checkpoint.tag):
        with byte_progress(
            f"loading {checkpoint.tag}", sum(want.target.nbytes for want in wants), peers.rank
        ) as progress:
            mine = sum(want.target.numel() for want in wants) * peers.size  # do other ranks read the same bytes?
            stored = sum(p.numel * len(p.keys) for p in checkpoint.manifest.params.values())
            checkpoint.fill(wants, progress, direct=mine <= 1.5 * stored)
        extra, rank_extra, buffers = _read_extras(checkpoint, peers)
    if not weights_only:
        _load_scalars(checkpoint, targets)
    return LoadedCheckpoint(
        path=checkpoint.path,
        tag=checkpoint.tag,
        extra=extra,
        rank_extra=rank_extra,
        buffers=buffers,
        world_size=checkpoint.manifest.world_size,
        missing=tuple(differences.missing),
        unexpected=tuple(differences.unexpected),
    )


def _read_extras(
    checkpoint: _Source, peers: Peers
) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, torch.Tensor]]:
    if isinstance(checkpoint, UpstreamCheckpoint):
        return checkpoint.extra(), None, checkpoint.buffers
    extra = decode_tree(checkpoint.manifest.extra or {}, checkpoint.read_tensors("extra/"))
    rank_extra = None
    if checkpoint.manifest.world_size == peers.size:
        own = checkpoint.read_tensors(f"rank_extra/{peers.rank}/")
        rank_extra = decode_tree(checkpoint.manifest.rank_extra[peers.rank] or {}, own)
    buffers = {name.partition("/")[2]: value for name, value in checkpoint.read_tensors("buffer/").items()}
    return extra, rank_extra, buffers


@contextlib.contextmanager
def _naming_alternatives(directory: Path, tag: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {other_tags(directory, tag)}") from error


def compare(
    checkpoint: _Source, shard_map: ShardMap, targets: Iterable[StateSegment] = (), *, weights_only: bool = True
) -> _Differences:
    """Names, shapes and state keys in which a model and a checkpoint differ; the same on every rank that asks."""
    stored_names = checkpoint.manifest.names()
    found = _Differences()
    used: set[str] = set()
    wanted: dict[int, set[str]] = {}
    for target in targets:  # a group's parameters have the same states, another group's may have others
        wanted.setdefault(target.group, set()).update(key for key in target.tensors if key not in _VALUES)
    for unit in shard_map.units:
        for slot in unit.slots:
            name = _stored_name(slot, stored_names)
            if name is None:
                if slot.numel and not (checkpoint.manifest.exclude_frozen and not unit.trainable):
                    found.missing.append(slot.name)
                continue
            used.add(name)
            param = checkpoint.manifest.params[name]
            if param.shape != slot.shape:
                found.mismatched.append(f"{slot.name} {list(param.shape)} (the model's is {list(slot.shape)})")
            elif unit.trainable and not weights_only and (wanted_keys := wanted.get(slot.group)):
                stored_keys = set(param.keys) - set(_VALUES)
                found.missing.extend(f"{slot.name}[{key}]" for key in sorted(wanted_keys - stored_keys))
                found.unexpected.extend(f"{slot.name}[{key}]" for key in sorted(stored_keys - wanted_keys))
    found.unexpected.extend(name for name in checkpoint.manifest.params if name not in used)
    return found


def _stored_name(slot: ParamSlot, stored_names: dict[str, str]) -> str | None:
    for name in (slot.name, *slot.aliases):
        if name in stored_names:
            return stored_names[name]
    return None


def _pieces(checkpoint: _Source, targets: Iterable[StateSegment]) -> Iterator[tuple[StateSegment, Piece, str]]:
    """Each piece of each target together with the name it is stored under, where it is stored."""
    stored_names = checkpoint.manifest.names()
    for target in targets:
        for piece in target.unit.pieces(target.start, target.stop):
            name = _stored_name(piece.slot, stored_names)
            if name is not None:
                yield target, piece, name


def _wants(checkpoint: _Source, targets: Sequence[StateSegment], weights_only: bool) -> Iterator[Want]:
    for target, piece, name in _pieces(checkpoint, targets):
        keys = checkpoint.manifest.params[name].keys
        for key, tensor in target.tensors.items():
            source = checkpoint.value_key(name) if key in _VALUES else key
            if source in keys and not (weights_only and key not in _VALUES):
                yield Want(name, source, piece.start, tensor[piece.offset : piece.offset + piece.numel])


def _load_scalars(checkpoint: _Source, targets: Sequence[StateSegment]) -> None:
    """Give each segment the scalars of its parameters; where a new layout joins differing ones, the largest."""
    merged: dict[int, dict[str, float]] = {}
    for target, _, name in _pieces(checkpoint, targets):
        known = merged.setdefault(id(target), {})
        for key, value in checkpoint.manifest.params[name].scalars.items():
            if known.setdefault(key, value) != value:
                _LOGGER.warning(
                    "unit %s joins parameters with %s %s and %s; using the larger",
                    target.unit.name,
                    key,
                    known[key],
                    value,
                )
            known[key] = max(known[key], value)
    for target in targets:
        target.scalars.update(merged.get(id(target), {}))
