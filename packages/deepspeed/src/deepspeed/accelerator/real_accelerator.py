"""Which accelerator this process uses.

Owns the one process-wide choice: `set_accelerator` if called, else the environment variable DS_ACCELERATOR, else what
torch finds (`ds_comm.device`). The choice is made at the first question, not at import, and initialises no device.
"""

from __future__ import annotations

import os

import ds_comm.device
from deepspeed.accelerator.abstract_accelerator import DeepSpeedAccelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

SUPPORTED_ACCELERATOR_LIST = ["cuda", "cpu"]
_BACKENDS = {"xpu": "xccl", "npu": "hccl", "mlu": "cncl", "mps": "gloo"}

_chosen: DeepSpeedAccelerator | None = None


def get_accelerator() -> DeepSpeedAccelerator:
    """The accelerator of this process; ValueError for a DS_ACCELERATOR that names none."""
    global _chosen
    if _chosen is None:
        _chosen = _make(os.environ.get("DS_ACCELERATOR") or ds_comm.device.device_type())
    return _chosen


def set_accelerator(accel_obj: DeepSpeedAccelerator) -> None:
    """Use another accelerator from now on; TypeError for what is none."""
    global _chosen
    if not isinstance(accel_obj, DeepSpeedAccelerator):
        raise TypeError(f"accel_obj is a {type(accel_obj).__name__}; expected a DeepSpeedAccelerator")
    _chosen = accel_obj


def is_current_accelerator_supported() -> bool:
    """Whether the accelerator of this process is one this package is tested on."""
    return get_accelerator().device_name() in SUPPORTED_ACCELERATOR_LIST


def _make(name: str) -> DeepSpeedAccelerator:
    if name == "cpu":
        return CPU_Accelerator()
    if name == "cuda":
        return CUDA_Accelerator()
    if name in _BACKENDS:
        return DeepSpeedAccelerator(name, _BACKENDS[name], f"{name.upper()}_VISIBLE_DEVICES")
    known = ", ".join([*SUPPORTED_ACCELERATOR_LIST, *_BACKENDS])
    raise ValueError(f"DS_ACCELERATOR is {name!r}; expected one of {known}")
