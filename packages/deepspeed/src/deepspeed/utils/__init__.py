"""Upstream's collection of helpers; each name is imported from the module that has it on first use."""

import sys

from deepspeed._lazy import FunctionsOverModules, attach

_LOGGING = (
    "get_caller_func",
    "log_dist",
    "log_dist_once",
    "logger",
    "print_json_dist",
    "set_log_level_from_string",
    "warning_once",
)
_GROUPS = (
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_model_parallel_group",
    "get_model_parallel_rank",
    "get_model_parallel_world_size",
    "get_tensor_model_parallel_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_src_rank",
    "get_tensor_model_parallel_world_size",
)
_TENSORS = (
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized",
)
_LEAVES = (
    "get_z3_leaf_modules",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unset_z3_leaf_modules",
    "z3_leaf_module",
    "z3_leaf_parameter",
)

__getattr__, __dir__ = attach(
    __name__,
    {
        **{name: f"deepspeed.utils.logging:{name}" for name in _LOGGING},
        **{name: f"deepspeed.utils.groups:{name}" for name in _GROUPS},
        **{name: f"deepspeed.utils.tensor_fragment:{name}" for name in _TENSORS},
        **{name: f"deepspeed.utils.z3_leaf_module:{name}" for name in _LEAVES},
        "OnDevice": "deepspeed.utils.init_on_device:OnDevice",
        "RepeatingLoader": "deepspeed.dataloader:RepeatingLoader",
        "get_numactl_cmd": "deepspeed.utils.numa:get_numactl_cmd",
        "instrument_w_nvtx": "deepspeed.utils.nvtx:instrument_w_nvtx",
        "see_memory_usage": "deepspeed.runtime.utils:see_memory_usage",
        "set_random_seed": "deepspeed.runtime.utils:set_random_seed",
    },
    (
        "groups",
        "init_on_device",
        "logging",
        "numa",
        "nvtx",
        "tensor_fragment",
        "timer",
        "zero_to_fp32",
    ),
)

# `z3_leaf_module` is a function in the module of that name.
sys.modules[__name__].__class__ = FunctionsOverModules
