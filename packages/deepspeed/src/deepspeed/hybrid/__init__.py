"""The hybrid engine: one model that trains with ZeRO and generates with ds-inference's decoder between steps.

`engine` is upstream's interface over a training engine, `rollout` what happens between two of its steps: gathering,
reading the model as a decoder, generating, and letting go of all of it.
"""

from __future__ import annotations

from deepspeed.hybrid.engine import DeepSpeedHybridEngine

__all__ = ["DeepSpeedHybridEngine"]
