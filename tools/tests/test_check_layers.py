"""Each rule finds what it is there for, and leaves lawful code alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import check_layers

COMM = "packages/ds-comm/src/ds_comm/"
ZERO = "packages/ds-zero/src/ds_zero/"
DEEP = "packages/deepspeed/src/deepspeed/"
Write = Callable[[str, str], Path]


def findings(tmp_path: Path) -> list[str]:
    modules = check_layers.load(tmp_path)
    found = [
        *check_layers.check_table(modules),
        *check_layers.check_private(modules),
        *check_layers.check_circles(modules),
    ]
    return [text.replace(f"{tmp_path}/", "") for text in found]


@pytest.fixture(autouse=True)
def packages(write: Write) -> None:
    for folder in (COMM, ZERO, DEEP):
        write(f"{folder}__init__.py", "")


def test_lawful_imports_pass(write: Write, tmp_path: Path) -> None:
    write(f"{COMM}_world.py", "import torch\nfrom ds_comm.errors import CommError\n")
    write(f"{COMM}errors.py", "class CommError(RuntimeError): ...\n")
    write(f"{COMM}__init__.py", "from ds_comm._world import x as x\nfrom ds_comm import errors as errors\n")
    write(
        f"{ZERO}shard.py", "import ds_comm\nfrom ds_comm import errors\nprint(ds_comm.__version__, errors.CommError)\n"
    )
    assert findings(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [
        "import ds_zero\n",
        "from ds_zero import shard\n",
        "def f():\n    import ds_zero.layout\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ds_zero\n",
        "from importlib import import_module\nimport_module('ds_zero.layout')\n",
    ],
)
def test_an_import_against_the_layers_is_found(write: Write, tmp_path: Path, text: str) -> None:
    write(f"{COMM}bad.py", text)
    (found,) = findings(tmp_path)
    assert found.startswith(f"{COMM}bad.py:")
    assert "ds_comm imports ds_zero" in found


def test_nothing_imports_the_top(write: Write, tmp_path: Path) -> None:
    write(f"{ZERO}bad.py", "import deepspeed\n")
    assert findings(tmp_path) == [f"{ZERO}bad.py:1: ds_zero imports deepspeed, but may import ds_comm"]


def test_a_package_without_a_row_is_found(write: Write, tmp_path: Path) -> None:
    write("packages/new/src/new/__init__.py", "")
    (found,) = findings(tmp_path)
    assert "package new has no row" in found


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("from ds_comm import _world\n", "ds_comm._world"),
        ("from ds_comm._world import state\n", "ds_comm._world.state"),
        ("import ds_comm._world\n", "ds_comm._world"),
        ("import ds_comm\nds_comm._world.state\n", "ds_comm._world"),
        ("import ds_comm as comm\ncomm._world\n", "ds_comm._world"),
        ("from ds_comm import ledger\nledger._records\n", "ds_comm.ledger._records"),
    ],
)
def test_a_private_name_across_packages_is_found(write: Write, tmp_path: Path, text: str, target: str) -> None:
    write(f"{COMM}_world.py", "state = 1\n")
    write(f"{COMM}ledger.py", "_records = []\n")
    for user in (f"{ZERO}bad.py", "examples/bad.py"):
        path = write(user, text)
        found = findings(tmp_path)
        assert any(f"{target} is private to another package" in line for line in found)
        assert all(line.startswith(user) for line in found)
        path.unlink()


def test_a_packages_own_private_names_are_its_own(write: Write, tmp_path: Path) -> None:
    write(f"{COMM}_world.py", "_state = 1\n")
    write(f"{COMM}use.py", "from ds_comm import _world\nimport ds_comm\n_world._state\nds_comm._world\n")
    assert findings(tmp_path) == []


@pytest.mark.parametrize(
    "last",
    ["from ds_comm import a\n", "from ds_comm.a import x\n", "def f():\n    from . import a\n", "from .a import x\n"],
)
def test_a_circle_is_found(write: Write, tmp_path: Path, last: str) -> None:
    write(f"{COMM}a.py", "import ds_comm.b\nx = 1\n")
    write(f"{COMM}b.py", "from ds_comm.c import y\n")
    write(f"{COMM}c.py", last)
    assert findings(tmp_path) == [
        f"{COMM}a.py:1: import circle of 3: ds_comm.a, ds_comm.b, ds_comm.c",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "_LAZY = {'run': 'deepspeed.engine'}\ndef __getattr__(name):\n    ...\n",
        "__getattr__, __dir__ = attach(__name__, {'run': 'deepspeed.engine:run'})\n",
        "__getattr__, __dir__ = attach(__name__, {}, ['engine'])\n",
        "__getattr__ = attach(__name__, ['.engine'])\n",
        "'''Docs. deepspeed.errors of engine.'''\ndef __getattr__(name):\n    return load('engine')\n",
    ],
)
def test_a_lazy_name_table_is_a_set_of_imports(write: Write, tmp_path: Path, text: str) -> None:
    write(f"{DEEP}__init__.py", text)
    write(f"{DEEP}engine.py", "from deepspeed import run\n")
    (found,) = findings(tmp_path)
    assert "import circle of 2: deepspeed, deepspeed.engine" in found


def test_a_lazy_table_below_that_names_its_parent_is_a_circle(write: Write, tmp_path: Path) -> None:
    write(f"{DEEP}__init__.py", "from deepspeed.comm import x\n")
    write(f"{DEEP}comm/__init__.py", "__getattr__ = attach({'x': 'deepspeed:initialize'})\n")
    (found,) = findings(tmp_path)
    assert "import circle of 2: deepspeed, deepspeed.comm" in found


def test_strings_of_a_module_without_getattr_are_no_imports(write: Write, tmp_path: Path) -> None:
    write(f"{DEEP}__init__.py", "NAMES = ['deepspeed.engine', 'engine']\n")
    write(f"{DEEP}engine.py", "from deepspeed import run\n")
    assert findings(tmp_path) == []


def test_the_command_counts_and_fails(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_layers.main([str(tmp_path)]) == 0
    write(f"{COMM}bad.py", "import ds_zero\n")
    assert check_layers.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "layers: 3 modules, 0 findings",
        f"{COMM}bad.py:1: ds_comm imports ds_zero, but may import no sibling",
        "layers: 4 modules, 1 findings",
    ]
