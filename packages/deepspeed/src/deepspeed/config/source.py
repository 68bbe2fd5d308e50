"""Where a config comes from: a dict, a path, base64 or JSON text, or `args.deepspeed_config`. Reads it and remembers
its origin.

Nothing is interpreted here: the result is the user's own dict (by reference, it becomes `engine.config`) or what the
file holds.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.config import jsonc
from deepspeed.errors import ConfigConflictError, DeepSpeedConfigError

__all__ = ["ConfigSource", "LoadedConfig", "choose_config", "load_config"]

ConfigSource = Mapping[str, Any] | str | os.PathLike[str]
"""What `initialize(config=...)` takes: the config itself, the path of a JSON file, or the config as (base64 of) JSON
text.
"""


@dataclass(frozen=True)
class LoadedConfig:
    """A config as the user wrote it."""

    raw: Mapping[str, Any]
    """The user's dict, not a copy, or the parsed file."""
    origin: str
    """For messages: "config dict", "file ds.json", ..."""


def choose_config(
    config: ConfigSource | None, args: Any = None, config_params: ConfigSource | None = None
) -> tuple[ConfigSource, str]:
    """The one config among `config`, its alias `config_params` and `args.deepspeed_config`, and the argument it came
    by.

    `args` may be any object; `args.deepscale_config` is the deprecated name. Raises ConfigConflictError when there
    is none, or more than one.
    """
    given: dict[str, ConfigSource] = {}
    if config is not None:
        given["config"] = config
    if config_params is not None and config_params is not config:
        given["config_params"] = config_params
    for name in ("deepspeed_config", "deepscale_config"):
        value = getattr(args, name, None)
        if value is not None:
            given[f"args.{name}"] = value
    if not given:
        raise ConfigConflictError(
            "no DeepSpeed config: pass config= (a dict, or the path of a JSON file) to initialize, or "
            "--deepspeed_config on the command line"
        )
    if len(given) > 1:
        raise ConfigConflictError(
            f"more than one DeepSpeed config was given: {' and '.join(given)}; pass only one of them"
        )
    name, value = next(iter(given.items()))
    return value, name


def load_config(config: ConfigSource, name: str = "config") -> LoadedConfig:
    """Read `config`; `name` is the argument it came by. A str is JSON text if it starts with "{", else a path, else
    url-safe base64 of JSON.

    Raises DeepSpeedConfigError, naming the path, for a missing, unreadable or empty file, text that is not a JSON
    object, and repeated keys.
    """
    if isinstance(config, Mapping):
        return LoadedConfig(config, f"{name} dict")
    if not isinstance(config, (str, os.PathLike)):
        raise DeepSpeedConfigError(
            f"{name} must be a dict, a path or a JSON string, not {type(config).__name__}: {config!r}"
        )
    text = os.fspath(config)
    if isinstance(config, str) and text.lstrip().startswith("{"):
        return LoadedConfig(jsonc.parse(text, f"{name} text"), f"{name} text")
    path = Path(text).expanduser()
    if _exists(path):
        return LoadedConfig(jsonc.parse(_read(path), f"file {path}"), f"file {path}")
    decoded = _base64_json(text) if isinstance(config, str) else None
    if decoded is not None:
        return LoadedConfig(jsonc.parse(decoded, f"{name} (base64)"), f"{name} (base64)")
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    raise DeepSpeedConfigError(
        f"{name}: there is no file {shown!r} (in {Path.cwd()}), and it is not base64 of a JSON object either; "
        "check the path"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a long base64 text is no legal file name
        return False


def _read(path: Path) -> str:
    if path.is_dir():
        raise DeepSpeedConfigError(f"the config path {path} is a folder; expected a JSON file in it")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DeepSpeedConfigError(
            f"file {path} is not JSON: it is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    except OSError as error:
        raise DeepSpeedConfigError(f"file {path} cannot be read: {error.strerror or error}") from error


def _base64_json(text: str) -> str | None:
    """The JSON object that `text` encodes, or None when it is not base64 of one."""
    compact = "".join(text.split()).replace("+", "-").replace("/", "_").rstrip("=")
    try:
        decoded = base64.b64decode(compact + "=" * (-len(compact) % 4), altchars=b"-_", validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.lstrip().startswith(("{", "//", "#", "/*")) else None
