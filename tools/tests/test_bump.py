"""A bump writes two files, or says why not and writes none."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.version import Version

import bump

Write = Callable[[str, str], Path]
ABOUT = "packages/ds-comm/src/ds_comm/__about__.py"
LOG = "packages/ds-comm/CHANGELOG.md"


@pytest.fixture(autouse=True)
def repository(write: Write) -> None:
    write("packages/ds-comm/pyproject.toml", '[project]\nname = "ds-comm"\ndependencies = ["torch>=2.6"]\n')
    write(ABOUT, '"""Doc."""\n\n__version__ = "0.1.2"\n')
    write(LOG, "# Changelog\n\n## Unreleased\n\n### Added\n\n- A thing.\n\n## 0.1.2 - 2026-01-01\n\n- Old.\n")
    write("packages/ds-zero/pyproject.toml", '[project]\nname = "ds-zero"\ndependencies = ["ds-comm[cpu]>=0.1,<0.2"]\n')
    write("packages/ds-zero/src/ds_zero/__about__.py", '__version__ = "0.1.0"\n')
    write("packages/ds-zero/CHANGELOG.md", "# Changelog\n\n## Unreleased\n\n- First.\n")


@pytest.mark.parametrize(
    ("level", "expected"),
    [("major", "1.0.0"), ("minor", "0.2.0"), ("patch", "0.1.3"), ("0.1.10", "0.1.10"), ("0.2.0rc1", "0.2.0rc1")],
)
def test_next_version(level: str, expected: str) -> None:
    assert bump.next_version(Version("0.1.2"), level) == Version(expected)


@pytest.mark.parametrize("level", ["0.1.2", "0.1.1", "micro"])
def test_a_wrong_level_is_refused(level: str) -> None:
    with pytest.raises(ValueError, match=re.escape(level)):
        bump.next_version(Version("0.1.2"), level)


def test_bump_writes_version_and_heading(tmp_path: Path) -> None:
    assert bump.main(["ds-comm", "patch"], tmp_path) == 0
    assert (tmp_path / ABOUT).read_text() == '"""Doc."""\n\n__version__ = "0.1.3"\n'
    log = (tmp_path / LOG).read_text()
    pattern = (
        r"# Changelog\n\n## Unreleased\n\n## 0\.1\.3 - \d{4}-\d\d-\d\d\n\n### Added\n\n- A thing\.\n\n## 0\.1\.2 .*"
    )
    assert re.fullmatch(pattern, log, re.DOTALL)
    assert list(bump.check(bump.packages(tmp_path))) == []


def test_a_sibling_left_behind_stops_the_bump(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tmp_path / LOG).read_text()
    assert bump.main(["ds-comm", "minor"], tmp_path) == 1
    assert "ds-zero asks for ds-comm[cpu]<0.2,>=0.1, which ds-comm 0.2.0 is not" in capsys.readouterr().err
    assert ((tmp_path / LOG).read_text(), '"0.1.2"' in (tmp_path / ABOUT).read_text()) == (before, True)
    assert bump.main(["ds-comm", "minor", "--force"], tmp_path) == 0
    assert bump.main(["--check"], tmp_path) == 1


def test_nothing_to_release_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bump.main(["ds-comm", "patch"], tmp_path) == 0
    assert bump.main(["ds-comm", "patch"], tmp_path) == 1
    assert "Unreleased is empty" in capsys.readouterr().err
    assert '"0.1.3"' in (tmp_path / ABOUT).read_text()


def test_check_finds_a_version_without_a_section(write: Write, tmp_path: Path) -> None:
    assert list(bump.check(bump.packages(tmp_path))) == []
    write(LOG, "# Changelog\n\n## 0.1.1 - 2026-01-01\n\n- Old.\n")
    (found,) = bump.check(bump.packages(tmp_path))
    assert "ds-comm: version 0.1.2 has no section" in found


def test_an_unknown_package_lists_the_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bump.main(["ds-com", "patch"], tmp_path)
    assert "ds-comm, ds-zero" in capsys.readouterr().err
