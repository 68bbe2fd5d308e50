"""The verb `save`: plan, agree, write, and hand the rest to the background.

While `save` runs, the ranks meet three times (prepare, begin, written), so that an error on one rank is an error on
all of them, before anything but a temporary directory has changed. When it returns, the live state may change again:
all of it is in the file, except what the gate protects. That is read in the background while the next forward and
backward run, which write neither masters nor optimizer state; the next update waits for the rest of it, if any.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ds_comm.watchdog import seconds_from_environment
from ds_zero.__about__ import __version__
from ds_zero.checkpoint import durable
from ds_zero.checkpoint.commit import Commit, PendingSave, wait_for_pending_saves
from ds_zero.checkpoint.manifest import RankRecord, shard_file_name
from ds_zero.checkpoint.peers import Peers, peers_of
from ds_zero.checkpoint.shardfile import ShardPlan, ShardWriter, plan_shard
from ds_zero.checkpoint.tree import encode_tree
from ds_zero.errors import CheckpointError
from ds_zero.layout import ShardMap
from ds_zero.state import StateSegment, UpdateGate

__all__ = ["save"]

_MARGIN_NBYTES = 1 << 20
_SHARED_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """What one rank says before anything is written."""

    tag: str
    directory: str
    fingerprint: str
    nbytes: int
    identity: tuple[str, int, int]
    error: BaseException | None


def save(
    directory: str | os.PathLike[str],
    tag: str,
    segments: Sequence[StateSegment],
    *,
    shard_map: ShardMap,
    extra: Mapping[str, Any] | None = None,
    rank_extra: Mapping[str, Any] | None = None,
    buffers: Mapping[str, torch.Tensor] | None = None,
    peers: Peers | None = None,
    group: Any = None,
    save_latest: bool = True,
    exclude_frozen: bool = False,
    asynchronous: bool = True,
    timeout: float | None = None,
    gate: UpdateGate | None = None,
    duplicates: Collection[str] = (),
    stores_buffers: bool | None = None,
) -> PendingSave:
    """Write a checkpoint to `directory/tag`; collective over `peers` (default: the ranks of `group`).

    Args:
        segments: what this rank must save (`ZeroOptimizer.export_state()`): every element on exactly one rank.
        shard_map: the layout of the whole model (of one that lies in parts: `ShardMap.joined`).
        extra: global state as nested containers of JSON values and tensors; rank 0's is stored.
        rank_extra: this rank's own (RNG states, data cursor).
        buffers: persistent module buffers.
        stores_buffers: whether this rank's buffers are stored (default: rank 0's are); each on one rank only.
        duplicates: names of parameters in `segments` that another rank saves.
        save_latest: let `latest` name this tag.
        exclude_frozen: leave out the parameters that no optimizer group holds.
        asynchronous: return when the shards are in the page cache; fsync, manifest, rename and `latest` follow in a
            thread that the next save, a load and exit wait for. False: return when the checkpoint is durable.
        timeout: seconds that a rank waits for others in the background (default: DEEPSPEED_TIMEOUT minutes, or 600 s).
    Raises:
        CheckpointError: on all ranks; disk full, unwritable, ranks disagree. The previous checkpoint stays intact.
        TypeError: `extra` or `rank_extra` holds something that is neither JSON nor a tensor; names its path.
    """
    peers = peers_of(group) if peers is None else peers
    target = Path(directory).absolute()
    stores_buffers = peers.rank == 0 if stores_buffers is None else stores_buffers
    buffers = (buffers or {}) if stores_buffers else {}
    plan, trees, error = _plan(peers.rank, tag, segments, extra, rank_extra, buffers, exclude_frozen, duplicates)
    prepared = _Prepared(
        tag, str(directory), shard_map.fingerprint(), plan.nbytes if plan else 0, durable.process_identity(), error
    )
    everyone: list[_Prepared] = peers.all_gather(prepared, label=f"save_checkpoint {tag}: prepare")
    _check_agreement(everyone)
    assert plan is not None  # or _check_agreement had raised
    nonce = _begin(peers, target, tag, sum(item.nbytes for item in everyone))
    temporary = durable.temporary_directory(target, tag, nonce)
    file = shard_file_name(peers.rank, peers.size)
    writer = ShardWriter(plan, temporary / file, defer=gate is not None)
    _write(peers, writer, temporary, file)
    params, tensors = plan.params, plan.tensors

    def write() -> RankRecord:
        return RankRecord(peers.rank, writer.write_rest(), params, tensors, *trees)

    commit = Commit(
        directory=target,
        tag=tag,
        nonce=nonce,
        temporary=temporary,
        rank=peers.rank,
        write=write,
        nbytes=sum(item.nbytes for item in everyone),
        identities=tuple(item.identity for item in everyone),
        shard_map=shard_map,
        ds_version=__version__,
        save_latest=save_latest,
        exclude_frozen=exclude_frozen,
        timeout=seconds_from_environment() if timeout is None else timeout,
    )
    if gate is not None:
        gate.hold(writer.finish_reading)
    pending = PendingSave(commit)
    if not asynchronous:
        pending.wait()
    return pending


def _plan(
    rank: int,
    tag: str,
    segments: Sequence[StateSegment],
    extra: Mapping[str, Any] | None,
    rank_extra: Mapping[str, Any] | None,
    buffers: Mapping[str, torch.Tensor],
    exclude_frozen: bool,
    duplicates: Collection[str],
) -> tuple[ShardPlan | None, tuple[Any, Any], BaseException | None]:
    """The file of this rank, or the error that every rank shall raise."""
    tensors: dict[str, torch.Tensor] = {}
    try:
        wait_for_pending_saves()
        durable.check_tag(tag)
        global_tree = encode_tree(dict(extra or {}), "extra", tensors, what="extra") if rank == 0 else None
        rank_tree = encode_tree(dict(rank_extra or {}), f"rank_extra/{rank}", tensors, what="rank_extra")
        tensors.update((f"buffer/{name}", tensor) for name, tensor in buffers.items())
        metadata = {"format": "pt", "ds_zero": __version__, "rank": str(rank), "tag": tag}
        plan = plan_shard(rank, segments, tensors, metadata, exclude_frozen=exclude_frozen, skip=duplicates)
    except (OSError, TypeError, ValueError) as error:
        return None, (None, None), error
    return plan, (global_tree, rank_tree), None


def _check_agreement(everyone: Sequence[_Prepared]) -> None:
    failed = [(rank, item.error) for rank, item in enumerate(everyone) if item.error is not None]
    if failed:
        rank, error = failed[0]
        kind = type(error) if isinstance(error, (TypeError, CheckpointError)) else CheckpointError
        where = "" if len(everyone) == 1 else f"rank {rank}: "
        raise kind(f"{where}{error}") from error
    for what in ("tag", "directory", "fingerprint"):
        values = [getattr(item, what) for item in everyone]
        for rank, value in enumerate(values):
            if value != values[0]:
                raise CheckpointError(
                    f"the ranks disagree on the {what} of the checkpoint: rank 0 has {values[0]!r}, rank {rank} has "
                    f"{value!r}; call save with the same arguments on every rank"
                )


def _begin(peers: Peers, target: Path, tag: str, needed: int) -> str:
    """Rank 0 clears leftovers, checks the space and makes the temporary directory; all ranks learn its nonce."""
    answer: str | BaseException | None = None
    if peers.rank == 0:
        try:
            target.mkdir(parents=True, exist_ok=True)
            durable.remove_stale(target)
            free = durable.free_nbytes(target)
            if free < needed + _MARGIN_NBYTES:
                raise CheckpointError(
                    f"{target}: the disk is too full for checkpoint {tag!r}: it needs {needed + _MARGIN_NBYTES} bytes, "
                    f"{free} are free; remove old checkpoints or save elsewhere (nothing was written)"
                )
            answer = uuid.uuid4().hex[:12]
            durable.claim(durable.temporary_directory(target, tag, answer))
        except OSError as error:
            answer = (
                error if isinstance(error, CheckpointError) else CheckpointError(f"{target} is not writable: {error}")
            )
    answer = peers.all_gather(answer, label=f"save_checkpoint {tag}: begin")[0]
    if isinstance(answer, BaseException):
        raise answer
    return str(answer)


def _write(peers: Peers, writer: ShardWriter, temporary: Path, file: str) -> None:
    """Write what cannot wait; if any rank could not, remove all shards and raise everywhere."""
    error: str | None = None
    try:
        _await_directory(temporary)
        writer.write_now()
    except OSError as failure:
        error = str(failure)
    errors = peers.all_gather(error, label=f"save_checkpoint {temporary.name}: written")
    found = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None]
    if found:
        writer.close()
        (temporary / file).unlink(missing_ok=True)
        if peers.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        free = durable.free_nbytes(temporary.parent) if temporary.parent.exists() else 0
        raise CheckpointError(
            f"checkpoint was not saved; {'; '.join(found)} ({free} bytes are free now); "
            "the previous checkpoint is untouched"
        )


def _await_directory(temporary: Path) -> None:
    """Network file systems may show rank 0's directory to the others a little later."""
    deadline = time.monotonic() + _SHARED_SECONDS
    while not temporary.exists():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{temporary.parent} is not shared: rank 0 made {temporary.name} there and this rank does not see it; "
                "save to a directory that all hosts mount"
            )
        time.sleep(0.05)
