"""Turns what pydantic found into one error that reads well: each key by full path, its value, what was expected, the
nearest known key.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from deepspeed.config.base import Section
from deepspeed.config.keys import close_key, inner_section, known_keys, section_at
from deepspeed.errors import DeepSpeedConfigError

__all__ = ["config_error", "unknown_key"]


def config_error(error: ValidationError, root: type[Section], origin: str) -> DeepSpeedConfigError:
    """The DeepSpeedConfigError for all problems of a failed validation of `root`."""
    texts: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        path = _path(root, item["loc"])
        if item["type"] == "extra_forbidden":
            parent = tuple(path.split("."))[:-1]
            text = unknown_key(path, item["input"], section_at(root, parent) or root, root)
        else:
            text = _describe(path, item)
        texts.setdefault(path, []).append(text)
    lines = ["; or ".join([found[0], *(text.split(": ", 1)[1] for text in found[1:])]) for found in texts.values()]
    if len(lines) == 1:
        return DeepSpeedConfigError(f"{lines[0]} ({origin})")
    return DeepSpeedConfigError(
        f"{len(lines)} problems in the DeepSpeed config ({origin}):\n  - " + "\n  - ".join(lines)
    )


def unknown_key(path: str, value: Any, section: type[Section], root: type[Section]) -> str:
    """The text for a key that `section` does not have: the nearest key it has, or where a key of that name belongs."""
    parent, _, name = path.rpartition(".")
    near = close_key(name, section, parent)
    if near is not None:
        hint = f"did you mean {near}?"
    else:
        homes = [key.path for key in known_keys(root) if key.path.rpartition(".")[2] == name]
        some = ", ".join([*list(section.model_fields)[:8], *(["..."] if len(section.model_fields) > 8 else [])])
        hint = f"did you mean {homes[0]}?" if homes else f"{parent or 'the top level'} has {some}"
    return f"{path}: unknown key; {hint} (value {_short(value)})"


def _describe(path: str, item: Any) -> str:
    if item["type"] == "missing":
        return f"{path}: missing; this key is required in its section"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "expected a block {...} of keys"
    if isinstance(item["input"], dict):  # the check compared several keys of one section and names them itself
        return f"{path}: {message}"
    return f"{path}: got {_short(item['input'])}; {message[:1].lower()}{message[1:]}"


def _path(root: type[Section], loc: tuple[int | str, ...]) -> str:
    """Dotted path of a pydantic location, without the names that pydantic gives to the branches of a union."""
    names: list[str] = []
    current: type[Section] | None = root
    for part in loc:
        if isinstance(part, int):
            names[-1] += f"[{part}]"
        elif current is not None:
            names.append(part)
            field = current.model_fields.get(part)
            current = inner_section(field.annotation) if field is not None else None
    return ".".join(names) or "config"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
