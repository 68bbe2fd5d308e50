"""`deepspeed.zero`: building and looking into sharded models. Names and modules are imported on first use."""

from deepspeed._lazy import attach

_PARTITION = "deepspeed.runtime.zero.partition_parameters"

__getattr__, __dir__ = attach(
    __name__,
    {
        "DeepSpeedZeRoOffload": "deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload",
        "GatheredParameters": f"{_PARTITION}:GatheredParameters",
        "Init": f"{_PARTITION}:Init",
        "TiledLinear": "deepspeed.runtime.zero.tiling:TiledLinear",
        "TiledLinearReturnBias": "deepspeed.runtime.zero.tiling:TiledLinearReturnBias",
        "ZeroParamStatus": f"{_PARTITION}:ZeroParamStatus",
        "ZeroParamType": f"{_PARTITION}:ZeroParamType",
        "register_external_parameter": f"{_PARTITION}:register_external_parameter",
        "unregister_external_parameter": f"{_PARTITION}:unregister_external_parameter",
        "unwrap_model_for_generation": "deepspeed.runtime.zero.generation:unwrap_model_for_generation",
    },
    (
        "config",
        "memory_estimators",
        "muon",
        "offload_config",
        "parameter_offload",
        "partition_parameters",
        "stage3",
        "stage_1_and_2",
        "tiling",
        "utils",
    ),
)
