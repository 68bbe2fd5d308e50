"""Group-wise quantisation of weights under upstream's path; see `ds_inference.quantization`."""

from deepspeed.inference.quantization.quantization import _init_group_wise_weight_quantization

__all__ = ["_init_group_wise_weight_quantization"]
