"""`PipelineModule`: the layers of one rank, out of a model given as a list of layers.

Every rank is given the whole list and splits it in the same way (`ds_pipe.partition`) into num_stages x num_chunks
*virtual stages*: number k is the layers `parts[k] .. parts[k + 1] - 1` and lives on the rank `placement[k]`. A rank
builds and keeps only its own ones, its `chunks`, in model order. A layer is a module, a function of one argument, a
`LayerSpec` or a `TiedLayerSpec`. What a layer returns (a tensor, or a nested tuple, list or dict of them) is the one
argument of the next.

Invariants. A layer's parameters are named by its index in the whole list (`3.weight`), as in an `nn.Sequential` of it;
tied modules live under `tied_modules.KEY`. After construction the tied weights of all stages equal those of the first
stage that holds them, its *owner*. With `seed_layers`, layer i is built after seeding with `base_seed + i`, so that the
weights do not depend on the split.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import ds_comm
from ds_pipe._p2p import flatten
from ds_pipe.errors import PartitionError, PipelineError
from ds_pipe.grid import PipelineParallelGrid
from ds_pipe.layer_files import layer_file, load_layers, save_layers
from ds_pipe.layers import LayerSpec, TiedLayerSpec
from ds_pipe.partition import partition_layers
from ds_pipe.profile import profile_layers
from ds_pipe.rng import Seeds, seeded
from ds_pipe.schedule.action import looped_placement
from ds_pipe.schedule.simulate import Costs
from ds_pipe.topology import PipeDataParallelTopology, ProcessTopology

__all__ = ["Chunk", "PipelineModule", "Tie"]

Layer = nn.Module | LayerSpec | Callable[[Any], Any]


class Tie(NamedTuple):
    """A weight that layers in several virtual stages (`virtuals`, ascending) use.

    `stages` are the ranks that hold it, in the order of their first use: stages[0] is the owner. `number` counts the
    model's tied weights, on all ranks alike.
    """

    number: int
    name: str
    parameter: nn.Parameter
    virtuals: tuple[int, ...]
    stages: tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """One virtual stage: its layers `start`, `start` + 1, ... as functions, and the modules among (or inside) them."""

    virtual: int
    start: int
    functions: list[Callable[[Any], Any]]
    modules: list[nn.Module]

    def parameters(self) -> list[nn.Parameter]:
        """All of them, each once."""
        return list(dict.fromkeys(p for module in self.modules for p in module.parameters()))

    def run(self, inputs: Any, start: int, stop: int, seeds: Seeds | None) -> Any:
        """functions[start:stop] one after the other; with `seeds` as `rng.seeded` does it."""
        functions = self.functions[start:stop]
        if seeds is not None:
            device = next((p.device for module in self.modules for p in module.parameters()), "cpu")
            return seeded(functions, inputs, **seeds._asdict(), first_layer=self.start + start, device=device)
        for function in functions:
            inputs = function(inputs)
        return inputs


@dataclass
class _Axes:
    """Where a rank is: the group of its pipeline, the whole topology, and the groups of all axes once they are made."""

    group: dist.ProcessGroup | None
    topology: ProcessTopology
    grid: PipelineParallelGrid | None = None


class PipelineModule(nn.Module):
    """This rank's stage of the model `layers`.

    The pipeline is the ranks of `group` (None: the world), one stage each, or with `topology` the ranks that differ
    from this one on its axis "pipe" only (then every rank of the world makes the module, as groups are created).
    With fewer `num_stages` than ranks the others are replicas: num_stages = 2 on 4 ranks is 2 stages x 2 replicas.
    `partition_method` is "parameters", "uniform", "type:REGEX" or "profile", which takes `layer_costs` (seconds per
    layer), or measures all layers with `profile_sample`, a micro-batch (inputs, labels), and leaves `costs`. A rank
    holds `num_chunks` pieces of the model, dealt by `placement`: "loop" (0 1 .. p-1 0 1 .. p-1, for the schedule
    interleaved) or "v" (0 1 .. p-1 p-1 .. 1 0, for zb_v). `activation_checkpoint_interval` k recomputes k layers at a
    time in backward, by `activation_checkpoint_func(function, inputs)` (None: torch's), where all their classes are in
    `checkpointable_layers` (None: where any has parameters). `dynamic_shape` allows activations of another shape from
    one micro-batch to the next.

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
        profile_sample: tuple[Any, Any] | None = None,
        num_chunks: int = 1,
        placement: Literal["loop", "v"] = "loop",
    ) -> None:
        super().__init__()
        layers = list(layers)  # any iterable will do
        self._axes = _pipe_group(num_stages, topology, group)
        self.group = self._axes.group
        self.stage_id, self.num_stages = ds_comm.get_rank(self.group), ds_comm.get_world_size(self.group)
        self.loss_fn = loss_fn
        self.dynamic_shape = dynamic_shape
        self.activation_checkpoint_interval = activation_checkpoint_interval
        self.activation_checkpoint_func = activation_checkpoint_func or partial(checkpoint, use_reentrant=False)
        self.checkpointable_layers = checkpointable_layers
        self.costs: Costs | None = None
        if partition_method.lower() == "profile" and layer_costs is None and profile_sample is not None:
            self.costs = profile_layers(layers, profile_sample, loss_fn, group=group)
            layer_costs = self.costs.totals
        self.num_chunks = num_chunks
        self.placement = _placement(placement, self.num_stages, num_chunks)
        self.parts = partition_layers(
            partition_method,
            self.num_stages * num_chunks,
            names=[_class_name(layer) for layer in layers],
            parameters=_count_parameters(layers) if partition_method.lower() == "parameters" else None,
            costs=_checked_costs(layer_costs, len(layers)),
        )
        self.forward_funcs: list[Callable[[Any], Any]] = []
        self.fwd_map: dict[str, int] = {}
        self.tied_modules = nn.ModuleDict()
        held = [virtual for virtual, stage in enumerate(self.placement) if stage == self.stage_id]
        seed = (seed_fn or torch.manual_seed) if seed_layers else None
        self.chunks = [self._build(layers, virtual, seed, base_seed) for virtual in held]
        self._tied = _tied_stages(layers, self.parts)
        tied = [(layer.key, index) for index, layer in enumerate(layers) if isinstance(layer, TiedLayerSpec)]
        self._first_uses = dict(reversed(tied))  # key -> its first layer
        self._agree_on_tied_weights()

    def forward(self, inputs: Any, chunk: int | None = None, seeds: Seeds | None = None) -> Any:
        """The layers of `chunk` (needed where there are several), one after the other, drawing by `seeds` if given."""
        if chunk is None and self.num_chunks > 1:
            raise PipelineError(f"forward() of a module with {self.num_chunks} chunks; say which: forward(x, chunk=0)")
        piece = self.chunks[chunk or 0]
        interval = self.activation_checkpoint_interval
        if interval <= 0:
            return piece.run(inputs, 0, len(piece.functions), seeds)
        for start in range(0, len(piece.functions), interval):
            stop = min(start + interval, len(piece.functions))
            if torch.is_grad_enabled() and self._is_checkpointable(piece.functions[start:stop]):
                part = partial(piece.run, start=start, stop=stop, seeds=seeds)
                inputs = self.activation_checkpoint_func(part, inputs)
                self._check_learns(inputs, piece, start, stop)
            else:
                inputs = piece.run(inputs, start, stop, seeds)
        return inputs

    def topology(self) -> ProcessTopology:
        """The grid of ranks: the one given, or one axis "pipe"."""
        return self._axes.topology

    def mpu(self) -> PipelineParallelGrid:
        """The groups of the grid; collective over the world when called first."""
        if self._axes.grid is None:
            self._axes.grid = PipelineParallelGrid(self._axes.topology, self.group)
        return self._axes.grid

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return self.parts[-1]

    def num_pipeline_stages(self) -> int:
        return self.num_stages

    def stage_owner(self, layer_idx: int) -> int:
        """The stage that holds layer `layer_idx`; IndexError for a layer that is not there."""
        if not 0 <= layer_idx < self.num_layers:
            raise IndexError(f"layer {layer_idx} is not there; the model has {self.num_layers} layers")
        return self.placement[bisect_right(self.parts, layer_idx) - 1]

    def set_checkpoint_interval(self, interval: int) -> None:
        self.activation_checkpoint_interval = interval

    def ckpt_prefix(self, checkpoints_path: str | os.PathLike[str], tag: str) -> str:
        """The folder of checkpoint `tag`, and in it the beginning of names that this rank's coordinates ask for."""
        return os.path.join(checkpoints_path, str(tag), self._coordinates())

    def ckpt_layer_path(self, ckpt_dir: str | os.PathLike[str], local_layer_idx: int) -> str:
        """The file of this rank's layer number `local_layer_idx` (counted over its chunks) in `ckpt_dir`."""
        return os.path.join(ckpt_dir, layer_file(self._held()[local_layer_idx], self._coordinates()))

    def ckpt_layer_path_list(self, ckpt_dir: str | os.PathLike[str], local_layer_idx: int) -> list[str]:
        """The files in `ckpt_dir` of this rank's layer number `local_layer_idx`, one per coordinate on other axes."""
        names = layer_file(self._held()[local_layer_idx], "*"), layer_file(self._held()[local_layer_idx])
        return sorted(str(path) for name in names for path in Path(ckpt_dir).glob(name))

    def save_state_dict(
        self, save_dir: str | os.PathLike[str], checkpoint_engine: Any = None, exclude_frozen_params: bool = False
    ) -> None:
        """Write every layer's state to a file of its own (`layer_files`); all ranks call it, the first replica writes.

        Weights only, in full: what ZeRO has sharded is for the engine's save_checkpoint. `checkpoint_engine` is
        upstream's and without effect, as the files are safetensors.
        """
        replicated = self.topology().world_size() > self.num_stages
        place = self.topology().get_coord(ds_comm.get_rank())._asdict() if replicated else {}
        failure = ""
        try:
            save_layers(
                Path(save_dir),
                {at: module for at, module in self._stateful().items() if self.stage_id == self.stage_owner(at)},
                self.num_layers,
                coordinates=self._coordinates(),
                writes=place.get("data", 0) == 0,
                exclude_frozen=exclude_frozen_params,
                group=self.group,
            )
        except PipelineError as error:
            failure = str(error)
        if replicated:  # of the other replicas none writes, and all wait
            said: list[str] = [""] * ds_comm.get_world_size()
            ds_comm.all_gather_object(said, failure)
            failure = next(filter(None, said), "")
        if failure:
            raise PipelineError(failure)

    def load_state_dir(
        self, load_dir: str | os.PathLike[str], checkpoint_engine: Any = None, strict: bool = True
    ) -> None:
        """Read this rank's layers from a folder of save_state_dict, whatever number of stages wrote it; collective."""
        load_layers(
            Path(load_dir),
            self._stateful(),
            self.num_layers,
            coordinates=self._coordinates(),
            strict=strict,
            group=self.group,
        )

    def _held(self) -> list[int]:
        """The layers of this rank."""
        return [index for chunk in self.chunks for index in range(chunk.start, chunk.start + len(chunk.functions))]

    def _stateful(self) -> dict[int, nn.Module]:
        """The modules of this rank by layer; a tied one by the first layer of its key, wherever that is."""
        held = {int(name): module for name, module in self.named_children() if name.isdigit()}
        return held | {self._first_uses[key]: module for key, module in self.tied_modules.items()}

    def _coordinates(self) -> str:
        """Where this rank is on axes besides pipe and data, such as model_01; mostly nothing."""
        shown = set(self._axes.topology.get_axis_names()) - {"pipe", "data"}
        return self._axes.topology.get_rank_repr(ds_comm.get_rank()) if shown else ""

    def ties(self) -> list[Tie]:
        """The weights held here that several layers use through `TiedLayerSpec`s, in one order on all ranks."""
        found = []
        named = [(key, attr, virtuals) for key, (attrs, virtuals) in self._tied.items() for attr in attrs]
        for number, (key, attr, virtuals) in enumerate(named):
            stages = tuple(dict.fromkeys(self.placement[virtual] for virtual in virtuals))
            if self.stage_id in stages and len(virtuals) > 1:
                parameter = self.tied_modules[key].get_parameter(attr)
                found.append(Tie(number, f"{key}.{attr}", parameter, virtuals, stages))
        return found

    def tied_parameters(self) -> list[tuple[str, nn.Parameter, tuple[int, ...]]]:
        """(name, parameter, stages that hold it, its owner first) of those here that other stages hold as well."""
        return [(tie.name, tie.parameter, tie.stages) for tie in self.ties() if len(tie.stages) > 1]

    def _build(self, layers: Sequence[Layer], virtual: int, seed: Callable[[int], Any] | None, base_seed: int) -> Chunk:
        chunk = Chunk(virtual, self.parts[virtual], [], [])
        for index in range(*self.parts[virtual : virtual + 2]):
            layer = layers[index]
            if seed is not None:
                seed(base_seed + index)
            if isinstance(layer, TiedLayerSpec):
                if layer.key not in self.tied_modules:
                    self.tied_modules[layer.key] = layer.build()
                module: Any = self.tied_modules[layer.key]
                function = partial(layer.forward_fn, module) if layer.forward_fn else module
            else:
                function = module = layer.build() if isinstance(layer, LayerSpec) else layer
                if isinstance(module, nn.Module):
                    self.add_module(str(index), module)
                    self.fwd_map[str(index)] = len(self.forward_funcs)
            if isinstance(module, nn.Module):
                chunk.modules.append(module)
            chunk.functions.append(function)
            self.forward_funcs.append(function)
        return chunk

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

    def _check_learns(self, outputs: Any, piece: Chunk, start: int, stop: int) -> None:
        """Reentrant checkpoint functions give no gradients to layers whose inputs take none, and torch only warns."""
        tensors: list[torch.Tensor] = []
        flatten(outputs, tensors)
        modules = [function for function in piece.functions[start:stop] if isinstance(function, nn.Module)]
        learns = any(parameter.requires_grad for module in modules for parameter in module.parameters())
        if learns and not any(tensor.requires_grad for tensor in tensors):
            raise PipelineError(
                f"activation_checkpoint_func gave outputs without a gradient for layers {piece.start + start} to "
                f"{piece.start + stop - 1}, which would not learn; expected a function that is not reentrant (the "
                "default is none), or checkpointable_layers without the classes that take the model's inputs"
            )

    def _is_checkpointable(self, functions: Sequence[Callable[[Any], Any]]) -> bool:
        if self.checkpointable_layers is not None:
            return all(type(function).__name__ in self.checkpointable_layers for function in functions)
        modules = [function for function in functions if isinstance(function, nn.Module)]
        return any(True for module in modules for _ in module.parameters())


