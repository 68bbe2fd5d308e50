"""Small models, given as layers, and the unsplit run that every pipeline must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ds_pipe import LayerSpec, TiedLayerSpec, seeded

WIDTH = 8


def tanh(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.tanh()


def head(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return inputs @ module.get_parameter("weight").T


def plain(num_layers: int = 5) -> list[Any]:
    """Linear layers with functions between them, of uneven size."""
    sizes = [WIDTH + 3 * i for i in range(num_layers)] + [WIDTH]
    linears = [LayerSpec(nn.Linear, i, o) for i, o in pairwise(sizes)]
    return [layer for linear in linears for layer in (linear, tanh)]


def tied() -> list[Any]:
    """A language model in small: the embedding is the head."""
    return [
        TiedLayerSpec("embed", nn.Embedding, 16, WIDTH),
        LayerSpec(nn.Linear, WIDTH, WIDTH),
        tanh,
        LayerSpec(nn.LayerNorm, WIDTH),
        LayerSpec(nn.Linear, WIDTH, WIDTH),
        TiedLayerSpec("embed", nn.Embedding, 16, WIDTH, forward_fn=head),
    ]


def frozen() -> list[Any]:
    """A frozen module first, then one that learns."""
    torch.manual_seed(5)
    first = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    return [first, tanh, nn.Linear(WIDTH, WIDTH), tanh, nn.Linear(WIDTH, WIDTH)]


class Split(nn.Module):
    """A tensor in; out a dict of a tuple: floats, integers, a number, nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: torch.Tensor) -> dict[str, Any]:
        order = torch.arange(WIDTH - 1, -1, -1)
        return {"pair": (self.linear(inputs), inputs[:, :3].bool()), "order": [order], "scale": 2, "none": None}


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, given: dict[str, Any]) -> torch.Tensor:
        assert given["none"] is None
        hidden, mask = given["pair"]
        return self.linear(hidden[:, given["order"][0]] * given["scale"]) * mask.all(dim=1, keepdim=True)


def nested() -> list[Any]:
    return [LayerSpec(nn.Linear, WIDTH, WIDTH), LayerSpec(Split), LayerSpec(Join), LayerSpec(nn.Linear, WIDTH, WIDTH)]


class Columns(nn.Module):
    """A linear layer whose weight is [in, out], as GPT-2 has them."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_inputs, num_outputs) / num_inputs)
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(self.bias, inputs.view(-1, inputs.shape[-1]), self.weight)
        return flat.view(*inputs.shape[:-1], -1)


class Thrice(nn.Module):
    """One weight used three times in a forward, and one product without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(self.linear(inputs).tanh())
        return self.linear(hidden) + inputs @ self.matrix


class Still(nn.Linear):
    """Does not learn."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.requires_grad_(False)


def everything() -> list[Any]:
    """What can go wrong at once: a tied head, dropout, frozen and shared weights, layers of uneven size."""
    return [
        TiedLayerSpec("embed", nn.Embedding, 16, WIDTH),
        LayerSpec(nn.Dropout, 0.2),
        LayerSpec(Columns, WIDTH, 3 * WIDTH),
        LayerSpec(nn.Dropout, 0.3),
        LayerSpec(nn.Linear, 3 * WIDTH, WIDTH, bias=False),
        LayerSpec(nn.LayerNorm, WIDTH),
        LayerSpec(Still),
        LayerSpec(Thrice),
        LayerSpec(nn.Dropout, 0.1),
        LayerSpec(nn.Linear, WIDTH, WIDTH),
        TiedLayerSpec("embed", nn.Embedding, 16, WIDTH, forward_fn=head),
    ]


MODELS: dict[str, Callable[[], list[Any]]] = {
    "plain": plain,
    "tied": tied,
    "frozen": frozen,
    "nested": nested,
    "everything": everything,
}


def loss_fn(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if labels.dtype == torch.long:
        return nn.functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())
    return nn.functional.mse_loss(outputs, labels)


def batches(
    model: str, num: int, rows: int = 4, dtype: torch.dtype | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    if model in ("tied", "everything"):
        tokens = [torch.randint(16, (rows, 6), generator=generator) for _ in range(num)]
        return [(token, token.roll(1, dims=1)) for token in tokens]
    return [
        (
            torch.randn(rows, WIDTH, generator=generator).to(dtype),
            torch.randn(rows, WIDTH, generator=generator).to(dtype),
        )
        for _ in range(num)
    ]


class Unsplit(nn.Module):
    """The whole model in one process, its layers built as `seed_layers` says, tied ones once."""

    def __init__(self, layers: Sequence[Any], base_seed: int = 1234) -> None:
        super().__init__()
        self.tied_modules = nn.ModuleDict()
        self.functions: list[Callable[[Any], Any]] = []
        for index, layer in enumerate(layers):
            torch.manual_seed(base_seed + index)
            if isinstance(layer, TiedLayerSpec):
                if layer.key not in self.tied_modules:
                    self.tied_modules[layer.key] = layer.build()
                shared = self.tied_modules[layer.key]
                use = layer.forward_fn
                self.functions.append((lambda x, m=shared, f=use: f(m, x)) if use else shared)
                continue
            function = layer.build() if isinstance(layer, LayerSpec) else layer
            if isinstance(function, nn.Module):
                self.add_module(str(index), function)
            self.functions.append(function)

    def forward(self, inputs: Any) -> Any:
        for function in self.functions:
            inputs = function(inputs)
        return inputs


def train_unsplit(
    model: str,
    num_steps: int,
    num_micro_batches: int,
    dropout_seed: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of plain torch with gradient accumulation, and the gradients of one more batch."""
    module = Unsplit(MODELS[model]()).to(dtype)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01, foreach=False)
    data = iter(batches(model, (num_steps + 1) * num_micro_batches, dtype=dtype))
    losses = []
    for step in range(num_steps + 1):
        total = torch.zeros(())
        for i in range(num_micro_batches):
            inputs, labels = next(data)
            if dropout_seed is None:
                outputs = module(inputs)
            else:
                outputs = seeded(module.functions, inputs, seed=dropout_seed, step=step, micro_batch=i)
            loss = loss_fn(outputs, labels)
            (loss / num_micro_batches).backward()
            total += loss.detach()
        losses.append((total / num_micro_batches).item())
        if step < num_steps:
            optimizer.step()
            optimizer.zero_grad()
    return losses, state(module)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Weights, and gradients as NAME.grad."""
    found = {name: value.detach().clone() for name, value in module.state_dict().items()}
    grads = {f"{name}.grad": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {**found, **grads}
