"""What is written in several places says the same in all of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import bump
import check_layers

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))


def import_name(package: Path) -> str:
    return package.name.replace("-", "_")


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_each_package_is_whole(package: Path) -> None:
    source = package / "src" / import_name(package)
    for path in (package / "README.md", package / "CHANGELOG.md", source / "__init__.py", source / "py.typed"):
        assert path.is_file(), path
    assert (package / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert list(package.glob("tests/**/test_*.py"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_siblings_are_declared_by_range_and_within_the_layers(package: Path) -> None:
    asked = bump.packages(ROOT)[package.name].requirements()
    assert {one.name.replace("-", "_") for one in asked} <= check_layers.ALLOWED[import_name(package)]
    for requirement in asked:
        assert {one.operator for one in requirement.specifier} == {">=", "<"}, requirement


def test_the_noxfile_installs_what_is_declared() -> None:
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    named = [node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SIBLINGS"]
    siblings = ast.literal_eval(named[0].value)
    declared = {
        name: {one.name for one in package.requirements() if one.name != name}
        for name, package in bump.packages(ROOT).items()
    }
    assert {name: set(of) for name, of in siblings.items()} == declared


def test_pre_commit_and_nox_use_the_same_tools() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {Requirement(line) for line in lines if line and not line.startswith("#")}
    hooks = re.findall(r'additional_dependencies: \["(ruff==[^"]+)"\]', (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks
    assert {Requirement(hook) for hook in hooks} <= pins
