"""Linear layers with frozen, possibly quantised weights and trainable LoRA adapters; names as upstream's.

    OptimizedLinear(in, out, lora_config=LoRAConfig(...), quantization_config=QuantizationConfig(...))

ZeRO shards the frozen weights, quantised or not, like any parameters (stage 3).
"""

from deepspeed._lazy import attach

_NAMES = {
    "Init": "deepspeed.linear.context_manager:Init",
    "LoRAConfig": "deepspeed.linear.config:LoRAConfig",
    "OptimizedLinear": "deepspeed.linear.optimized_linear:OptimizedLinear",
    "QuantizationConfig": "deepspeed.linear.config:QuantizationConfig",
    "init_lora": "deepspeed.linear.context_manager:init_lora",
}
__getattr__, __dir__ = attach(__name__, _NAMES, ("config", "context_manager", "optimized_linear", "quantization"))

__all__ = ["Init", "LoRAConfig", "OptimizedLinear", "QuantizationConfig", "init_lora"]
