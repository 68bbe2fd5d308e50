"""JSON with comments and trailing commas, strict about everything else.

Accepted beyond JSON: `// ...`, `# ...` and `/* ... */` comments, and a comma before `}` or `]` (what people use of
hjson, which upstream parses with). Refused: a key given twice in one object, at any depth, named by its full path.
Offsets are kept while stripping, so that line and column in an error are those of the file. Small enough to need no
dependency: the hjson package has had no release since 2022.
"""

from __future__ import annotations

import json
import re
from typing import Any

from deepspeed.errors import DeepSpeedConfigError

__all__ = ["parse", "without_comments"]

_STRING = r'"(?:\\.|[^"\\\n])*"'
_COMMENT = re.compile(rf"({_STRING})|//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)
_TRAILING_COMMA = re.compile(rf"({_STRING})|,(?=\s*[}}\]])")


class _Object(dict[str, Any]):
    """An object as read, remembering the keys it was given twice."""

    repeated: tuple[str, ...] = ()


def _blank(match: re.Match[str]) -> str:
    return match.group(1) or re.sub(r"[^\n]", " ", match.group(0))


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    made = _Object(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        made.repeated = tuple(key for key in made if keys.count(key) > 1)
    return made


def _repeated(value: Any, path: str) -> list[str]:
    """Full paths of repeated keys in `value`, outermost first."""
    if isinstance(value, _Object):
        found = [f"{path}{key}" for key in value.repeated]
        return found + [name for key, item in value.items() for name in _repeated(item, f"{path}{key}.")]
    if isinstance(value, list):
        return [name for index, item in enumerate(value) for name in _repeated(item, f"{path.rstrip('.')}[{index}].")]
    return []


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def without_comments(text: str) -> str:
    """`text` with comments and trailing commas blanked out; every other character keeps its line and column."""
    return _TRAILING_COMMA.sub(_blank, _COMMENT.sub(_blank, text))


def parse(text: str, origin: str) -> dict[str, Any]:
    """The object that `text` holds. `origin` ("file ds.json") opens every error.

    Raises DeepSpeedConfigError for empty text, text that is not JSON (with line, column and the line itself), a
    value that is not an object, and repeated keys.
    """
    stripped = without_comments(text)
    if not stripped.strip():
        raise DeepSpeedConfigError(f'{origin} is empty; expected a JSON object such as {{"train_batch_size": 8}}')
    try:
        value = json.loads(stripped, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if error.lineno <= len(text.splitlines()) else ""
        raise DeepSpeedConfigError(
            f"{origin} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}\n"
            f"    {line}\n    {' ' * (error.colno - 1)}^\n"
            "Keys and strings need double quotes; comments and trailing commas are fine."
        ) from None
    except RecursionError:
        raise DeepSpeedConfigError(f"{origin} is nested too deeply to be a DeepSpeed config") from None
    if not isinstance(value, dict):
        raise DeepSpeedConfigError(
            f"{origin} holds a JSON {type(value).__name__}; expected an object {{...}} with DeepSpeed's keys"
        )
    repeated = _repeated(value, "")
    if repeated:
        raise DeepSpeedConfigError(f"Duplicate keys in DeepSpeed config: {repeated} ({origin}); keep one of each")
    plain: dict[str, Any] = _plain(value)
    return plain
