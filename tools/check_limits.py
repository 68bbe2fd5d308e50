"""Check the size limits of the house, from the syntax tree alone.

The tails are what makes code hard to live in (one huge class, one huge function), so the limits are on the largest, not
on the average: a file has at most 600 lines, a function 80, a class 25 methods and 20 attributes, an example 100 lines,
and a package 6 exception classes, each of them also a builtin exception.

Methods are the functions written in a class body (overload signatures are not). Attributes are the names assigned on
`self` in its methods plus the fields of a dataclass. Fields of pydantic models are configuration keys and not counted.
Exceptions to the limits stand in `EXCEPTIONS`, one reason each. Tests have no limit on their size,
and the parts of a larger example, in a folder below examples/, that of any file.

Run: `python tools/check_limits.py [ROOT]`. Each finding is a line `path:line: what is wrong`; exit status 1 if any.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FILE_LINES = 600
EXAMPLE_LINES = 100
FUNCTION_LINES = 80
CLASS_METHODS = 25
CLASS_ATTRIBUTES = 20
PACKAGE_ERRORS = 6

SOURCES = ("packages/*/src/**/*.py", "tools/*.py", "examples/**/*.py", "benchmarks/**/*.py", "noxfile.py")
# (path below the root, class or "" for the file, what is counted) -> the limit there
EXCEPTIONS: dict[tuple[str, str, str], int] = {
    # The engine's surface is what existing scripts and clients call; its getters come from a table, the rest is here.
    ("packages/deepspeed/src/deepspeed/engine.py", "DeepSpeedEngine", "methods"): 45,
    ("packages/deepspeed/src/deepspeed/engine.py", "DeepSpeedEngine", "attributes"): 36,  # scripts read them
    # The main job: one file, read in one go, that shows the whole way.
    ("examples/finetune_smollm2.py", "", "lines"): FILE_LINES,
}

Function = ast.FunctionDef | ast.AsyncFunctionDef
BUILTIN_ERRORS = {
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)
}


@dataclass(frozen=True)
class Source:
    """One file: its path below the root (with forward slashes), number of lines and syntax tree."""

    path: str
    num_lines: int
    tree: ast.Module


def load(root: Path) -> list[Source]:
    paths = sorted({path for pattern in SOURCES for path in root.glob(pattern)})
    texts = [(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")) for path in paths]
    return [Source(path, text.count("\n"), ast.parse(text, path)) for path, text in texts]


def over(source: Source, owner: str, what: str, count: int, limit: int) -> str | None:
    """The finding's text when `count` is above the limit (or above the exception's own), else None."""
    limit = EXCEPTIONS.get((source.path, owner, what), limit)
    return f"{owner or 'the file'} has {count} {what}, the limit is {limit}" if count > limit else None


def check_file(source: Source) -> Iterator[str]:
    limit = EXAMPLE_LINES if Path(source.path).parent == Path("examples") else FILE_LINES
    if text := over(source, "", "lines", source.num_lines, limit):
        yield f"{source.path}:1: {text}"
    for node in ast.walk(source.tree):
        if isinstance(node, Function):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if text := over(source, node.name, "lines", num_lines, FUNCTION_LINES):
                yield f"{source.path}:{node.lineno}: {text}"
        elif isinstance(node, ast.ClassDef):
            for what, count, limit in (
                ("methods", len(methods(node)), CLASS_METHODS),
                ("attributes", len(attributes(node)), CLASS_ATTRIBUTES),
            ):
                if text := over(source, node.name, what, count, limit):
                    yield f"{source.path}:{node.lineno}: {text}"


def methods(node: ast.ClassDef) -> list[Function]:
    return [item for item in node.body if isinstance(item, Function) and not decorated(item, "overload")]


def decorated(node: Function | ast.ClassDef, name: str) -> bool:
    return any(ast.unparse(item).partition("(")[0].rpartition(".")[2] == name for item in node.decorator_list)


def attributes(node: ast.ClassDef) -> set[str]:
    """Names assigned on the first argument of the class's methods, and a dataclass's fields."""
    names: set[str] = set()
    if decorated(node, "dataclass"):
        fields = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
        names |= {target.id for target in fields if isinstance(target, ast.Name)}
    for method in methods(node):
        if not method.args.args or decorated(method, "classmethod") or decorated(method, "staticmethod"):
            continue
        me = method.args.args[0].arg
        for item in ast.walk(method):
            if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store) and ast.unparse(item.value) == me:
                names.add(item.attr)
    return names


def check_errors(sources: list[Source]) -> Iterator[str]:
    """At most six exception classes per package; each descends from a builtin one that says more than Exception.

    A root that others of the package derive from may be a plain Exception: nobody raises it.
    """
    for package in sorted({source.path.split("/")[1] for source in sources if source.path.startswith("packages/")}):
        bases: dict[str, tuple[str, set[str]]] = {}
        for source in sources:
            if not source.path.startswith(f"packages/{package}/"):
                continue
            for node in ast.walk(source.tree):
                if isinstance(node, ast.ClassDef):
                    names = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                    bases[node.name] = (f"{source.path}:{node.lineno}", names)
        errors = {name: where for name, (where, _) in bases.items() if ancestors(name, bases) & BUILTIN_ERRORS}
        if len(errors) > PACKAGE_ERRORS:
            where, listed = next(iter(errors.values())), ", ".join(errors)
            yield f"{where}: {package} has {len(errors)} exception classes ({listed}), the limit is {PACKAGE_ERRORS}"
        roots = set().union(*(names for _, names in bases.values()))
        for name, where in errors.items():
            if name not in roots and not ancestors(name, bases) & (BUILTIN_ERRORS - {"Exception", "BaseException"}):
                yield f"{where}: {name} is no builtin error: derive it from ValueError, RuntimeError or such as well"


def ancestors(name: str, bases: dict[str, tuple[str, set[str]]]) -> set[str]:
    found: set[str] = set()
    todo = [name]
    while todo:
        for base in bases.get(todo.pop(), ("", set()))[1] - found:
            found.add(base)
            todo.append(base)
    return found


def main(argv: list[str]) -> int:
    root = Path(argv[0]) if argv else Path(__file__).resolve().parents[1]
    sources = load(root)
    findings = [finding for source in sources for finding in check_file(source)]
    findings += check_errors(sources)
    for finding in findings:
        print(finding)
    print(f"limits: {len(sources)} files, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
