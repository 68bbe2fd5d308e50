"""Every Triton kernel, in every configuration it is launched with, compiles for GPUs that need not be here."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ds_kernels
from ds_kernels._dispatch import HAS_TRITON, interpreting

pytestmark = pytest.mark.aot

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that one program may use (NVIDIA's compute capability tables; AMD CDNA3 ISA)."""


def triton_modules() -> list[str]:
    """Every module named `triton` in the package."""
    found = pkgutil.walk_packages(ds_kernels.__path__, "ds_kernels.")
    return [module.name for module in found if module.name.endswith(".triton")]


def cases() -> Iterator[Any]:
    if not HAS_TRITON or interpreting():
        return
    for name in triton_modules():
        owner = name.removeprefix("ds_kernels.").removesuffix(".triton")
        for index, build in enumerate(importlib.import_module(name).builds()):
            yield pytest.param(build, id=f"{owner}-{index}-{build.kernel.fn.__name__}")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("build", list(cases()))
def test_build(build: Any, target: str, tmp_path: Path) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = build.kernel.arg_names
    signature = {name: build.signature.get(name, "constexpr") for name in arguments}
    assert set(build.signature) | set(build.constants) == set(arguments), "every argument has a type or a value"
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=dict(build.constants))
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    assert compiled.metadata.shared <= SHARED_MEMORY[target]
    assert spilled_bytes(compiled, target, tmp_path) == 0


def spilled_bytes(compiled: Any, target: str, folder: Path) -> int:
    """Registers spilled to local memory, as the assembler or the code object says."""
    if target == "gfx942":
        return int(re.search(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])[1])  # type: ignore[index]
    import triton.backends.nvidia as nvidia

    source = folder / "kernel.ptx"
    source.write_text(compiled.asm["ptx"], encoding="ascii")
    arch = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"])
    assert arch is not None
    # Of the two assemblers that triton ships the newer one takes every target's PTX version.
    assembler = Path(nvidia.__file__).parent / "bin" / "ptxas-blackwell"
    command = [assembler, "-v", f"--gpu-name={arch[1]}", source, "-o", folder / "kernel.cubin"]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", log))
