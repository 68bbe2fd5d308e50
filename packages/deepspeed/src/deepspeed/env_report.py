"""`ds_report`: what is installed, what this host offers, what is missing and what to do about it.

A *finding* is one row: a name, what was found, and, where something should change, a remedy that can be typed.
Nothing here fails: what cannot be found out is itself a finding, and the exit code is 0.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deepspeed.launcher.devices import usable_cores

if TYPE_CHECKING:
    from rich.table import Table

OUR_PACKAGES = ("deepspeed", "ds-comm", "ds-zero", "ds-kernels", "ds-pipe", "ds-inference")
SHM_WANTED_NBYTES = 1 << 30
MEMORY_UNIT = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One row of the report."""

    name: str
    found: str
    remedy: str = ""
    """What to do; empty where all is well."""


def package_version(distribution: str) -> str:
    """The version of an installed distribution; of one that is only importable `VERSION (importable, not installed)`;
    '' where there is none.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        spec = importlib.util.find_spec(distribution.replace("-", "_"))
    except (ImportError, ValueError):
        return ""
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        about = Path(folder) / "__about__.py"
        match = re.search(r'__version__ = "([^"]+)"', about.read_text()) if about.is_file() else None
        if match:
            return f"{match.group(1)} (importable, not installed)"
    return ""


def software_findings() -> list[Finding]:
    """Python, torch and the packages of this project."""
    rows = [
        Finding(
            "python",
            f"{platform.python_version()} ({sys.executable})",
            "" if sys.version_info >= (3, 10) else "use Python 3.10 or newer",
        )
    ]
    torch_version = package_version("torch")
    rows.append(Finding("torch", torch_version or "missing", "" if torch_version else "pip install torch"))
    for name in OUR_PACKAGES:
        version = package_version(name)
        remedy = "" if version and "not installed" not in version else f"pip install {name}"
        rows.append(Finding(name, version or "missing", remedy))
    return rows


def kernel_findings(kind: str) -> list[Finding]:
    """What makes the fast paths available on a host whose device type is `kind`."""
    numba, triton = package_version("numba"), package_version("triton")
    on_gpu = kind not in ("cpu", "unknown")
    return [
        Finding(
            "CPU kernels (numba)",
            numba or "missing: torch does the same, slower",
            "" if numba else "pip install 'ds-comm[cpu]'",
        ),
        Finding(
            "GPU kernels (triton)",
            triton or ("missing" if on_gpu else "not needed on a CPU host"),
            "pip install triton" if on_gpu and not triton else "",
        ),
    ]


def accelerator() -> tuple[str, Finding]:
    """The device type ("cpu", "cuda", ..., "unknown" without torch) and the row about it."""
    wanted = os.environ.get("DS_ACCELERATOR", "")
    suffix = f" (DS_ACCELERATOR={wanted})" if wanted else ""
    try:
        import torch

        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if device is None or wanted == "cpu":
            remedy = ""
            if wanted not in ("", "cpu"):
                remedy = f"torch finds no {wanted} device: install torch and a driver for it, or unset DS_ACCELERATOR"
            elif any(Path("/dev").glob("nvidia[0-9]*")) and torch.version.cuda is None:
                remedy = (
                    "an NVIDIA device is here but this torch is built without CUDA: install the CUDA build of torch"
                )
            capability = torch.backends.cpu.get_cpu_capability()
            return "cpu", Finding("accelerator", f"none; CPU with {capability}{suffix}", remedy)
        names = (
            [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
            if device.type == "cuda"
            else []
        )
        count = torch.accelerator.device_count()
        return device.type, Finding(
            "accelerator", f"{count} x {device.type}{': ' + ', '.join(sorted(set(names))) if names else ''}{suffix}"
        )
    except Exception as error:  # a broken installation of torch or a driver is exactly what this report is for
        return "unknown", Finding(
            "accelerator",
            f"torch cannot tell: {type(error).__name__}: {error}",
            "reinstall torch: pip install --force-reinstall torch",
        )


def host_findings() -> list[Finding]:
    """Cores, memory and shared memory of this host."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    memory = psutil.virtual_memory()
    rows = [
        Finding("CPU", f"{usable_cores()} usable hardware threads of {os.cpu_count()}"),
        Finding("memory", f"{memory.available / MEMORY_UNIT:.1f} of {memory.total / MEMORY_UNIT:.1f} GiB free"),
    ]
    shared = Path("/dev/shm")
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        enough = usage.free >= SHM_WANTED_NBYTES
        remedy = (
            ""
            if enough
            else "enlarge it (docker: --shm-size=8g): else ranks of one host exchange data through slower gloo"
        )
        rows.append(
            Finding("/dev/shm", f"{usage.free / MEMORY_UNIT:.1f} of {usage.total / MEMORY_UNIT:.1f} GiB free", remedy)
        )
    else:
        rows.append(
            Finding(
                "/dev/shm",
                "missing: CPU ranks exchange data through gloo",
                "run on Linux with a tmpfs on /dev/shm for the fast path",
            )
        )
    return rows


def tool_findings(which: Callable[[str], str | None] = shutil.which) -> list[Finding]:
    """What launches over many hosts need; on one host none of it is needed."""
    ssh, pdsh, mpi, slurm = which("ssh"), which("pdsh"), which("mpirun"), which("srun")
    only = "(only for many hosts)"
    no_starter = not (pdsh or mpi or slurm)
    return [
        Finding("ssh", ssh or f"missing {only}", "" if ssh else "apt install openssh-client"),
        Finding(
            "pdsh",
            pdsh or f"missing {only}",
            "apt install pdsh, or use --launcher openmpi/mpich/slurm, or --no_ssh on each host" if no_starter else "",
        ),
        Finding("MPI (mpirun)", mpi or f"missing {only}"),
        Finding("Slurm (srun)", slurm or f"missing {only}"),
    ]


def make_table(title: str, findings: Sequence[Finding], show_remedies: bool) -> Table:
    """The findings as a table of two columns, three with remedies."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", expand=False)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    if show_remedies:
        table.add_column("what to do", overflow="fold", style="yellow")
    for row in findings:
        cells = [row.name, row.found] + ([row.remedy or "-"] if show_remedies else [])
        table.add_row(*cells)
    return table


def cli_main() -> int:
    """Upstream's name of the command."""
    return main()


def main(args: Sequence[str] | None = None) -> int:
    """Prints the report and returns 0."""
    parser = argparse.ArgumentParser(
        prog="ds_report", description="What is installed, what is missing, and what to do about it."
    )
    parser.add_argument("--hide_operator_status", action="store_true", help="leave out the table of kernels")
    parser.add_argument("--hide_errors_and_warnings", action="store_true", help="leave out what to do")
    options = parser.parse_args(args)

    from rich.console import Console
    from rich.markup import escape

    kind, device = accelerator()
    sections = [
        ("software", software_findings()),
        ("this host", [device, *host_findings()]),
        ("many hosts", tool_findings()),
    ]
    if not options.hide_operator_status:
        sections.insert(1, ("kernels", kernel_findings(kind)))
    show = not options.hide_errors_and_warnings
    console = Console()
    for title, findings in sections:
        rows = [Finding(row.name, escape(row.found), escape(row.remedy)) for row in findings]
        console.print(make_table(title, rows, show and any(row.remedy for row in rows)))
    if show:
        needed = [row for title, findings in sections if title != "many hosts" for row in findings]
        open_points = sum(bool(row.remedy) for row in needed)
        console.print("all is well" if not open_points else f"{open_points} thing(s) to do, see above", style="bold")
    return 0
