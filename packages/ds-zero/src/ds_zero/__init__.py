"""ds_zero: shard any torch model and any elementwise torch optimizer over ranks (ZeRO stages 0-3).

Optimizers that need more than elements (LAMB's norms, Muon's matrices) offer `PiecewiseOptimizer`.

    model, optimizer = ds_zero.shard(model, torch.optim.AdamW(model.parameters()), config=ZeroConfig(stage=3))

A stage is a layout, never another algorithm: every stage gives the same bits on the same ranks.
"""

from __future__ import annotations

from ds_zero.__about__ import __version__
from ds_zero._param import ZeroParameter, ZeroParamStatus, ZeroParamType
from ds_zero.access import (
    get_z3_leaf_modules,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
    safe_update_full_grad_vectorized,
    set_z3_leaf_modules,
    unset_z3_leaf_modules,
    z3_leaf_module,
    z3_leaf_parameter,
)
from ds_zero.blocks import block_modules
from ds_zero.config import LossScaleConfig, ZeroConfig
from ds_zero.cost import MemoryCost, StepCost, memory_per_rank, traffic_per_step
from ds_zero.errors import CheckpointError, LayoutError, NonFiniteGradientError, ZeroError, ZeroStateError
from ds_zero.init import GatheredParameters, Init, register_external_parameter, unregister_external_parameter
from ds_zero.layout import ShardMap, plan_shard_map
from ds_zero.optimizer import ZeroOptimizer
from ds_zero.part import ModelPart
from ds_zero.pieces import OptimizerPiece, OptimizerSlot, PieceBatch, PiecewiseOptimizer
from ds_zero.shard import shard, sharded_of
from ds_zero.sharded import ShardedModel
from ds_zero.stage import accumulated_gradient, gathered_units, set_accumulated_gradient

__all__ = [
    "CheckpointError",
    "GatheredParameters",
    "Init",
    "LayoutError",
    "LossScaleConfig",
    "MemoryCost",
    "ModelPart",
    "NonFiniteGradientError",
    "OptimizerPiece",
    "OptimizerSlot",
    "PieceBatch",
    "PiecewiseOptimizer",
    "ShardMap",
    "ShardedModel",
    "StepCost",
    "ZeroConfig",
    "ZeroError",
    "ZeroOptimizer",
    "ZeroParamStatus",
    "ZeroParamType",
    "ZeroParameter",
    "ZeroStateError",
    "__version__",
    "accumulated_gradient",
    "block_modules",
    "gathered_units",
    "get_z3_leaf_modules",
    "memory_per_rank",
    "plan_shard_map",
    "register_external_parameter",
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
    "set_accumulated_gradient",
    "set_z3_leaf_modules",
    "shard",
    "sharded_of",
    "traffic_per_step",
    "unregister_external_parameter",
    "unset_z3_leaf_modules",
    "z3_leaf_module",
    "z3_leaf_parameter",
]
