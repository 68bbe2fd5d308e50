"""The CPU as an accelerator."""

from __future__ import annotations

from deepspeed.accelerator.abstract_accelerator import DeepSpeedAccelerator


class CPU_Accelerator(DeepSpeedAccelerator):
    """Host memory and cores. Ranks on one host share them, so a device index means nothing here."""

    def __init__(self) -> None:
        # Launchers of CPU ranks use CUDA's variable to give a process no or some GPUs, as upstream does.
        super().__init__("cpu", "gloo", "CUDA_VISIBLE_DEVICES")
