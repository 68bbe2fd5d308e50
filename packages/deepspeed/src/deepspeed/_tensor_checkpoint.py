"""Checkpoints of a model that tensor-parallel ranks hold in parts.

    save_dir/latest                        written last, when all parts are durable
    save_dir/<tag>/mp_rank_00_of_02/       a checkpoint of ds_zero: one part, by its data-parallel ranks
    save_dir/<tag>/mp_rank_01_of_02/

Each part loads at any number of data-parallel ranks and any stage, at the same number of tensor-parallel ranks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

import ds_comm
import ds_zero
from ds_inference import AppliedPlan
from ds_zero import checkpoint as store
from ds_zero.checkpoint.durable import write_durably

__all__ = ["agree_on_tag", "finish_save", "folder_of", "joined_state", "place_of_tag", "raise_together"]

_FOLDER = re.compile(r"mp_rank_\d+_of_(\d+)")


def folder_of(applied: AppliedPlan) -> str:
    """The folder of this rank's part, inside of a tag's."""
    return f"mp_rank_{applied.rank:02d}_of_{applied.size:02d}"


def agree_on_tag(applied: AppliedPlan, tag: str | None) -> None:
    """DivergenceError on all ranks of the group unless they save, or load, the same tag; collective."""
    applied.communicator.agree(str(tag), label="tag of the checkpoint")


def finish_save(
    applied: AppliedPlan, begin: Callable[[], Any], directory: str | os.PathLike[str], tag: str, names_it: bool
) -> None:
    """`begin` the save of this rank's part; return when every part is durable and `latest` names the tag (written by
    the rank that `names_it`).

    CheckpointError on all ranks of the group when a part could not be written.
    """
    failure = ""
    try:
        pending = begin()
        if pending is not None:
            pending.wait()
    except ds_zero.CheckpointError as error:
        failure = str(error)
    raise_together(applied, failure)
    if names_it:
        write_durably(Path(directory) / store.LATEST, tag)
    applied.communicator.barrier(label="the checkpoint is complete")


def raise_together(applied: AppliedPlan, failure: str) -> None:
    """CheckpointError on every rank of the group if one has a failure; collective."""
    found: list[Any] = [None] * applied.size
    ds_comm.all_gather_object(found, failure, group=applied.communicator.group)
    if texts := [text for text in found if text]:
        raise ds_zero.CheckpointError(texts[0])


def place_of_tag(
    applied: AppliedPlan, directory: str | os.PathLike[str], tag: str | None
) -> tuple[Path, str, str] | None:
    """(folder, name in it, tag) of this rank's part; None without a tag and `latest`; collective.

    CheckpointError on all ranks for a tag that has no such part.
    """
    tag = store.read_latest(Path(directory)) if tag is None else tag
    agree_on_tag(applied, tag)
    if tag is None:
        return None
    root, folder = Path(directory) / tag, folder_of(applied)
    failure = ""
    if not (root / folder).is_dir():
        others = sorted({int(m[1]) for p in root.glob("mp_rank_*") if (m := _FOLDER.fullmatch(p.name))})
        had = f"it was saved by {others[0]} tensor-parallel ranks" if others else "it has no tensor-parallel parts"
        failure = (
            f"checkpoint {root} has no {folder}: {had}; load it at the same number, or load its weights with"
            " load_module_state_dict"
        )
    raise_together(applied, failure)
    return root, folder, tag


def joined_state(applied: AppliedPlan, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The state dict of the whole model from the ranks' parts, on the first rank, None elsewhere; ties stay."""
    whole: dict[int, Tensor | None] = {}
    for name, value in state.items():
        if id(value) not in whole:
            whole[id(value)] = applied.joined(name, value)
    if applied.rank:
        return None
    return {name: found for name, value in state.items() if (found := whole[id(value)]) is not None}
