"""Models, training loops and comparisons that the tests of ds_zero share.

A model of the zoo takes (batch, step) and returns a scalar fp32 loss. Sizes are odd on purpose: nothing divides evenly.
`train` is the loop under test, `reference` the same in plain one-process torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zero_piecewise import Whole

import ds_comm
import ds_zero

DIM = 11
WORDS = 13
Result = dict[str, Any]


class Block(nn.Module):
    def __init__(self, dim: int = DIM, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim + 1)
        self.down = nn.Linear(2 * dim + 1, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """Embedding, three blocks, head. Variants override `body` or the constructor."""

    def __init__(self, dropout: float = 0.0, sparse: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, DIM, sparse=sparse)
        self.blocks = nn.ModuleList(Block(dropout=dropout) for _ in range(3))
        self.head = nn.Linear(DIM, WORDS, bias=False)

    def body(self, x: Tensor, step: int) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def logits(self, x: Tensor) -> Tensor:
        return self.head(x)

    def forward(self, batch: Tensor, step: int = 0) -> Tensor:
        x = self.body(self.embed(batch), step)
        return F.cross_entropy(self.logits(x).float().view(-1, WORDS), batch.roll(1, 0).view(-1))


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].requires_grad_(False)
        self.embed.requires_grad_(False)
        self.blocks[2].norm.requires_grad_(False)


class Unused(Net):
    """`spare` is never used, block 1 in every third step only."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(DIM, 3)

    def body(self, x: Tensor, step: int) -> Tensor:
        for index, block in enumerate(self.blocks):
            if index != 1 or step % 3 == 0:
                x = block(x)
        return x


class Twice(Net):
    def body(self, x: Tensor, step: int) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.blocks[0](self.blocks[1](x))


class Checkpointed(Net):
    """Activation checkpointing with dropout and a frozen block."""

    reentrant = False

    def __init__(self) -> None:
        super().__init__(dropout=0.2)
        self.blocks[1].requires_grad_(False)

    def body(self, x: Tensor, step: int) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class CheckpointedTwice(Net):
    """A block in two reentrant checkpoints: autograd finishes its gradients twice in one backward."""

    def body(self, x: Tensor, step: int) -> Tensor:
        x = self.blocks[0](x)
        for block in (*self.blocks, self.blocks[1]):
            x = checkpoint(block, x, use_reentrant=True)
        return x


class CheckpointedWhole(Net):
    """One checkpoint around several blocks and a tied head."""

    def body(self, x: Tensor, step: int) -> Tensor:
        return checkpoint(lambda y: self.blocks[2](self.blocks[1](self.blocks[0](y))), x, use_reentrant=False)


class Attention(Net):
    """torch's MultiheadAttention reads out_proj.weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 1, batch_first=True)

    def body(self, x: Tensor, step: int) -> Tensor:
        x = super().body(x, step)
        return x + self.attention(x, x, x, need_weights=False)[0]


class External(Net):
    """The root uses parameters of other modules: as an attribute, and through a registered list."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [self.blocks[0].up.weight]
        ds_zero.register_external_parameter(self, self.hidden[0])

    def body(self, x: Tensor, step: int) -> Tensor:
        x = super().body(x, step)
        x = F.linear(x, self.blocks[1].down.weight[:, :DIM])
        return F.linear(x, self.hidden[0][:DIM])


class BiasReturning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, nn.Parameter]:
        return F.linear(x, self.linear.weight), self.linear.bias


class ReturnsParameter(Net):
    """As Megatron's layers do: the bias is returned and added by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.skewed = nn.ModuleList(BiasReturning() for _ in range(2))

    def body(self, x: Tensor, step: int) -> Tensor:
        x = super().body(x, step)
        for layer in self.skewed:
            y, bias = layer(x)
            x = x + torch.tanh(y + bias)
        return x


class RootParameters(Net):
    """The root's own parameters are used before and after its children; one is held in a local variable meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(DIM))
        self.shift = nn.Parameter(torch.zeros(DIM))
        self.extra = nn.ParameterList([nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.ones(DIM))])

    def body(self, x: Tensor, step: int) -> Tensor:
        scale = self.scale
        x = super().body(x * scale, step)
        return x * scale.square() + self.shift + self.extra[0].sum() * self.extra[1]


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(DIM, DIM, batch_first=True)

    def body(self, x: Tensor, step: int) -> Tensor:
        return super().body(self.lstm(x)[0], step)


