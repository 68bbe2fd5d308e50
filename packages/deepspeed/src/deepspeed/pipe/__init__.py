"""Models as lists of layers, split over the stages of a pipeline; imported on first use."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "LayerSpec": "ds_pipe.layers:LayerSpec",
        "PipelineModule": "ds_pipe.module:PipelineModule",
        "ProcessTopology": "ds_pipe.topology:ProcessTopology",
        "TiedLayerSpec": "ds_pipe.layers:TiedLayerSpec",
    },
)
