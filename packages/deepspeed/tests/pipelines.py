"""Pipelines behind `deepspeed.initialize`, and the unsplit engine that each must equal to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import deepspeed
import ds_comm
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

WIDTH, VOCABULARY = 8, 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Block(nn.Module):
    """A residual block with children, so that it is one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def head(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return inputs @ module.get_parameter("weight").T


def tanh(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.tanh()


def tied() -> list[Any]:
    """A language model in small: the embedding is the head."""
    blocks = [LayerSpec(Block) for _ in range(3)]
    size = (VOCABULARY, WIDTH)
    embedding = TiedLayerSpec("embed", nn.Embedding, *size)
    return [
        embedding,
        *blocks,
        LayerSpec(nn.LayerNorm, WIDTH),
        TiedLayerSpec("embed", nn.Embedding, *size, forward_fn=head),
    ]


def plain() -> list[Any]:
    """Uneven layers without ties."""
    return [
        LayerSpec(nn.Embedding, VOCABULARY, WIDTH),
        LayerSpec(nn.Linear, WIDTH, 13),
        tanh,
        LayerSpec(nn.Linear, 13, WIDTH),
        LayerSpec(Block),
        LayerSpec(nn.Linear, WIDTH, VOCABULARY),
    ]


def half_frozen() -> list[Any]:
    """The first half learns nothing; with two stages, one of them trains no parameter."""
    torch.manual_seed(3)
    first = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)
    second = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    return [first, second, LayerSpec(nn.Linear, WIDTH, WIDTH), LayerSpec(nn.Linear, WIDTH, VOCABULARY)]


def looked_up(module: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The embedding's rows, or, every second time, something else (on all replicas alike, as stage 3 demands)."""
    module.calls = getattr(module, "calls", 0) + 1
    if module.calls % 2 == 0:
        return nn.functional.one_hot(tokens % WIDTH, WIDTH).float()
    return nn.functional.embedding(tokens, module.get_parameter("weight"))


def leaves_out() -> list[Any]:
    """A tied embedding whose first use some micro-batches leave out."""
    rest = tied()[1:]
    return [TiedLayerSpec("embed", nn.Embedding, VOCABULARY, WIDTH, forward_fn=looked_up), *rest]


LAYERS: dict[str, Callable[[], list[Any]]] = {
    "tied": tied,
    "plain": plain,
    "half_frozen": half_frozen,
    "leaves_out": leaves_out,
}


class Unsplit(nn.Module):
    """The whole model under the names of a pipeline, its layers built as `seed_layers` says, tied ones once."""

    def __init__(self, layers: list[Any], base_seed: int = 1234) -> None:
        super().__init__()
        self.tied_modules = nn.ModuleDict()
        self.functions: list[Callable[[Any], Any]] = []
        for index, layer in enumerate(layers):
            torch.manual_seed(base_seed + index)
            if isinstance(layer, TiedLayerSpec):
                if layer.key not in self.tied_modules:
                    self.tied_modules[layer.key] = layer.build()
                shared, use = self.tied_modules[layer.key], layer.forward_fn
                self.functions.append((lambda x, m=shared, f=use: f(m, x)) if use else shared)
                continue
            function = layer.build() if isinstance(layer, LayerSpec) else layer
            if isinstance(function, nn.Module):
                self.add_module(str(index), function)
            self.functions.append(function)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for function in self.functions:
            inputs = function(inputs)
        return inputs


def loss_fn(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.float().flatten(0, -2), labels.flatten())


def micro_batch(replica: int, step: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10_000 * replica + 100 * step + index)
    tokens = torch.randint(VOCABULARY, (2, 5), generator=generator)
    return tokens, tokens.roll(1, dims=1)


def data(replica: int, steps: range, num: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return (micro_batch(replica, step, index) for step in steps for index in range(num))


def make_config(stage: int, dtype: str, num: int, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": num,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 1e-2}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10},
        **({dtype: {"enabled": True}} if dtype != "fp32" else {}),
    }
    return {**config, **changes}


def make_pipeline(layers: str, config: dict[str, Any], num_stages: int = 2, **options: Any) -> Any:
    options = {"partition_method": "uniform", "seed_layers": True, **options}
    module = PipelineModule(LAYERS[layers](), num_stages=num_stages, loss_fn=loss_fn, **options)
    return deepspeed.initialize(model=module, config=config)[0]


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    """The masters of this rank's parameters, in full."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        master = deepspeed.utils.safe_get_full_fp32_param(parameter)
        assert master is not None
        found[name] = master.clone()
    return found


Trained = tuple[list[float], list[float], dict[str, torch.Tensor]]
"""Losses, gradient norms and final weights."""


def train_pipeline(
    layers: str, config: dict[str, Any], steps: int, num_stages: int = 2, options: dict[str, Any] | None = None
) -> Trained:
    engine = make_pipeline(layers, config, num_stages, **(options or {}))
    source = data(engine.get_data_parallel_rank(), range(steps), engine.micro_batches)
    losses, norms = [], []
    for _ in range(steps):
        losses.append(engine.train_batch(source).item())
        norms.append(engine.get_global_grad_norm())
    found = losses, norms, weights_of(engine)
    engine.destroy()
    return found


def train_unsplit(layers: str, config: dict[str, Any], steps: int) -> Trained:
    module = Unsplit(LAYERS[layers]())
    parameters = [p for p in module.parameters() if p.requires_grad]
    engine = deepspeed.initialize(model=module, model_parameters=parameters, config=config)[0]
    source = data(ds_comm.get_rank(), range(steps), engine.gradient_accumulation_steps())

    def loss_of(step: int, index: int) -> torch.Tensor:
        inputs, labels = next(source)
        return loss_fn(engine(inputs), labels)

    return finish_unsplit(engine, range(steps), loss_of)


def finish_unsplit(engine: Any, steps: range, loss_of: Callable[[int, int], torch.Tensor]) -> Trained:
    """Train a plain engine by `loss_of(step, micro-batch)`, and destroy it; losses are means over ranks, as a
    pipeline's."""
    num = engine.gradient_accumulation_steps()
    losses, norms = [], []
    for step in steps:
        total = torch.zeros(())
        for index in range(num):
            loss = loss_of(step, index)
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        mean = total / num
        ds_comm.all_reduce(mean)
        losses.append((mean / ds_comm.get_world_size()).item())
        norms.append(engine.get_global_grad_norm())
    found = losses, norms, weights_of(engine)
    engine.destroy()
    return found


def check_equal(stages: list[Trained], expected: Trained) -> None:
    """Every rank has the losses and norms, and the stages together the weights, of the unsplit run."""
    seen: set[str] = set()
    for losses, norms, weights in stages:
        assert losses == expected[0]
        assert [repr(norm) for norm in norms] == [repr(norm) for norm in expected[1]]  # inf and nan included
        for name, value in weights.items():
            assert torch.equal(value, expected[2][name]), name
        seen |= set(weights)
    assert seen == set(expected[2])
    assert expected[0][0] != expected[0][-1]
