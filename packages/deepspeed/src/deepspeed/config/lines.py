"""Where each key stands in a config file: dotted path as written -> line number, counted from 1.

The text has been parsed (`jsonc.parse`) when it comes here, so it is known to be a good object; this walk only counts.
Keys of blocks inside lists are found under "path[0].key", as in the error texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from deepspeed.config.jsonc import without_comments

__all__ = ["key_lines"]

_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|[{}\[\]:,]|[^\s{}\[\]:,"]+')


def key_lines(text: str) -> dict[str, int]:
    """Line of every key of the object that `text` holds; of a key that stands twice, the last."""
    stripped = without_comments(text)
    found: dict[str, int] = {}
    stack: list[str] = []  # the path of each open block or list
    indices: list[int] = []  # per open block -1, per open list the index of the present item
    key = ""
    tokens = list(_tokens(stripped))
    for (token, line), (following, _) in zip(tokens, [*tokens[1:], ("", 0)], strict=True):
        if token in "{[":
            parent = stack[-1] if stack else ""
            here = f"{parent}[{indices[-1]}]" if indices and indices[-1] >= 0 else _joined(parent, key)
            stack.append(here if stack else "")
            indices.append(-1 if token == "{" else 0)
        elif token in "}]":
            stack.pop()
            indices.pop()
        elif token == "," and indices[-1] >= 0:
            indices[-1] += 1
        elif following == ":" and token[0] == '"':
            key = token[1:-1]
            found[_joined(stack[-1], key)] = line
    return found


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    line, seen = 1, 0
    for match in _TOKEN.finditer(text):
        line += text.count("\n", seen, match.start())
        seen = match.start()
        yield match.group(), line


def _joined(parent: str, key: str) -> str:
    return f"{parent}.{key}" if parent else key
