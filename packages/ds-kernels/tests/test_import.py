"""The package is there, says its version, and importing it starts nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

import pytest

import ds_kernels


def test_version_is_the_distributions() -> None:
    try:
        installed = version("ds-kernels")
    except PackageNotFoundError:
        pytest.skip("ds-kernels is used from its source folder, not installed")
    assert ds_kernels.__version__ == installed


def test_exports_are_exactly_what_is_public() -> None:
    public = {name for name in vars(ds_kernels) if not name.startswith("_") and name != "annotations"}
    assert public | {"__version__"} == set(ds_kernels.__all__)


def test_type_information_is_shipped() -> None:
    assert (files(ds_kernels) / "py.typed").is_file()


def test_import_starts_nothing() -> None:
    """No other heavy module is pulled in, nothing is written: an empty package costs nothing to import."""
    code = "import sys, ds_kernels; print(sorted({'torch', 'triton', 'numba'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
