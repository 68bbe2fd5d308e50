"""`PipelineModule`: the layers of one stage, out of a model given as a list of layers.

Every rank is given the whole list and splits it in the same way (`ds_pipe.partition`); it then builds and keeps only
its own layers, `parts[stage_id] .. parts[stage_id + 1] - 1`. A layer is a module, a function of one argument, a
`LayerSpec` or a `TiedLayerSpec`. What a layer returns (a tensor, or a nested tuple, list or dict of them) is the one
argument of the next.

Invariants. A layer's parameters are named by its index in the whole list (`3.weight`), as in an `nn.Sequential` of it;
tied modules live under `tied_modules.KEY`. After construction the tied weights of all stages equal those of the first
stage that holds them, its *owner*. With `seed_layers`, layer i is built after seeding with `base_seed + i`, so that the
weights do not depend on the split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import ds_comm
from ds_pipe.errors import PartitionError, PipelineError
from ds_pipe.layers import LayerSpec, TiedLayerSpec
from ds_pipe.partition import partition_layers
from ds_pipe.topology import ProcessTopology

__all__ = ["PipelineModule"]

Layer = nn.Module | LayerSpec | Callable[[Any], Any]


class PipelineModule(nn.Module):
    """This rank's stage of the model `layers`.

    The pipeline is the ranks of `group` (None: the world), one stage each, or with `topology` the ranks that differ
    from this one on its axis "pipe" only (then every rank of the world makes the module, as groups are created).
    `num_stages` is a check on that. `partition_method` is "parameters", "uniform", "type:REGEX" or "profile", which
    takes `layer_costs` (seconds per layer). `activation_checkpoint_interval` k recomputes k layers at a time in
    backward, by `activation_checkpoint_func(function, inputs)` (None: torch's), where all their classes are in
    `checkpointable_layers` (None: where any has parameters).
    `dynamic_shape` allows activations of another shape from one micro-batch to the next.

    PartitionError when the layers cannot be split; PipelineError when stages and ranks do not fit each other.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        num_stages: int | None = None,
        topology: ProcessTopology | None = None,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
        seed_layers: bool = False,
        seed_fn: Callable[[int], Any] | None = None,
        base_seed: int = 1234,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_func: Callable[..., Any] | None = None,
        checkpointable_layers: Sequence[str] | None = None,
        dynamic_shape: bool = False,
        *,
        group: dist.ProcessGroup | None = None,
        layer_costs: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.group, self._topology = _pipe_group(num_stages, topology, group)
        self.stage_id, self.num_stages = ds_comm.get_rank(self.group), ds_comm.get_world_size(self.group)
        self.loss_fn = loss_fn
        self.dynamic_shape = dynamic_shape
        self.activation_checkpoint_interval = activation_checkpoint_interval
        self.activation_checkpoint_func = activation_checkpoint_func or partial(checkpoint, use_reentrant=False)
        self.checkpointable_layers = checkpointable_layers
        self._specs = list(layers)
        self.parts = partition_layers(
            partition_method,
            self.num_stages,
            names=[_class_name(layer) for layer in self._specs],
            parameters=_count_parameters(self._specs) if partition_method.lower() == "parameters" else None,
            costs=_checked_costs(layer_costs, len(self._specs)),
        )
        self._local_start, self._local_stop = self.parts[self.stage_id : self.stage_id + 2]
        self.forward_funcs: list[Callable[[Any], Any]] = []
        self.fwd_map: dict[str, int] = {}
        self.tied_modules = nn.ModuleDict()
        self._build((seed_fn or torch.manual_seed) if seed_layers else None, base_seed)
        self._tied = _tied_stages(self._specs, self.parts)
        self._agree_on_tied_weights()

    def forward(self, inputs: Any) -> Any:
        """This stage's layers, one after the other."""
        interval = self.activation_checkpoint_interval
        if interval <= 0:
            return _chain(self.forward_funcs, inputs)
        for start in range(0, len(self.forward_funcs), interval):
            part = self.forward_funcs[start : start + interval]
            if torch.is_grad_enabled() and self._is_checkpointable(part):
                inputs = self.activation_checkpoint_func(partial(_chain, part), inputs)
            else:
                inputs = _chain(part, inputs)
        return inputs

    def topology(self) -> ProcessTopology:
        """The grid of ranks: the one given, or one axis "pipe"."""
        return self._topology

    def num_pipeline_stages(self) -> int:
        return self.num_stages

    def stage_owner(self, layer_idx: int) -> int:
        """The stage that holds layer `layer_idx`; IndexError for a layer that is not there."""
        if not 0 <= layer_idx < len(self._specs):
            raise IndexError(f"layer {layer_idx} is not there; the model has {len(self._specs)} layers")
        return next(stage for stage in range(self.num_stages) if layer_idx < self.parts[stage + 1])

    def set_checkpoint_interval(self, interval: int) -> None:
        self.activation_checkpoint_interval = interval

    def tied_parameters(self) -> list[tuple[str, nn.Parameter, tuple[int, ...]]]:
        """(name, parameter, stages that hold it, ascending) of those here that other stages hold as well."""
        return [
            (f"{key}.{attr}", self.tied_modules[key].get_parameter(attr), stages)
            for key, (attrs, stages) in self._tied.items()
            if self.stage_id in stages and len(stages) > 1
            for attr in attrs
        ]

    def _build(self, seed: Callable[[int], Any] | None, base_seed: int) -> None:
        for index in range(self._local_start, self._local_stop):
            layer = self._specs[index]
            if seed is not None:
                seed(base_seed + index)
            if isinstance(layer, TiedLayerSpec):
                if layer.key not in self.tied_modules:
                    self.tied_modules[layer.key] = layer.build()
                shared = self.tied_modules[layer.key]
                self.forward_funcs.append(partial(layer.forward_fn, shared) if layer.forward_fn else shared)
                continue
            module = layer.build() if isinstance(layer, LayerSpec) else layer
            if isinstance(module, nn.Module):
                self.add_module(str(index), module)
                self.fwd_map[str(index)] = len(self.forward_funcs)
            self.forward_funcs.append(module)

    def _agree_on_tied_weights(self) -> None:
        for name, parameter, stages in self.tied_parameters():
            data = parameter.detach().contiguous()
            if self.stage_id == stages[0]:
                for stage in stages[1:]:
                    ds_comm.send(data, group=self.group, group_dst=stage, label=f"tied {name}")
            else:
                ds_comm.recv(data, group=self.group, group_src=stages[0], label=f"tied {name}")
                with torch.no_grad():
                    parameter.copy_(data)

    def _is_checkpointable(self, functions: Sequence[Callable[[Any], Any]]) -> bool:
        if self.checkpointable_layers is not None:
            return all(type(function).__name__ in self.checkpointable_layers for function in functions)
        modules = [function for function in functions if isinstance(function, nn.Module)]
        return any(True for module in modules for _ in module.parameters())


def _chain(functions: Sequence[Callable[[Any], Any]], inputs: Any) -> Any:
    for function in functions:
        inputs = function(inputs)
    return inputs


def _class_name(layer: Layer) -> str:
    if isinstance(layer, LayerSpec):
        return layer.typename.__name__
    return type(layer).__name__ if isinstance(layer, nn.Module) else getattr(layer, "__name__", type(layer).__name__)


def _count_parameters(layers: Sequence[Layer]) -> list[int]:
    """Trainable parameters per layer; a description is built on the meta device for it, which takes no memory."""
    counts = []
    for layer in layers:
        if isinstance(layer, LayerSpec):
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                layer = layer.build()
        parameters = layer.parameters() if isinstance(layer, nn.Module) else ()
        counts.append(sum(parameter.numel() for parameter in parameters if parameter.requires_grad))
    return counts


def _checked_costs(costs: Sequence[float] | None, num_layers: int) -> Sequence[float] | None:
    if costs is not None and len(costs) != num_layers:
        raise PartitionError(f"layer_costs has {len(costs)} entries; expected one per layer, {num_layers}")
    return costs


def _tied_stages(layers: Sequence[Layer], parts: Sequence[int]) -> dict[str, tuple[list[str], tuple[int, ...]]]:
    """Per key: the attributes that are tied, and the stages that hold a layer of the key, ascending."""
    found: dict[str, tuple[list[str], tuple[int, ...]]] = {}
    for stage, (start, stop) in enumerate(pairwise(parts)):
        for layer in layers[start:stop]:
            if isinstance(layer, TiedLayerSpec):
                attrs, stages = found.get(layer.key, ([], ()))
                attrs = attrs + [attr for attr in layer.tied_weight_attr if attr not in attrs]
                found[layer.key] = (attrs, stages if stage in stages else (*stages, stage))
    return found


def _pipe_group(
    num_stages: int | None, topology: ProcessTopology | None, group: dist.ProcessGroup | None
) -> tuple[dist.ProcessGroup | None, ProcessTopology]:
    """The group whose ranks are the stages, and the grid."""
    if not ds_comm.is_initialized():
        ds_comm.init_distributed()
    if topology is None:
        size = ds_comm.get_world_size(group)
        if num_stages not in (None, size):
            raise PipelineError(
                f"num_stages is {num_stages}, the group has {size} ranks; expected one rank per stage: give "
                "topology=PipeDataParallelTopology(num_pp, num_dp) for more ranks than stages"
            )
        return group, ProcessTopology(["pipe"], [size])
    if group is not None:
        raise PipelineError("topology and group were both given; a topology spans the world, so give only one")
    if topology.world_size() != ds_comm.get_world_size() or num_stages not in (None, topology.get_dim("pipe")):
        raise PipelineError(
            f"the topology has {topology.world_size()} ranks and {topology.get_dim('pipe')} on its axis 'pipe'; "
            f"expected the world's {ds_comm.get_world_size()} ranks and num_stages = {num_stages}"
        )
    if topology.get_dim("pipe") == topology.world_size():
        return None, topology
    mine = None
    for ranks in topology.get_axis_comm_lists("pipe"):
        made = ds_comm.new_group(ranks)
        if ds_comm.get_rank() in ranks:
            mine = made
    if mine is None:
        raise PipelineError(f"the topology has the axes {topology.get_axis_names()}; expected one named 'pipe'")
    return mine, topology
