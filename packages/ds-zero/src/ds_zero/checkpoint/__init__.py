"""Checkpoints: one on-disk form, written streaming and committed atomically, readable at any world size and stage.

    pending = save(directory, tag, optimizer.export_state(), shard_map=optimizer.shard_map, extra={...})
    loaded = load(directory, optimizer.import_targets(), shard_map=optimizer.shard_map)

A checkpoint is a directory of safetensors shards (one per rank that wrote) and a `manifest.json` with names, global
shapes, ranges and checksums. No pickle. See docs/checkpoints.md.
"""

from __future__ import annotations

from ds_zero.checkpoint.commit import PendingSave, wait_for_pending_saves
from ds_zero.checkpoint.consolidate import export_safetensors, export_torch, full_state_dict
from ds_zero.checkpoint.durable import LATEST, committed_tags, read_latest
from ds_zero.checkpoint.integrity import VerifyReport, verify
from ds_zero.checkpoint.manifest import MANIFEST_NAME, Manifest
from ds_zero.checkpoint.read import Checkpoint, open_checkpoint
from ds_zero.checkpoint.restore import LoadedCheckpoint, load, state_keys
from ds_zero.checkpoint.write import save

__all__ = [
    "Checkpoint",
    "LATEST",
    "LoadedCheckpoint",
    "MANIFEST_NAME",
    "Manifest",
    "PendingSave",
    "VerifyReport",
    "committed_tags",
    "export_safetensors",
    "export_torch",
    "full_state_dict",
    "load",
    "open_checkpoint",
    "read_latest",
    "save",
    "state_keys",
    "verify",
    "wait_for_pending_saves",
]
