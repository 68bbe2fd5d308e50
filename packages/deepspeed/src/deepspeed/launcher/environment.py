"""Which environment variables travel to other hosts: an allow list, the `.deepspeed_env` files and a deny list.

On one host the ranks simply inherit the launcher's environment. To other hosts go, in rising order of precedence:
variables whose name starts with an allowed prefix; KEY=VALUE lines of `.deepspeed_env` in the home directory, then in
the working directory (another file name by the variable DS_ENV_FILE). What says who a rank is (RANK, LOCAL_RANK, ...)
is never forwarded: the launcher sets it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

DEEPSPEED_ENVIRONMENT_NAME = os.environ.get("DS_ENV_FILE", ".deepspeed_env")

FORWARDED_PREFIXES = (
    *("ACCELERATE_", "CCL_", "COMET_", "CUDA_", "DEEPSPEED_", "DS_", "FI_", "GLOO_", "HCCL_", "HF_", "HSA_"),
    *("HUGGINGFACE_", "KMP_", "MKL_", "MLFLOW", "MV2", "NCCL", "NVIDIA_", "OMP_", "PYTHON", "PYTORCH_", "RCCL_"),
    *("TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TRITON_", "UCX", "WANDB_", "XLA_"),
)
"""A variable whose name starts with one of these is exported to every host."""

NEVER_FORWARDED = frozenset(
    (
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"),
        *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "PYTHONSTARTUP"),
    )
)
"""Set per rank by the launcher, or meaningful on this host only."""

_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")


def read_environment_file(path: Path) -> dict[str, str]:
    """The KEY=VALUE lines of `path`; blank lines and `#` comments are skipped, one pair of quotes around a value is
    removed.

    Raises ValueError, naming file and line, for a line that is not of that form.
    """
    values: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        key, equals, value = text.partition("=")
        if not equals or not _NAME.match(key.strip()):
            raise ValueError(f"{path}, line {number}: {text!r} is not of the form KEY=VALUE")
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        values[key.strip()] = value
    return values


def environment_files(name: str | None = None) -> list[Path]:
    """The `.deepspeed_env` files that exist, in the order in which they are applied (later ones win)."""
    file_name = name or os.environ.get("DS_ENV_FILE", DEEPSPEED_ENVIRONMENT_NAME)
    candidates = [Path.home() / file_name, Path.cwd() / file_name]
    return [path for path in dict.fromkeys(candidates) if path.is_file()]


def collect_exports(environ: Mapping[str, str], files: list[Path], cwd: str) -> dict[str, str]:
    """What other hosts get: allowed variables of `environ`, overridden by `files`; PYTHONPATH starts with `cwd`.
    Sorted by name.
    """
    exports = {name: value for name, value in environ.items() if name.startswith(FORWARDED_PREFIXES)}
    for path in files:
        exports.update(read_environment_file(path))
    exports["PYTHONPATH"] = os.pathsep.join(part for part in (cwd, exports.get("PYTHONPATH", "")) if part)
    return {
        name: exports[name]
        for name in sorted(exports)
        if name not in NEVER_FORWARDED and not name.startswith("TORCHELASTIC_") and "\n" not in exports[name]
    }
