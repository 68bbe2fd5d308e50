"""Run every fenced block of the documentation, so that what it shows is what happens.

    python tools/run_docs.py [PAGE.md ...]        # default: README.md, packages/*/README.md, docs/**/*.md

Each page runs on its own, in a fresh process and an empty temporary directory, its blocks from top to bottom:

- ```` ```python ```` is executed; the Python blocks of a page share one namespace;
- ```` ```bash ```` is run by `bash -euo pipefail` in the same directory, with this interpreter's scripts first on PATH;
- ```` ```python file=train.py ```` (any language) is written to that file for later blocks instead of being executed;
- `<!-- no-run: reason -->` on the line above a block skips it; the reason is printed;
- other languages (text, json, toml, ...) are only shown. A fence without a language is an error: say `text`.

A failure names the page and the line in it. The closing line counts pages: "docs: N passed, N failed".
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGES = ("README.md", "packages/*/README.md", "docs/**/*.md")
RUN = {"python", "bash"}
PAGE_SECONDS = 300
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>.*)$")
NO_RUN = re.compile(r"^\s*<!--\s*no-run:\s*(?P<reason>\S.*?)\s*-->\s*$")
FILE = re.compile(r"\bfile=(?P<name>[\w./-]+)")


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is the line of its opening fence, counted from 1."""

    line: int
    language: str
    text: str
    file: str = ""
    no_run: str = ""


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page in order; ValueError for one without language or end."""
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        fence = FENCE.match(lines[at])
        at += 1
        if fence is None:
            continue
        start = at
        language = fence["info"].strip().partition(" ")[0]
        if not language:
            raise ValueError(f"line {start}: a fence without a language; write ```text for what is only shown")
        end = re.compile(rf"^ *{fence['ticks']}`*\s*$")
        while at < len(lines) and not end.match(lines[at]):
            at += 1
        if at == len(lines):
            raise ValueError(f"line {start}: this fence is never closed")
        body = textwrap.dedent("\n".join(lines[start:at])) + "\n"
        file = FILE.search(fence["info"])
        marked = NO_RUN.match(lines[start - 2]) if start > 1 else None
        yield Block(start, language, body, file["name"] if file else "", marked["reason"] if marked else "")
        at += 1


def run_page(page: Path) -> None:
    """Run the blocks of `page` in the current directory; the first failure raises."""
    namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.no_run:
            if block.language in RUN:
                print(f"  line {block.line}: {block.language} not run: {block.no_run}", flush=True)
        elif block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            # Blank lines in front give the code the page's own line numbers, in tracebacks too.
            exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
        elif block.language == "bash":
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], check=False)
            if done.returncode:
                raise RuntimeError(f"{page}:{block.line}: bash ended with status {done.returncode}:\n{block.text}")


def run_apart(page: Path, seconds: float) -> str:
    """Run one page in a process group and directory of its own; "" or what went wrong."""
    scripts = os.path.dirname(sys.executable)
    env = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryDirectory(prefix="docs-") as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--here", str(page)]
        child = subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            status = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"not done after {seconds:g} s"
        finally:
            # Nothing that a page started outlives it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        return f"status {status}" if status else ""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="markdown files (default: all of the documentation)")
    parser.add_argument("--here", action="store_true", help="run one page in this process and directory")
    parser.add_argument("--timeout", type=float, default=PAGE_SECONDS, help="seconds per page (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.here:
        sys.path[0] = os.getcwd()  # a page imports the files it wrote, not the tools
        try:
            run_page(args.pages[0])
        except Exception:
            traceback.print_exc()
            return 1
        return 0
    root = Path(__file__).resolve().parents[1]
    pages = args.pages or sorted({path for pattern in PAGES for path in root.glob(pattern)})
    failures: list[str] = []
    for page in pages:
        print(f"{page.resolve().relative_to(root) if page.resolve().is_relative_to(root) else page}", flush=True)
        problem = run_apart(page.resolve(), args.timeout)
        if problem:
            failures.append(f"FAILED {page}: {problem}")
    for failure in failures:
        print(failure)
    print(f"docs: {len(pages) - len(failures)} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
