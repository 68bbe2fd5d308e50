"""Upstream's path of the optimizer of ZeRO stage 3. One class serves all stages here."""

from deepspeed._lazy import explain_absent
from deepspeed.runtime.zero.memory_estimators import (
    estimate_zero3_model_states_mem_needs,
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
)
from ds_zero import ZeroOptimizer as DeepSpeedZeroOptimizer_Stage3

__all__ = [
    "DeepSpeedZeroOptimizer_Stage3",
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
]

explain_absent(__name__)
