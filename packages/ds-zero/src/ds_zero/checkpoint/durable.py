"""Names on disk that change all at once: fsync, atomic replacement, `latest`, and leftovers of dead saves.

    <dir>/<tag>/                    a committed checkpoint (its manifest.json was written last)
    <dir>/.<tag>.tmp-<nonce>/       a save under way, or what a crash left of one
    <dir>/.<tag>.old-<nonce>/       the previous content of <tag>, only for the moment of replacing it where the file
                                    system cannot exchange two directories; readers look here when <tag> is gone
    <dir>/latest                    the tag of the newest committed checkpoint

Invariant: at every instant, and after a crash at any instant, `latest` names a directory that is complete.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from ds_zero.checkpoint.manifest import MANIFEST_NAME
from ds_zero.errors import CheckpointError

__all__ = [
    "LATEST",
    "check_tag",
    "committed_tags",
    "free_nbytes",
    "fsync_path",
    "claim",
    "is_alive",
    "process_identity",
    "release",
    "read_latest",
    "remove_stale",
    "replace_directory",
    "tag_directory",
    "temporary_directory",
    "write_durably",
]

LATEST = "latest"
_OWNER = "owner.json"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_FOREIGN_STALE_SECONDS = 6 * 3600.0


def check_tag(tag: str) -> str:
    """A tag is one path component that is not hidden; CheckpointError otherwise."""
    if not tag or tag.startswith(".") or "/" in tag or "\0" in tag or tag == LATEST:
        raise CheckpointError(f"tag {tag!r} cannot name a checkpoint; expected a name such as 'global_step100'")
    return tag


def fsync_path(path: str | os.PathLike[str]) -> None:
    """Force a file's content, or a directory's names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, content: str, *, mode: int = 0o644) -> None:
    """Replace a file by `content`: a reader (or a crash) sees the old or the new text, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def free_nbytes(directory: Path) -> int:
    """Bytes that this user may still write to the file system of `directory`."""
    stats = os.statvfs(directory)
    return stats.f_bavail * stats.f_frsize


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one step; False where kernel or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def replace_directory(source: Path, target: Path, nonce: str) -> None:
    """Make `source` the content of `target` and remove what was there; a crash leaves one whole directory to find."""
    parent = target.parent
    if not target.exists():
        os.rename(source, target)
        fsync_path(parent)
        return
    if _exchange(source, target):
        fsync_path(parent)
        shutil.rmtree(source, ignore_errors=True)
        return
    old = parent / f".{target.name}.old-{nonce}"
    os.rename(target, old)
    os.rename(source, target)
    fsync_path(parent)
    shutil.rmtree(old, ignore_errors=True)


def tag_directory(directory: Path, tag: str) -> Path | None:
    """Where the committed content of `tag` is: its directory, or its `.old-` twin after a crash between two renames."""
    target = directory / check_tag(tag)
    if (target / MANIFEST_NAME).is_file():
        return target
    if not target.exists():
        for twin in sorted(directory.glob(f".{_escape(tag)}.old-*")):
            if (twin / MANIFEST_NAME).is_file():
                return twin
    return None


def _escape(tag: str) -> str:
    return re.sub(r"([*?\[\]])", r"[\1]", tag)


def committed_tags(directory: Path) -> list[str]:
    """Tags with a manifest, newest first."""
    found: list[tuple[int, str]] = []
    try:
        children = list(directory.iterdir())
    except OSError:
        return []
    for child in children:
        manifest = child / MANIFEST_NAME
        if not child.name.startswith(".") and manifest.is_file():
            found.append((manifest.stat().st_mtime_ns, child.name))
    return [name for _, name in sorted(found, reverse=True)]


def read_latest(directory: Path) -> str | None:
    """The tag in `latest`, or None if there is no such file."""
    try:
        return (directory / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def temporary_directory(directory: Path, tag: str, nonce: str) -> Path:
    return directory / f".{check_tag(tag)}.tmp-{nonce}"


def process_identity() -> tuple[str, int, int]:
    """(host, pid, start time): tells a live process from a later one with the same pid."""
    return socket.gethostname(), os.getpid(), _start_ticks(os.getpid())


def _start_ticks(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    fields = stat.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])


def is_alive(host: str, pid: int, start_ticks: int) -> bool:
    """False only when the process certainly ended; a process of another host counts as alive."""
    if host != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return start_ticks == 0 or _start_ticks(pid) == start_ticks


def claim(temporary: Path) -> None:
    """Create a save's temporary directory and note whose it is."""
    temporary.mkdir()
    (temporary / _OWNER).write_text(json.dumps(process_identity()), encoding="utf-8")


def release(committed: Path) -> None:
    """Remove the owner's note from a directory that has become a checkpoint."""
    (committed / _OWNER).unlink(missing_ok=True)


def _leftovers(directory: Path) -> Iterator[tuple[Path, str, str]]:
    """Hidden directories of saves: the path, the tag, and "tmp" or "old"."""
    for child in directory.iterdir():
        parts = re.fullmatch(r"\.(.+)\.(tmp|old)-[0-9a-f]+", child.name)
        if parts and child.is_dir():
            yield child, parts[1], parts[2]


def remove_stale(directory: Path) -> list[str]:
    """Remove temporary directories whose save has died; restore a tag that a crash left only as its `.old-` twin.

    Called by rank 0 at the beginning of a save, when no save of this process is under way. A directory of a process
    that may still live is left alone. Returns the names removed.
    """
    removed: list[str] = []
    for child, tag, kind in list(_leftovers(directory)):
        if kind == "old":
            if not (directory / tag).exists():
                os.rename(child, directory / tag)
                continue
        elif not _is_dead(child):
            continue
        shutil.rmtree(child, ignore_errors=True)
        removed.append(child.name)
    return removed


def _is_dead(temporary: Path) -> bool:
    try:
        host, pid, ticks = json.loads((temporary / _OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        if (temporary / MANIFEST_NAME).exists():  # not a save: the content that a committed save has displaced
            return True
        host, pid, ticks = "", 0, 0
    if host == socket.gethostname():
        return pid == os.getpid() or not is_alive(host, pid, ticks)
    try:
        return time.time() - temporary.stat().st_mtime > _FOREIGN_STALE_SECONDS
    except OSError:
        return False
