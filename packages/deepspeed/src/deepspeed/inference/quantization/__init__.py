"""Group-wise quantisation of weights under upstream's path; see `ds_inference.quantization`."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "QuantizedLinear": "ds_inference.quantization:QuantizedLinear",
        "_init_group_wise_weight_quantization": (
            "deepspeed.inference.quantization.quantization:_init_group_wise_weight_quantization"
        ),
    },
    ("layers", "quantization"),
)