def _placement(name: str, num_stages: int, num_chunks: int) -> tuple[int, ...]:
    """The stage of each virtual stage."""
    if num_chunks < 1 or name not in ("loop", "v") or (name == "v" and num_chunks != 2):
        raise PartitionError(
            f"num_chunks is {num_chunks} and placement {name!r}; expected at least one chunk, and 'loop' or, with two "
            "chunks, 'v'"
        )
    if name == "v":
        return (*range(num_stages), *reversed(range(num_stages)))
    return looped_placement(num_stages, num_chunks)


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
    """Per key: the attributes that are tied, and the virtual stages that hold a layer of the key, ascending."""
    found: dict[str, tuple[list[str], tuple[int, ...]]] = {}
    for virtual, (start, stop) in enumerate(pairwise(parts)):
        for layer in layers[start:stop]:
            if isinstance(layer, TiedLayerSpec):
                attrs, held = found.get(layer.key, ([], ()))
                attrs = attrs + [attr for attr in layer.tied_weight_attr if attr not in attrs]
                found[layer.key] = (attrs, held if virtual in held else (*held, virtual))
    return found


def _pipe_group(num_stages: int | None, topology: ProcessTopology | None, group: dist.ProcessGroup | None) -> _Axes:
    """The group whose ranks are the stages, and the topology; the grid where one had to be made."""
    if not ds_comm.is_initialized():
        ds_comm.init_distributed()
    size = ds_comm.get_world_size(group)
    replicas, rest = divmod(size, num_stages or size)
    if topology is None and group is None and num_stages is not None and replicas > 1 and not rest:
        topology = PipeDataParallelTopology(num_stages, replicas)
    if topology is None:
        if num_stages not in (None, size):
            raise PipelineError(
                f"num_stages is {num_stages}, but there are {size} ranks; expected one rank per stage, or a multiple"
                " of that for several replicas of the pipeline"
            )
        return _Axes(group, ProcessTopology(["pipe"], [size]))
    if group is not None:
        raise PipelineError("topology and group were both given; a topology spans the world, so give only one")
    if topology.world_size() != size or num_stages not in (None, topology.get_dim("pipe")):
        raise PipelineError(
            f"the topology has {topology.world_size()} ranks and {topology.get_dim('pipe')} on its axis 'pipe'; "
            f"expected the world's {size} ranks and num_stages = {num_stages}"
        )
    if not topology.get_dim("pipe"):
        raise PipelineError(f"the topology has the axes {topology.get_axis_names()}; expected one named 'pipe'")
    grid = PipelineParallelGrid(topology)
    return _Axes(None if topology.get_dim("pipe") == size else grid.get_pipe_parallel_group(), topology, grid)
