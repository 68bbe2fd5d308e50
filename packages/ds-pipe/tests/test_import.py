"""The package is there, says its version, and importing it starts nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

import pytest

import ds_pipe


def test_version_is_the_distributions() -> None:
    try:
        installed = version("ds-pipe")
    except PackageNotFoundError:
        pytest.skip("ds-pipe is used from its source folder, not installed")
    assert ds_pipe.__version__ == installed


def test_exports_are_exactly_what_is_public() -> None:
    public = {name for name in vars(ds_pipe) if not name.startswith("_") and name != "annotations"}
    assert public | {"__version__"} == set(ds_pipe.__all__)


def test_type_information_is_shipped() -> None:
    assert (files(ds_pipe) / "py.typed").is_file()


def test_import_starts_nothing() -> None:
    """No other heavy module is pulled in, nothing is written: an empty package costs nothing to import."""
    code = "import sys, ds_pipe; print(sorted({'torch', 'triton', 'numba'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
