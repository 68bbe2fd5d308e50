"""The package is there, says its version, and importing it starts nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

import pytest

import ds_inference
from ds_inference import errors


def test_version_is_the_distributions() -> None:
    try:
        installed = version("ds-inference")
    except PackageNotFoundError:
        pytest.skip("ds-inference is used from its source folder, not installed")
    assert ds_inference.__version__ == installed


def test_every_export_is_there() -> None:
    for name in ds_inference.__all__:
        assert getattr(ds_inference, name) is not None
    assert set(ds_inference.__all__) <= set(dir(ds_inference))
    with pytest.raises(AttributeError, match="no attribute 'Schedular'"):
        ds_inference.Schedular


def test_every_error_is_a_builtin_too() -> None:
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), (ValueError, RuntimeError, OSError))


def test_type_information_is_shipped() -> None:
    assert (files(ds_inference) / "py.typed").is_file()


def test_import_starts_nothing() -> None:
    """No heavy module is pulled in, nothing is written: names are imported when they are used."""
    code = "import sys, ds_inference; print(sorted({'torch', 'triton', 'numba', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
