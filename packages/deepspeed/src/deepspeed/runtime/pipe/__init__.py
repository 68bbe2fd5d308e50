"""Upstream's import paths of pipeline parallelism; modules are imported on first use."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "LayerSpec": "ds_pipe.layers:LayerSpec",
        "PipelineModule": "ds_pipe.module:PipelineModule",
        "ProcessTopology": "ds_pipe.topology:ProcessTopology",
        "TiedLayerSpec": "ds_pipe.layers:TiedLayerSpec",
    },
    ("engine", "module", "schedule", "topology"),
)
