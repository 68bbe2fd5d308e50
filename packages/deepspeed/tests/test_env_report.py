"""`ds_report`: complete, never failing, and with a remedy for what is missing."""

from __future__ import annotations

import pytest

from deepspeed import env_report
from deepspeed.cli import report_main
from deepspeed.env_report import OUR_PACKAGES, host_findings, kernel_findings, package_version, tool_findings


def test_report_names_everything(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert report_main([]) == 0
    text = capsys.readouterr().out
    for name in ("python", "torch", *OUR_PACKAGES, "numba", "triton", "accelerator", "CPU", "/dev/shm", "pdsh", "MPI"):
        assert name in text


def test_flags_leave_parts_out(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert report_main(["--hide_operator_status", "--hide_errors_and_warnings"]) == 0
    text = capsys.readouterr().out
    assert "numba" not in text
    assert "what to do" not in text


def test_versions():
    assert package_version("deepspeed").startswith("0.")
    assert package_version("pytest") == pytest.__version__
    assert package_version("no-such-package-here") == ""


def test_missing_things_have_a_remedy(monkeypatch):
    monkeypatch.setattr(env_report, "package_version", lambda name: "")
    assert "ds-comm[cpu]" in kernel_findings("cpu")[0].remedy
    assert kernel_findings("cpu")[1].remedy == ""  # no GPU: nothing to do
    assert "pip install triton" in kernel_findings("cuda")[1].remedy
    assert all(row.remedy for row in env_report.software_findings()[1:])
    nothing = {row.name: row for row in tool_findings(which=lambda name: None)}
    assert "apt install pdsh" in nothing["pdsh"].remedy
    with_slurm = {row.name: row for row in tool_findings(which=lambda name: "/bin/x" if name == "srun" else None)}
    assert with_slurm["pdsh"].remedy == ""


def test_small_shared_memory_is_reported(monkeypatch):
    usage = env_report.shutil._ntuple_diskusage(64 << 20, 0, 64 << 20)
    monkeypatch.setattr(env_report.shutil, "disk_usage", lambda path: usage)
    (row,) = [row for row in host_findings() if row.name == "/dev/shm"]
    if "missing" not in row.found:
        assert "--shm-size" in row.remedy


def test_a_broken_torch_is_a_finding_not_a_crash(monkeypatch, capsys):
    import torch

    def broken() -> bool:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.accelerator, "is_available", broken)
    kind, row = env_report.accelerator()
    assert kind == "unknown"
    assert "driver too old" in row.found
    assert report_main([]) == 0
