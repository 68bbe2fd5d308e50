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


def test_every_export_is_there() -> None:
    for name in ds_pipe.__all__:
        assert getattr(ds_pipe, name) is not None
    assert set(ds_pipe.__all__) <= set(dir(ds_pipe))
    assert len(set(ds_pipe.__all__)) == len(ds_pipe.__all__)
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        ds_pipe.simulat


def test_type_information_is_shipped() -> None:
    assert (files(ds_pipe) / "py.typed").is_file()


def test_planning_needs_no_torch() -> None:
    """Neither the import nor a whole plan pulls in a heavy module, and nothing is written."""
    code = (
        "import sys, ds_pipe; ds_pipe.validate(ds_pipe.zb_v(2, 4)); ds_pipe.balanced([1, 2], 2); "
        "ds_pipe.TrainSchedule(2, 2, 0); ds_pipe.ProcessTopology(['pipe'], [2]); "
        "print(sorted({'torch', 'triton', 'numba', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
