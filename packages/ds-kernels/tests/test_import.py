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


def test_every_export_is_there() -> None:
    for name in ds_kernels.__all__:
        assert getattr(ds_kernels, name) is not None
    assert set(ds_kernels.__all__) <= set(dir(ds_kernels))
    with pytest.raises(AttributeError, match="no attribute 'rms_nrom'"):
        ds_kernels.rms_nrom


def test_type_information_is_shipped() -> None:
    assert (files(ds_kernels) / "py.typed").is_file()


def test_import_starts_nothing() -> None:
    """No heavy module is pulled in, nothing is written: names are imported when they are used."""
    code = "import sys, ds_kernels; print(sorted({'torch', 'triton', 'numba'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
