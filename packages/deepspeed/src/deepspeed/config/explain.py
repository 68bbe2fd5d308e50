"""`deepspeed config explain FILE`: the resolved config, each value with where it came from.

A value comes from one of
    file         a line of the file, under the key's own name or another one (an alias, a deprecated key)
    auto         the file says "auto", so the default, or what is derived, holds
    derived      it follows from other values, by the rule that is given
    default      nobody said anything
    environment  the number of ranks, from WORLD_SIZE as a launcher sets it
    argument     the number of ranks, from the command line

Nothing is started and no device is asked: the device is an argument as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from deepspeed.config.lines import key_lines
from deepspeed.config.normalize import Normalized, normalize
from deepspeed.config.resolve import resolve
from deepspeed.config.resolved import ResolvedConfig
from deepspeed.config.support import support_of
from deepspeed.errors import DeepSpeedConfigError

__all__ = ["Explanation", "Origin", "Row", "explain_file", "world_from"]

Origin = Literal["file", "auto", "derived", "default", "environment", "argument"]


@dataclass(frozen=True)
class Row:
    """One key of the resolved config."""

    key: str
    value: Any
    origin: Origin
    source: str
    """The origin in words: "line 4: zero_optimization.stage", "derived: the model dtype", ..."""
    line: int | None = None
    """Line of the file that says it, None where no line does."""
    note: str = ""
    """What is to be known: another name was used, or the key has no effect and why."""


@dataclass(frozen=True)
class Explanation:
    """All keys of a config file, resolved for a number of data-parallel ranks."""

    path: str
    config: ResolvedConfig
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    """Deprecated spellings, one text each."""

    def chosen(self) -> tuple[Row, ...]:
        """The rows that are more than a default."""
        return tuple(row for row in self.rows if row.origin != "default")

    def text(self, *, defaults: bool = False) -> str:
        """One line per key, `key = value  <- source`; with `defaults` also those that nobody chose."""
        rows = self.rows if defaults else self.chosen()
        cells = [(row.key, _shown(row.value), f"{row.source}{f'  ({row.note})' if row.note else ''}") for row in rows]
        wide = max(len(key) for key, _, _ in cells)
        deep = min(max(len(value) for _, value, _ in cells), 40)
        lines = [f"{self.path}, {self.config.dp_world_size} data-parallel ranks, {self.config.model_dtype} model"]
        lines += [f"  {key:<{wide}} = {value:<{deep}}  <- {source}" for key, value, source in cells]
        if not defaults:
            lines.append(f"  ({len(self.rows) - len(rows)} more keys have their defaults; --all shows them)")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def as_json(self) -> str:
        """The same for programs: {"file", "data_parallel_ranks", "keys": [row, ...], "notes"}."""
        document = {
            "file": self.path,
            "data_parallel_ranks": self.config.dp_world_size,
            "keys": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }
        return json.dumps(document, indent=2, default=str)


def world_from(given: int | None, environment: Mapping[str, str] = os.environ) -> tuple[int, Origin, str]:
    """The number of ranks and where it came from: the argument, else WORLD_SIZE, else 1.

    Raises DeepSpeedConfigError for a WORLD_SIZE that is no number.
    """
    if given is not None:
        return given, "argument", "--world"
    text = environment.get("WORLD_SIZE")
    if text is None:
        return 1, "default", "default (neither --world nor WORLD_SIZE)"
    if not text.isdecimal():
        raise DeepSpeedConfigError(f"WORLD_SIZE is {text!r} in the environment; expected a number, or give --world")
    return int(text), "environment", f"environment: WORLD_SIZE={text}"


def explain_file(
    path: str | os.PathLike[str],
    *,
    world: int | None = None,
    device_type: str = "cpu",
    environment: Mapping[str, str] = os.environ,
) -> Explanation:
    """Resolve the config file at `path` and say of every key where its value came from.

    Args:
        world: data-parallel ranks; None takes WORLD_SIZE of `environment`, else 1.
        device_type: where the model would live ("cpu", "cuda"); some placements exist on one kind of host only.
    Raises:
        DeepSpeedConfigError: as `resolve` does; the text names key and file.
    """
    ranks, how, source = world_from(world, environment)
    config = resolve(Path(path), dp_world_size=ranks, device_type=device_type)
    normalized = normalize(config.raw)
    lines = key_lines(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    rows = [Row("(data-parallel ranks)", ranks, how, source)]
    rows += [_row(key, value, config, normalized, lines) for key, value in config.values()]
    return Explanation(os.fspath(path), config, tuple(rows), tuple(normalized.notes))


def _row(key: str, value: Any, config: ResolvedConfig, normalized: Normalized, lines: Mapping[str, int]) -> Row:
    source = config.sources.get(key, "default")
    written = source.removeprefix(f"{config.origin}: ")
    support = support_of(key)
    if written != source:
        line = _line(written, lines)
        notes = [f"another name of {key}"] if written != key else []
        notes += [f"no effect: {support.note}"] if support.status == "no-op" else []
        return Row(key, value, "file", f"line {line}: {written}", line, "; ".join(notes))
    if key in normalized.auto:
        line = _line(normalized.auto[key], lines)
        rule = source if source.startswith("derived") else "default"
        return Row(key, value, "auto", f'line {line} says "auto"; {rule}', line)
    return Row(key, value, "derived" if source.startswith("derived") else "default", source)


def _line(written: str, lines: Mapping[str, int]) -> int | None:
    """The line of a key, or of the nearest block around it."""
    names = written.split(".")
    return next((lines[".".join(names[:n])] for n in range(len(names), 0, -1) if ".".join(names[:n]) in lines), None)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str) if isinstance(value, (str, bool, dict, type(None))) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
