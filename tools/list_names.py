"""List every public name of a package at the end of its page, from the syntax trees alone.

A page of `PAGES` ends with the section "All names": the names of the package's `__all__`, each with the first sentence
of its docstring. The rest of the page is written by hand and explains; the section sees to it that nothing is missing.

Run: `python tools/list_names.py` rewrites the sections; `--check` only says which pages are behind (exit status 1).
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "ds_comm": "docs/ds-comm.md",
    "ds_kernels": "docs/ds-kernels.md",
    "ds_zero": "docs/ds-zero.md",
    "ds_pipe": "docs/ds-pipe.md",
    "ds_inference": "docs/ds-inference.md",
    "deepspeed": "docs/deepspeed.md",
}
HEADING = "## All names\n"
HOPS = 5
UNDOCUMENTED = {
    "ADAM_OPTIMIZER": "The name of Adam in the config",
    "BACKENDS": "The names of the backends",
    "DeepSpeedOptimizerCallable": "A function of the parameters that makes an optimizer",
    "DeepSpeedSchedulerCallable": "A function of the optimizer that makes a schedule",
    "dist": "`deepspeed.comm` once communication is initialised, None before",
    "HAS_TRITON": "Whether triton is installed",
    "LAMB_OPTIMIZER": "The name of Lamb in the config",
    "layer_norm": "Layer normalisation",
    "logger": "The logger of this package, a `logging.Logger`",
    "MUON_OPTIMIZER": "The name of Muon in the config",
    "Program": "Per stage, the actions it runs in order",
    "ReduceOp": "torch.distributed's reductions",
    "RequestState": "Where a request is: waiting, running, finished",
    "rms_norm": "Normalisation by the root of the mean square",
    "SCHEDULES": "Name -> schedule",
    "TORCH_DISTRIBUTED_DEFAULT_PORT": "29500",
}
"""What values are that cannot bear a docstring."""


@cache
def tree_of(module: str) -> ast.Module | None:
    """The syntax tree of a module of these packages; None for foreign ones."""
    dist = module.partition(".")[0].replace("_", "-")
    path = ROOT / "packages" / dist / "src" / module.replace(".", "/")
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8"))
    return None


def public_names(tree: ast.Module) -> list[str]:
    """The strings of `__all__`."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return [str(value) for value in ast.literal_eval(node.value)]  # type: ignore[attr-defined]
    return []


def imports(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Name -> (module, name there) of everything that the module imports by name."""
    return {
        alias.asname or alias.name: (node.module or "", alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def summary(module: str, name: str, hops: int = HOPS) -> str:
    """The first sentence about a name, wherever it is defined; empty where nothing is said."""
    tree = tree_of(f"{module}.{name}")
    if tree is not None and hops == HOPS - 1:
        return first_sentence(ast.get_docstring(tree))
    tree = tree_of(module)
    if tree is None or not hops:
        return ""
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return first_sentence(ast.get_docstring(node))
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            said = following.value if isinstance(following, ast.Expr) else None
            if isinstance(said, ast.Constant) and isinstance(said.value, str):
                return first_sentence(said.value)
            value = getattr(node, "value", None)
            return summary(module, value.id, hops - 1) if isinstance(value, ast.Name) else ""
    if name in imports(tree):
        return summary(*imports(tree)[name], hops - 1)
    return ""


def first_sentence(text: str | None) -> str:
    """Up to the first full stop, on one line."""
    line = " ".join((text or "").split("\n\n")[0].split())
    for stop in (". ", "; "):
        line = line.split(stop)[0]
    return line.rstrip(".").replace("|", "\\|")


def section(package: str) -> str:
    """The text of "All names" of a package."""
    tree = tree_of(package)
    assert tree is not None
    names = sorted((name for name in public_names(tree) if not name.startswith("__")), key=str.lower)
    rows = [f"| `{name}` | {summary(package, name) or UNDOCUMENTED.get(name, '')} |" for name in names]
    return "\n".join([HEADING, "| Name | What it is |", "|---|---|", *rows]) + "\n"


def main(arguments: list[str]) -> int:
    behind = []
    for package, page in PAGES.items():
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        wanted = text.split(HEADING)[0].rstrip("\n") + "\n\n" + section(package)
        if wanted != text:
            behind.append(page)
            if "--check" not in arguments:
                path.write_text(wanted, encoding="utf-8")
    for page in behind:
        sys.stdout.write(f"{page}: the section All names is behind; run python tools/list_names.py\n")
    return int(bool(behind) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