class Mixed(Net):
    """fp32 norms, bf16 elsewhere (config.dtype None keeps every parameter's own)."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)
        self.final = nn.LayerNorm(DIM)

    def body(self, x: Tensor, step: int) -> Tensor:
        return self.final(super().body(x, step).float()).to(torch.bfloat16)


class Sparse(Net):
    def __init__(self) -> None:
        super().__init__(sparse=True)


ZOO: dict[str, type[Net]] = {
    cls.__name__: cls
    for cls in (
        Net, Tied, Frozen, Unused, Twice, Checkpointed, CheckpointedReentrant, CheckpointedTwice,
        CheckpointedWhole, Attention, External,
        ReturnsParameter, RootParameters, Recurrent, Mixed, Sparse,
    )
}  # fmt: skip

Optimizers = dict[str, Callable[[Any], torch.optim.Optimizer]]
OPTIMIZERS: Optimizers = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "adamw_plain": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=False),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05, initial_accumulator_value=0.1),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, centered=True, momentum=0.5),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=1e-2),
}


PIECEWISE: Optimizers = {"whole": lambda ps: Whole(ps)}
"""Not elementwise: these have no flat counterpart in plain torch."""


def build(name: str, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return ZOO[name]()


def groups_of(model: nn.Module, grouped: bool) -> Any:
    """All parameters, or two groups that split them by their dimension."""
    parameters = list(model.parameters())
    if not grouped:
        return parameters
    return [
        {"params": [p for p in parameters if getattr(p, "ds_shape", p.shape).numel() > 40], "lr": 3e-2},
        {"params": [p for p in parameters if getattr(p, "ds_shape", p.shape).numel() <= 40], "weight_decay": 0.0},
    ]


def batch(index: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + index)
    return torch.randint(0, WORDS, (3, 5), generator=generator)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    with ds_zero.GatheredParameters(list(model.parameters())):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def zero_config(stage: int, **config: Any) -> ds_zero.ZeroConfig:
    return ds_zero.ZeroConfig(**{"stage": stage, "param_persistence_threshold": 0, **config})


def train(
    name: str,
    stage: int,
    *,
    steps: int = 4,
    total: int | None = None,
    optimizer: str = "adamw",
    grouped: bool = False,
    schedule: bool = False,
    by_hand: bool = False,
    announce: bool = True,
    init: bool = False,
    **config: Any,
) -> Result:
    """Train with this rank's share of `total` micro-batches per step (default: one per rank).

    Micro-batch m of a step goes to rank m // (total / ranks): rank order is micro-batch order.
    `announce=False` leaves gradient_accumulation_steps at 1: gradients are summed over the micro-batches, as in torch.
    """
    ranks, rank = ds_comm.get_world_size(), ds_comm.get_rank()
    total = total or ranks
    share = total // ranks
    settings = zero_config(stage, gradient_accumulation_steps=share if announce else 1, **config)
    with ds_zero.Init(config=settings, enabled=init):
        model = build(name)
    model, zero = ds_zero.shard(model, (OPTIMIZERS | PIECEWISE)[optimizer](groups_of(model, grouped)), config=settings)
    assert zero is not None
    scheduler = torch.optim.lr_scheduler.ExponentialLR(zero.optimizer, 0.7) if schedule else None
    losses, norms = [], []
    for step in range(steps):
        for micro in range(share):
            index = step * total + rank * share + micro
            torch.manual_seed(index)
            loss = model(batch(index), step)
            losses.append(loss.item())
            if by_hand:
                zero.scale(loss).backward()
            else:
                zero.backward(loss)
        zero.step()
        zero.zero_grad()
        if scheduler is not None:
            scheduler.step()
        norms.append(zero.grad_norm)
    masters = {n: ds_zero.safe_get_full_fp32_param(p) for n, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "values": values_of(model), "masters": masters, "scale": zero.loss_scale}


def padded(parameter: nn.Parameter) -> nn.Parameter:
    """A flat parameter, padded to whole vectors, that the given one becomes a view of.

    torch's kernels round the remainder of an odd size differently from its whole vectors; ds_zero never has one.
    """
    numel = parameter.numel()
    flat = nn.Parameter(F.pad(parameter.detach().flatten(), (0, -numel % 32)))
    parameter.data = flat.data[:numel].view(parameter.shape)
    return flat


def reference(
    name: str,
    *,
    total: int,
    steps: int = 4,
    optimizer: str = "adamw",
    grouped: bool = False,
    schedule: bool = False,
    clip: float = 0.0,
) -> Result:
    """Plain fp32 torch in one process: mean gradient over `total` micro-batches, zero for unused parameters."""
    model = build(name)
    inner = OPTIMIZERS[optimizer](groups_of(model, grouped))
    masters = {p: padded(p) for p in model.parameters()}
    for group in inner.param_groups:
        group["params"] = [masters[p] for p in group["params"] if p.requires_grad]
    if optimizer in ("adam", "adamw"):
        for group in inner.param_groups:
            group.update(fused=True, foreach=False)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(inner, 0.7) if schedule else None
    losses, norms = [], []
    for step in range(steps):
        sums: dict[nn.Parameter, Tensor] = {}
        for micro in range(total):
            index = step * total + micro
            torch.manual_seed(index)
            loss = model(batch(index), step)
            losses.append(loss.item())
            loss.backward()
            for parameter in model.parameters():
                if parameter.grad is not None:  # summed densely: a sparse sum is taken in another order
                    sums[parameter] = (
                        sums[parameter] + parameter.grad.to_dense() if parameter in sums else parameter.grad.to_dense()
                    )
                    parameter.grad = None
        grads = []
        for parameter, master in masters.items():
            if parameter.requires_grad:
                grads.append(sums.get(parameter, torch.zeros_like(parameter)) * (1.0 / total))
                master.grad = torch.zeros_like(master)
                master.grad[: parameter.numel()] = grads[-1].flatten()
        norm = float(torch.stack([g.double().square().sum() for g in grads]).sum().sqrt().float())
        norms.append(norm)
        if clip:
            for master in masters.values():
                if master.grad is not None:
                    master.grad.mul_(min(1.0, clip / (norm + 1e-6)))
        inner.step()
        inner.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return {"losses": losses, "norms": norms, "values": {n: p.detach().clone() for n, p in model.named_parameters()}}


def differences(one: Result, other: Result, keys: tuple[str, ...] = ("norms", "values", "masters")) -> list[str]:
    """What is not equal to the bit, named."""
    found = []
    for key in keys:
        a, b = one[key], other[key]
        if isinstance(a, dict):
            for n in a:
                if (a[n] is None) != (b[n] is None) or (a[n] is not None and not torch.equal(a[n], b[n])):
                    gap = "None" if a[n] is None or b[n] is None else float((a[n] - b[n]).abs().max())
                    found.append(f"{key} of {n}: {gap}")
        elif a != b:
            found.append(f"{key}: {a} != {b}")
    return found


def all_stages(name: str, stages: tuple[int, ...] = (0, 1, 2, 3), **options: Any) -> tuple[Result, list[str]]:
    """Train at several stages on this rank; the first one's result and what differs from it."""
    first: Result | None = None
    found: list[str] = []
    for stage in stages:
        result = train(name, stage, **options)
        if first is None:
            first = result
        found += [f"stage {stage}: {d}" for d in differences(first, result, ("losses", "norms", "values", "masters"))]
    assert first is not None
    return first, found


def merged_losses(results: list[Result], steps: int) -> list[float]:
    """The ranks' losses in micro-batch order."""
    share = len(results[0]["losses"]) // steps
    return [loss for step in range(steps) for r in results for loss in r["losses"][step * share : (step + 1) * share]]
