"""CUDA (and ROCm, which torch serves under the same name) as an accelerator."""

from __future__ import annotations

from deepspeed.accelerator.abstract_accelerator import DeepSpeedAccelerator


class CUDA_Accelerator(DeepSpeedAccelerator):
    """NVIDIA or AMD GPUs, with NCCL (RCCL)."""

    def __init__(self) -> None:
        super().__init__("cuda", "nccl", "CUDA_VISIBLE_DEVICES")
