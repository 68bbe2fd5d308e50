"""What travels to other hosts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deepspeed.launcher.environment import collect_exports, environment_files, read_environment_file


def test_allow_and_deny_lists():
    environ = {
        "WANDB_API_KEY": "w",
        "HF_HOME": "h",
        "NCCL_DEBUG": "INFO",
        "TORCH_SHOW_CPP_STACKTRACES": "1",
        "OMP_NUM_THREADS": "4",
        "DS_ACCELERATOR": "cpu",
        "MLFLOW_URI": "m",
        "UCX_TLS": "tcp",
        "PYTHONHASHSEED": "0",
        "SECRET": "no",
        "PATH": "no",
        "RANK": "3",
        "CUDA_VISIBLE_DEVICES": "0",
        "TORCHELASTIC_RUN_ID": "no",
    }
    exports = collect_exports(environ, [], "/job")
    denied = {"SECRET", "PATH", "RANK", "CUDA_VISIBLE_DEVICES", "TORCHELASTIC_RUN_ID"}
    assert set(exports) == set(environ) - denied | {"PYTHONPATH"}
    assert exports["PYTHONPATH"] == "/job"
    assert list(exports) == sorted(exports)


def test_files_override_and_the_working_directory_comes_last(tmp_path: Path, monkeypatch):
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    home.mkdir()
    cwd.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    monkeypatch.chdir(cwd)
    assert environment_files() == []
    (home / ".deepspeed_env").write_text("# comment\n\nA=home\nB=home\nRANK=7\n")
    (cwd / ".deepspeed_env").write_text("B=x=y z\nC=\"quoted; text\"\nNCCL_DEBUG='WARN'\nPYTHONPATH=lib\n")
    exports = collect_exports({"NCCL_DEBUG": "INFO", "PYTHONPATH": "old"}, environment_files(), "/job")
    assert exports == {
        "A": "home",
        "B": "x=y z",
        "C": "quoted; text",
        "NCCL_DEBUG": "WARN",
        "PYTHONPATH": os.pathsep.join(["/job", "lib"]),
    }


def test_other_file_name(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DS_ENV_FILE", "cluster.env")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster.env").write_text("A=1\n")
    assert environment_files() == [tmp_path / "cluster.env"]


@pytest.mark.parametrize("line", ["NOVALUE", "=x", "1A=x", "a b=c"])
def test_bad_line_is_named(tmp_path: Path, line):
    path = tmp_path / "env"
    path.write_text(f"OK=1\n{line}\n")
    with pytest.raises(ValueError, match="line 2"):
        read_environment_file(path)
