"""Version facts under upstream's names. Releases are built from a tag, so no commit is recorded in the wheel."""

from deepspeed.__about__ import __version__

version = __version__
git_hash = "unknown"
git_branch = "unknown"
# Upstream: which C++ extensions were built in, and which could be. There are none.
installed_ops: dict[str, bool] = {}
compatible_ops: dict[str, bool] = {}
# Upstream: what those were built against.
torch_info: dict[str, str | bool] = {
    "version": "0.0",
    "bf16_support": False,
    "cuda_version": "0.0",
    "nccl_version": "0.0",
    "hip_version": "0.0",
}
