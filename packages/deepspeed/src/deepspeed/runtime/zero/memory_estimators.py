"""How much memory model states will need at each ZeRO stage, before any model is built or placed.

With P parameters over N devices, bf16 parameters and gradients, fp32 master and two Adam moments (12 bytes):

    stage 0        2P + 2P + 12P            bytes per device
    stages 1, 2    2P + (2P + 12P) / N
    stage 3        (2P + 2P + 12P) / N      plus the largest layer in flight with its gradient (4 bytes)

Stage 1 needs no more than stage 2, because gradients are reduced as they come (see `ds_zero.shard`). With optimizer
offload the 12P/N live in host memory, with parameter offload the 2P/N as well. Activations are not counted;
`deepspeed plan` counts everything for a given config.

The functions `..._all_cold` take these numbers. The functions `..._all_live` take a model and read its shard map, which
is what the runtime allocates by: tied parameters count once, frozen ones have neither gradient nor state, a layer is a
unit, small parameters stay whole at stage 3, and padding is included (rank 0's, which is the fullest). So they differ
from the law by that.

Building an ordinary model takes 4 bytes per parameter of host memory in every process; under `zero.Init` only the
largest layer's. `additional_buffer_factor` is a margin on host memory. Each table is logged on the logger "DeepSpeed"
in upstream's columns, and its rows are returned.
"""

from __future__ import annotations

import dataclasses
from itertools import product

from torch import nn

from deepspeed.utils.logging import logger
from ds_zero import ZeroConfig, memory_per_rank
from ds_zero.blocks import find_blocks
from ds_zero.planning import parameter_names, plan_units
from ds_zero.shard import stage_parts

Row = dict[str, float | bool]


@dataclasses.dataclass(frozen=True)
class ModelStates:
    """Bytes of one device."""

    parameters: float
    gradients: float
    states: float
    """Masters and the optimizer's moments."""
    in_flight: float
    """A gathered layer and its gradient (stage 3)."""
    total_params: int
    largest_layer_params: int

    @classmethod
    def by_law(cls, stage: int, total_params: int, devices: int, largest_layer_params: int = 0) -> ModelStates:
        """From the numbers of a model, without padding."""
        parts = stage_parts(stage)
        return cls(
            parameters=2.0 * total_params / (devices if parts.params else 1),
            gradients=2.0 * total_params / (devices if parts.state else 1),
            states=12.0 * total_params / (devices if parts.state else 1),
            in_flight=4.0 * largest_layer_params if parts.params else 0.0,
            total_params=total_params,
            largest_layer_params=largest_layer_params,
        )

    @classmethod
    def of_model(cls, stage: int, model: nn.Module, devices: int) -> ModelStates:
        """From the shard map that `deepspeed.initialize` would make of a model, at bf16 with Adam."""
        config = ZeroConfig(stage=stage, dtype="bf16")
        names = parameter_names(model)
        shard_map = plan_units(find_blocks(model), names, {}, config, stage_parts(stage), devices)
        cost = memory_per_rank(shard_map, stage)
        largest = max((unit.numel for unit in shard_map.units), default=0)
        return cls(
            parameters=cost.parameters,
            gradients=cost.gradients,
            states=cost.masters + cost.optimizer,
            in_flight=2.0 * cost.largest_unit,
            total_params=sum(unit.numel for unit in shard_map.units),
            largest_layer_params=largest,
        )

    def needs(
        self, num_gpus_per_node: int, factor: float, *, offload: bool, offload_params: bool = False, init: bool = False
    ) -> tuple[float, float]:
        """(host bytes per node, device bytes)."""
        on_host = (self.states if offload else 0.0) + (self.parameters if offload and offload_params else 0.0)
        building = 4.0 * (self.largest_layer_params if init else self.total_params)
        on_device = self.parameters + self.gradients + self.states - on_host + self.in_flight
        return max(building, on_host) * num_gpus_per_node * factor, on_device


def _rows_without_offload(states: ModelStates, num_gpus_per_node: int, factor: float) -> list[Row]:
    host, device = states.needs(num_gpus_per_node, factor, offload=False)
    return [{"host_bytes": host, "device_bytes": device, "cpu_offload": False}]


def _rows_with_offload(states: ModelStates, num_gpus_per_node: int, factor: float) -> list[Row]:
    rows: list[Row] = []
    for offload in (True, False):
        host, device = states.needs(num_gpus_per_node, factor, offload=offload)
        rows.append({"host_bytes": host, "device_bytes": device, "cpu_offload": offload})
    return rows


