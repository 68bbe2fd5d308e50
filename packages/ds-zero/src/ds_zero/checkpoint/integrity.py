"""Verifying checkpoints: every byte of every file against the manifest, and the manifest against itself."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from ds_zero.checkpoint.format import CHUNK_NBYTES, Entry, read_header
from ds_zero.checkpoint.manifest import Manifest
from ds_zero.checkpoint.progress import byte_progress
from ds_zero.checkpoint.read import Checkpoint, open_checkpoint
from ds_zero.errors import CheckpointError

__all__ = ["FileReport", "VerifyReport", "verify"]

_MAX_ERRORS = 5


@dataclasses.dataclass(frozen=True)
class FileReport:
    """One file: how much of it was read, and what is wrong with it (at most five texts)."""

    name: str
    nbytes: int
    errors: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.errors


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """One checkpoint: a report per file, the manifest first."""

    tag: str
    path: Path
    files: tuple[FileReport, ...]

    @property
    def ok(self) -> bool:
        return all(file.ok for file in self.files)

    @property
    def errors(self) -> list[str]:
        return [error for file in self.files for error in file.errors]


def verify(directory: str | os.PathLike[str], tag: str | None = None, *, show_progress: bool = True) -> VerifyReport:
    """Read the checkpoint `tag` (default: what `latest` names) and check every checksum.

    Does not stop at the first fault and does not raise for a damaged shard: `report.ok` tells.

    Raises:
        CheckpointError: there is no such checkpoint, or its manifest cannot be read at all.
    """
    checkpoint = open_checkpoint(directory, tag)
    manifest = checkpoint.manifest
    reports = [FileReport("manifest.json", 0, tuple(_check_manifest(manifest)))]
    with byte_progress(f"verifying {checkpoint.tag}", manifest.nbytes, 0 if show_progress else 1) as progress:
        reports.extend(_verify_file(checkpoint, index, progress) for index in range(len(manifest.files)))
    return VerifyReport(checkpoint.tag, checkpoint.path, tuple(reports))


def _check_manifest(manifest: Manifest) -> list[str]:
    """Spans that leave their file or do not tile their parameter."""
    errors: list[str] = []
    for name, param in manifest.params.items():
        for key, record in param.keys.items():
            position = 0
            for span in record.spans:
                if span.start != position or not 0 <= span.file < len(manifest.files):
                    errors.append(f"{key} of {name}: elements {position}..{span.start} are not covered once")
                    break
                position = span.stop
            else:
                if position != param.numel:
                    errors.append(f"{key} of {name}: elements {position}..{param.numel} are missing")
    return errors[:_MAX_ERRORS]


def _verify_file(checkpoint: Checkpoint, index: int, progress: Callable[[int], None] | None) -> FileReport:
    record = checkpoint.manifest.files[index]
    path = checkpoint.path / record.name
    try:
        checkpoint.check_sizes([index])
    except CheckpointError as error:
        return FileReport(record.name, 0, (str(error),))
    chunks = range(-(-record.nbytes // CHUNK_NBYTES))
    if len(record.chunks) != len(chunks):
        return FileReport(record.name, 0, (f"{path} has {len(chunks)} chunks, {len(record.chunks)} checksums",))
    damaged: list[CheckpointError] = []
    checkpoint.read_chunks(index, [(chunk, ()) for chunk in chunks], progress, errors=damaged)
    errors = [str(error) for error in damaged]
    if not errors:
        errors = _check_header(checkpoint.manifest, index, path)
    return FileReport(record.name, record.nbytes, tuple(errors[:_MAX_ERRORS]))


def _check_header(manifest: Manifest, index: int, path: Path) -> list[str]:
    """The file's own safetensors header must say of each piece what the manifest says."""
    entries, _, end = read_header(path)
    errors = (
        [] if end == manifest.files[index].nbytes else [f"{path}: the header ends at {end}, not at the end of file"]
    )
    for name, param in manifest.params.items():
        for key, record in param.keys.items():
            for span in record.spans:
                if span.file == index:
                    piece = f"{key}/{name}/{span.start}-{span.stop}"
                    expected = Entry(piece, record.dtype, (span.stop - span.start,), span.offset)
                    if entries.get(piece) != expected:
                        errors.append(f"{path}: the header has {entries.get(piece)}, the manifest {expected}")
    return errors
