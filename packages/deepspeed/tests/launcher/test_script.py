"""Which scripts are given --local_rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepspeed.launcher.script import parses_local_rank
from deepspeed.launcher.spec import Program

PARSER = 'import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument("--local_rank", type=int)\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PARSER, True),
        (PARSER.replace("_rank", "-rank"), True),
        ("from transformers import HfArgumentParser\n", True),
        ("import fire\ndef main(steps=3,\n         local_rank=-1):\n    ...\nfire.Fire(main)\n", True),
        ("import os\nlocal_rank = int(os.environ['LOCAL_RANK'])\n", False),
        ("import sys\nsteps = int(sys.argv[1])\n", False),
        ("this is no python, it says\n", False),
    ],
)
def test_what_the_script_says(tmp_path: Path, text: str, expected: bool) -> None:
    script = tmp_path / "train.py"
    script.write_text(text)
    assert parses_local_rank(str(script)) is expected
    assert ("--local_rank=1" in Program(str(script), ("3",)).command(1)) is expected
    assert "--local_rank=1" not in Program(str(script), ("3",), no_local_rank=True).command(1)


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("from options import parse", "options.py"),
        ("import lib.options", "lib/options.py"),
        ("from lib import options", "lib/options.py"),
        ("from lib.options import parse", "lib/options/__init__.py"),
    ],
)
def test_modules_beside_it_are_read(tmp_path: Path, line: str, module: str) -> None:
    (tmp_path / "train.py").write_text(line + "\n")
    (tmp_path / module).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / module).write_text("import train\n")
    assert not parses_local_rank(str(tmp_path / "train.py"))
    (tmp_path / module).write_text(PARSER)
    assert parses_local_rank(str(tmp_path / "train.py"))


def test_relative_imports_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "trainer_of_this_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("from .options import parse\n")
    (package / "options.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert not parses_local_rank("trainer_of_this_test", module=True)
    (package / "options.py").write_text(PARSER)
    assert parses_local_rank("trainer_of_this_test", module=True)


def test_what_cannot_be_read_is_given_it(tmp_path: Path) -> None:
    assert parses_local_rank(str(tmp_path / "missing.py")) and parses_local_rank("no_such_module_here", module=True)
    (tmp_path / "program").write_bytes(b"\x7fELF\xff\xfe")
    assert parses_local_rank(str(tmp_path / "program"))