def _rows_of_stage3(states: ModelStates, num_gpus_per_node: int, factor: float) -> list[Row]:
    rows: list[Row] = []
    for offload, params, init in product((True, False), repeat=3):
        if params and not offload:
            continue
        host, device = states.needs(num_gpus_per_node, factor, offload=offload, offload_params=params, init=init)
        found: Row = {"host_bytes": host, "device_bytes": device, "cpu_offload": offload}
        rows.append({**found, "cpu_offload_params": params, "zero_init": init})
    return rows


_ROWS = (_rows_without_offload, _rows_with_offload, _rows_with_offload, _rows_of_stage3)
_OPTIONS = {"cpu_offload_params": "offload_param", "cpu_offload": "offload_optimizer", "zero_init": "zero_init"}


def _table(stage: int, states: ModelStates, num_gpus_per_node: int, num_nodes: int, factor: float) -> list[Row]:
    rows = _ROWS[stage](states, num_gpus_per_node, factor)
    largest = f", {states.largest_layer_params / 1e6:.0f}M largest layer params" if stage == 3 else ""
    nodes = f"{num_nodes} node" + ("s" if num_nodes > 1 else "")
    gpus = f"{num_gpus_per_node} GPU" + ("s" if num_gpus_per_node > 1 else "")
    lines = [
        f"Estimated memory needed for params, optim states and gradients at ZeRO stage {stage} for a:",
        f"HW: Setup with {nodes}, {gpus} per node.",
        f"SW: Model with {states.total_params / 1e6:.0f}M total params{largest}.",
        "  per CPU  |  per GPU |   Options",
    ]
    for row in rows:
        options = ", ".join(f"{name}={_shown(key, row[key])}" for key, name in _OPTIONS.items() if key in row)
        lines.append(f"{row['host_bytes'] / 2**30:8.2f}GB | {row['device_bytes'] / 2**30:6.2f}GB | {options}")
    logger.info("\n".join(lines))
    return rows


def _shown(key: str, value: float | bool) -> str:
    return str(int(value)) if key == "zero_init" else "cpu" if value else "none"


# -- upstream's functions, and the same for stages 0 and 1 -----------------------------------------------------


def estimate_zero2_model_states_mem_needs(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[float, float]:
    """(bytes of host memory per node, bytes per device) at stage 2."""
    states = ModelStates.by_law(2, total_params, num_gpus_per_node * num_nodes)
    return states.needs(num_gpus_per_node, additional_buffer_factor, offload=cpu_offload)


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
    states = ModelStates.by_law(3, total_params, num_gpus_per_node * num_nodes, largest_layer_params)
    host, device = states.needs(
        num_gpus_per_node,
        additional_buffer_factor,
        offload=cpu_offload,
        offload_params=cpu_offload_params,
        init=zero_init,
    )
    return host, device, states.in_flight


def estimate_zero0_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> list[Row]:
    """Table of stage 0 (every device keeps everything)."""
    states = ModelStates.by_law(0, total_params, num_gpus_per_node * num_nodes)
    return _table(0, states, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero1_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> list[Row]:
    """Table of stage 1 with and without offload."""
    states = ModelStates.by_law(1, total_params, num_gpus_per_node * num_nodes)
    return _table(1, states, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> list[Row]:
    """Table of stage 2 with and without offload."""
    states = ModelStates.by_law(2, total_params, num_gpus_per_node * num_nodes)
    return _table(2, states, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> list[Row]:
    """Table of stage 3 over optimizer offload, parameter offload and `zero.Init`."""
    states = ModelStates.by_law(3, total_params, num_gpus_per_node * num_nodes, largest_layer_params)
    return _table(3, states, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero0_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> list[Row]:
    """Table of stage 0 for a model (see the module's text)."""
    states = ModelStates.of_model(0, model, num_gpus_per_node * num_nodes)
    return _table(0, states, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero1_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> list[Row]:
    """Table of stage 1 for a model (see the module's text)."""
    states = ModelStates.of_model(1, model, num_gpus_per_node * num_nodes)
    return _table(1, states, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> list[Row]:
    """Table of stage 2 for a model (see the module's text)."""
    states = ModelStates.of_model(2, model, num_gpus_per_node * num_nodes)
    return _table(2, states, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> list[Row]:
    """Table of stage 3 for a model (see the module's text)."""
    states = ModelStates.of_model(3, model, num_gpus_per_node * num_nodes)
    return _table(3, states, num_gpus_per_node, num_nodes, additional_buffer_factor)
