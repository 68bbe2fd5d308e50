"""Check who may import whom, from the syntax tree alone: nothing is imported or run.

Three rules, over every module of `packages/*/src` (imports inside functions and under TYPE_CHECKING count as well):

1. A package imports only the siblings that `ALLOWED` names.
2. No import circle of any size, within a package or between packages. What a module-level `__getattr__` loads
   (PEP 562) counts as imported: strings in such a module that name a module, absolutely ("deepspeed.engine",
   "deepspeed.engine:DeepSpeedEngine") or as a child of it ("engine"), are edges of the graph.
3. No `_private` name or module of one package is used by another; examples, benchmarks and docs are outsiders as well.

Run: `python tools/check_layers.py [ROOT]`. Each finding is a line `path:line: what is wrong`; exit status 1 if any.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ALLOWED: dict[str, frozenset[str]] = {
    "ds_comm": frozenset(),
    "ds_kernels": frozenset(),
    "ds_zero": frozenset({"ds_comm"}),
    "ds_pipe": frozenset({"ds_comm"}),
    "ds_inference": frozenset({"ds_comm", "ds_kernels"}),
    "deepspeed": frozenset({"ds_comm", "ds_kernels", "ds_zero", "ds_pipe", "ds_inference"}),
}
OUTSIDERS = ("examples", "benchmarks")


@dataclass
class Module:
    """One source file: its dotted name and what it imports, as (line, dotted target) pairs."""

    name: str
    path: Path
    is_package: bool
    tree: ast.Module
    imports: list[tuple[int, str]] = field(default_factory=list)

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    def binds(self, name: str) -> bool:
        """Whether `name` is defined or assigned at module level."""
        functions = {node.name for node in self.tree.body if isinstance(node, ast.FunctionDef)}
        targets = [target for node in self.tree.body if isinstance(node, ast.Assign) for target in node.targets]
        names = {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
        return name in functions | names


def sources(root: Path) -> Iterator[tuple[Path, Path]]:
    """Each source file with the folder its dotted name starts at."""
    for base in sorted(root.glob("packages/*/src")):
        yield from ((base, path) for path in sorted(base.rglob("*.py")))
    for outsider in OUTSIDERS:
        yield from ((root, path) for path in sorted((root / outsider).rglob("*.py")))


def load(root: Path) -> dict[str, Module]:
    """Every module of the packages and of the outsiders, by dotted name, with its imports resolved."""
    modules: dict[str, Module] = {}
    for base, path in sources(root):
        parts = path.relative_to(base).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules[name] = Module(name, path, is_package, ast.parse(path.read_text(encoding="utf-8"), str(path)))
    for module in modules.values():
        module.imports = sorted(set(imported(module, modules)))
    return modules


def imported(module: Module, known: dict[str, Module]) -> Iterator[tuple[int, str]]:
    """Each import of `module`, absolute; `from a import b` is `a.b`, a name of `a` or a module below it."""
    parent = module.name if module.is_package else module.name.rpartition(".")[0]
    lazy = module.binds("__getattr__")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = parent.split(".")[: len(parent.split(".")) - node.level + 1]
                source = ".".join([*above, *([source] if source else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            literals = (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))
            yield from ((node.lineno, name) for name in literals if isinstance(name, str))
        elif lazy and isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value.replace(":", ".")
            child = f"{parent}.{text.removeprefix('.')}"
            if (module_of(child, known) or "").startswith(f"{parent}."):
                yield node.lineno, child
            elif re.fullmatch(r"\w+(\.\w+)+", text) and module_of(text, known):
                yield node.lineno, text


def module_of(target: str, known: dict[str, Module]) -> str | None:
    """The module that an import target names or lies in; None for what is not ours."""
    while target and target not in known:
        target = target.rpartition(".")[0]
    return target or None


def check_table(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        allowed = ALLOWED.get(module.package)
        if allowed is None and module.package not in OUTSIDERS:
            yield f"{module.path}:1: package {module.package} has no row in ALLOWED (tools/check_layers.py)"
        for line, target in module.imports:
            head = target.partition(".")[0]
            if allowed is not None and head in ALLOWED and head != module.package and head not in allowed:
                may = ", ".join(sorted(allowed)) or "no sibling"
                yield f"{module.path}:{line}: {module.package} imports {target}, but may import {may}"


def check_private(modules: dict[str, Module]) -> Iterator[str]:
    """Private parts in import targets, and `sibling._name` where `sibling` is bound to a module of another package."""
    for module in modules.values():
        foreign = {
            target for _, target in module.imports if target.partition(".")[0] in ALLOWED.keys() - {module.package}
        }
        uses = [(line, target) for line, target in module.imports if target in foreign]
        bound: dict[str, str] = {}
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    head = alias.name.partition(".")[0]
                    bound[alias.asname or head] = alias.name if alias.asname else head
            elif isinstance(node, ast.ImportFrom) and not node.level:
                bound.update((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                head, _, rest = ast.unparse(node).partition(".")
                full = bound.get(head, "")
                if full in modules and full.partition(".")[0] in ALLOWED.keys() - {module.package}:
                    uses.append((node.lineno, f"{full}.{rest}"))
        for line, target in sorted(set(uses)):
            if any(part.startswith("_") and not part.endswith("__") for part in target.split(".")):
                yield f"{module.path}:{line}: {target} is private to another package"


def check_circles(modules: dict[str, Module]) -> Iterator[str]:
    """One line per strongly connected set of modules (Tarjan 1972)."""
    graph: dict[str, dict[str, int]] = {name: {} for name in modules}
    for module in modules.values():
        for line, target in module.imports:
            found = module_of(target, modules)
            if found is not None and found != module.name:
                graph[module.name].setdefault(found, line)
    for group in circles(graph):
        first = modules[group[0]]
        inside = next(line for to, line in graph[first.name].items() if to in group)
        yield f"{first.path}:{inside}: import circle of {len(group)}: {', '.join(group)}"


def circles(graph: dict[str, dict[str, int]]) -> list[list[str]]:
    """Strongly connected components with more than one member, each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for to in graph[node]:
            if to not in index:
                visit(to)
                low[node] = min(low[node], low[to])
            elif to in stack:
                low[node] = min(low[node], index[to])
        if low[node] == index[node]:
            at = stack.index(node)
            group = sorted(stack[at:])
            del stack[at:]
            if len(group) > 1:
                found.append(group)

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found)


def main(argv: list[str]) -> int:
    root = Path(argv[0]) if argv else Path(__file__).resolve().parents[1]
    modules = load(root)
    findings = [*check_table(modules), *check_private(modules), *check_circles(modules)]
    for finding in findings:
        print(finding.replace(f"{root}/", "", 1))
    print(f"layers: {len(modules)} modules, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
