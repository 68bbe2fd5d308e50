"""Whether a script parses `--local_rank`, found in its text: one that does not must not be given it.

Read are the script and the modules beside it that it imports, and theirs; nothing is run. A parser takes the option
where the text names it, where a function that a command line is made of has it as an argument, or where the parser is
one of those whose options come from a training library. What cannot be read counts as parsing it, as upstream has it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

__all__ = ["parses_local_rank"]

_OPTION = re.compile(r"--local[_-]rank|\bHfArgumentParser\b|\bTrlParser\b|def \w+\([^)]*\blocal_rank\b")
_MOST_FILES = 200


def parses_local_rank(script: str, *, module: bool = False) -> bool:
    """Whether the file `script` (with `module`: the module of that name) takes `--local_rank`."""
    first = _module_file(script) if module else Path(script)
    if first is None:
        return True
    root = first.parent
    if module:
        for _ in range(script.count(".") + (first.name in ("__init__.py", "__main__.py"))):
            root = root.parent
    seen, waiting = {first}, [first]
    while waiting and len(seen) <= _MOST_FILES:
        path = waiting.pop()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return True
        if _OPTION.search(text):
            return True
        found = [file for file in _imported(text, path.parent, root) if file not in seen]
        seen.update(found)
        waiting.extend(found)
    return False


def _module_file(name: str) -> Path | None:
    """The file that `python -m name` runs, without importing what it lies in."""
    places: list[str] | None = ["", *sys.path]
    origin = None
    for part in name.split("."):
        spec = PathFinder.find_spec(part, places)
        if spec is None:
            return None
        origin = spec.origin
        places = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    if places:
        main = Path(places[0]) / "__main__.py"
        return main if main.is_file() else None
    return Path(origin) if origin and origin.endswith(".py") else None


def _imported(text: str, folder: Path, root: Path) -> Iterator[Path]:
    """Files under `root` or beside the importing one that a module's text imports."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(root, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = root
            if node.level:
                base = folder
                for _ in range(node.level - 1):
                    base = base.parent
            start = f"{node.module}." if node.module else ""
            names = [(base, start + alias.name) for alias in node.names]
            names += [(base, node.module)] if node.module else []
        else:
            continue
        for base, name in names:
            place = base.joinpath(*name.split("."))
            for file in (place.with_suffix(".py"), place / "__init__.py"):
                if file.is_file():
                    yield file.resolve() if file.is_symlink() else file
