"""`deepspeed.zero`: building and looking into sharded models. Names and modules are imported on first use."""

from deepspeed._lazy import attach

_PARTITION = "deepspeed.runtime.zero.partition_parameters"

__getattr__, __dir__ = attach(
    __name__,
    {
        name: f"{_PARTITION}:{name}"
        for name in (
            "GatheredParameters",
            "Init",
            "ZeroParamStatus",
            "ZeroParamType",
            "register_external_parameter",
            "unregister_external_parameter",
        )
    },
    ("config", "memory_estimators", "offload_config", "partition_parameters", "stage3", "stage_1_and_2"),
)
