"""How much memory model states will need, before any model is built or placed.

With P parameters over N devices, bf16 parameters and gradients, fp32 master and two Adam moments (12 bytes):
    stage 2:  2P + (2P + 12P) / N      stage 3:  (2P + 2P + 12P) / N      bytes per device, plus what is in flight:
at stage 3 the largest layer gathered, with its gradient (4 bytes per parameter). With optimizer offload the 12P/N live
in host memory, with parameter offload the 2P/N of parameters as well. Activations are not counted.

Building an ordinary model takes 4 bytes per parameter of host memory in every process; under `zero.Init` only the
largest layer's. `additional_buffer_factor` is a margin on host memory.

The `_all_live` functions take a model, the `_all_cold` ones its numbers; both log a table of all combinations on the
logger "DeepSpeed" and return its rows.
"""

from __future__ import annotations

from itertools import product

import torch

from deepspeed.utils.logging import logger

Row = dict[str, float | bool]


def estimate_zero2_model_states_mem_needs(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[float, float]:
    """(bytes of host memory per node, bytes per device) at stage 2."""
    devices = num_gpus_per_node * num_nodes
    building = 4.0 * total_params * num_gpus_per_node
    host = max(building, 12.0 * total_params / num_nodes) if cpu_offload else building
    device = 2.0 * total_params + (2.0 if cpu_offload else 14.0) * total_params / devices
    return host * additional_buffer_factor, device


def estimate_zero3_model_states_mem_needs(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[float, float, float]:
    """(bytes of host memory per node, bytes per device, of which bytes in flight) at stage 3."""
    devices = num_gpus_per_node * num_nodes
    in_flight = 4.0 * largest_layer_params
    building = 4.0 * (largest_layer_params if zero_init else total_params) * num_gpus_per_node
    on_host = (12.0 if cpu_offload else 0.0) + (2.0 if cpu_offload and cpu_offload_params else 0.0)
    host = max(building, on_host * total_params / num_nodes)
    device = in_flight + (16.0 - on_host) * total_params / devices
    return host * additional_buffer_factor, device, in_flight


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> list[Row]:
    """Table of stage 2 with and without offload."""
    rows: list[Row] = []
    for offload in (True, False):
        host, device = estimate_zero2_model_states_mem_needs(
            total_params, num_gpus_per_node, num_nodes, offload, additional_buffer_factor
        )
        rows.append({"host_bytes": host, "device_bytes": device, "cpu_offload": offload})
    return _log(f"ZeRO-2, {total_params / 1e6:.0f}M parameters", num_gpus_per_node, num_nodes, rows)


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> list[Row]:
    """Table of stage 3 over optimizer offload, parameter offload and `zero.Init`."""
    rows: list[Row] = []
    for offload, params, init in product((True, False), repeat=3):
        if params and not offload:
            continue
        host, device, _ = estimate_zero3_model_states_mem_needs(
            total_params,
            largest_layer_params,
            num_gpus_per_node,
            num_nodes,
            offload,
            params,
            init,
            additional_buffer_factor,
        )
        rows.append(
            {
                "host_bytes": host,
                "device_bytes": device,
                "cpu_offload": offload,
                "cpu_offload_params": params,
                "zero_init": init,
            }
        )
    title = f"ZeRO-3, {total_params / 1e6:.0f}M parameters, largest layer {largest_layer_params / 1e6:.0f}M"
    return _log(title, num_gpus_per_node, num_nodes, rows)


def estimate_zero2_model_states_mem_needs_all_live(
    model: torch.nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> list[Row]:
    """Table of stage 2 for a model; tied parameters count once."""
    total, _ = model_sizes(model)
    return estimate_zero2_model_states_mem_needs_all_cold(total, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero3_model_states_mem_needs_all_live(
    model: torch.nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> list[Row]:
    """Table of stage 3 for a model; tied parameters count once."""
    total, largest = model_sizes(model)
    return estimate_zero3_model_states_mem_needs_all_cold(
        total, largest, num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def model_sizes(model: torch.nn.Module) -> tuple[int, int]:
    """(parameters of the model, parameters directly in its largest module), also of a model under ZeRO-3."""

    def numel(p: torch.Tensor) -> int:
        return int(getattr(p, "ds_numel", p.numel()))

    total = sum(numel(p) for p in model.parameters())
    largest = max((sum(numel(p) for p in m.parameters(recurse=False)) for m in model.modules()), default=0)
    return total, largest


def _log(title: str, num_gpus_per_node: int, num_nodes: int, rows: list[Row]) -> list[Row]:
    lines = [f"{title}: {num_nodes} nodes of {num_gpus_per_node} devices", "host per node | per device | options"]
    for row in rows:
        options = ", ".join(f"{key}={value}" for key, value in row.items() if not key.endswith("_bytes"))
        lines.append(f"{row['host_bytes'] / 2**30:11.2f} GB | {row['device_bytes'] / 2**30:7.2f} GB | {options}")
    logger.info("\n".join(lines))
    return rows
