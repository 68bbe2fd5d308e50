"""Upstream's path of the optimizer of ZeRO stages 1 and 2. One class serves all stages here."""

from deepspeed._lazy import explain_absent
from deepspeed.runtime.zero.memory_estimators import (
    estimate_zero0_model_states_mem_needs_all_cold,
    estimate_zero0_model_states_mem_needs_all_live,
    estimate_zero1_model_states_mem_needs_all_cold,
    estimate_zero1_model_states_mem_needs_all_live,
    estimate_zero2_model_states_mem_needs,
    estimate_zero2_model_states_mem_needs_all_cold,
    estimate_zero2_model_states_mem_needs_all_live,
)
from ds_zero import ZeroOptimizer as DeepSpeedZeroOptimizer

__all__ = [
    "DeepSpeedZeroOptimizer",
    "estimate_zero0_model_states_mem_needs_all_cold",
    "estimate_zero0_model_states_mem_needs_all_live",
    "estimate_zero1_model_states_mem_needs_all_cold",
    "estimate_zero1_model_states_mem_needs_all_live",
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
]

explain_absent(__name__)
