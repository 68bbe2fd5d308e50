"""Gates and the layer that sends tokens to experts and back.

`top1gating`, `top2gating` and `topkgating` give upstream's dense answer, [tokens, experts, capacity]; it grows with the
square of the tokens, and the layer does not need it: `TopKGate.choose` gives `gating.Choices`, of which `MOELayer`
makes a `ds_kernels.Routing`, whose rows hold each kept choice once and no padding.

Expert parallelism is a layout here (see `deepspeed.moe`): an `ep_group` decides nothing but, in the gating functions,
the common capacity when nothing is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ds_comm
import ds_kernels
from deepspeed.moe.experts import Experts
from deepspeed.moe.gating import Choices, capacity_of, choose_top1, choose_top2, choose_topk, gumbel_noise
from deepspeed.utils.logging import warning_once

__all__ = [
    "MOELayer",
    "TopKGate",
    "gumbel_rsample",
    "multiplicative_jitter",
    "top1gating",
    "top2gating",
    "topkgating",
]

NOISE = (None, "None", "Jitter", "RSample")

Gated = tuple[Tensor, Tensor, Tensor, Tensor]
"""(auxiliary loss, combine weights [tokens, experts, capacity], where they are not zero, choices of each expert)."""


def multiplicative_jitter(x: Tensor, device: torch.device | None = None, epsilon: float = 1e-2) -> Tensor:
    """x times uniform noise in [1 - epsilon, 1 + epsilon]."""
    return x if epsilon == 0 else x * torch.empty_like(x).uniform_(1.0 - epsilon, 1.0 + epsilon)


def gumbel_rsample(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Gumbel(0, 1) noise."""
    return gumbel_noise(torch.empty(shape, device=device))


class _AllToAll(torch.autograd.Function):
    """`_AllToAll.apply(group, input)`: exchange equal parts of dim 0 over a group; gradients travel back likewise."""

    @staticmethod
    def forward(ctx: Any, group: Any, input: Tensor) -> Tensor:
        ctx.group = group
        input = input.contiguous()
        output = torch.empty_like(input)
        ds_comm.all_to_all_single(output, input, group=group, label="tokens of experts")
        return output

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor) -> tuple[None, Tensor]:
        return None, _AllToAll.apply(ctx.group, *grad_output)  # type: ignore[no-untyped-call]


# -- gating functions, dense ------------------------------------------------------------------------------------------


def top1gating(
    logits: Tensor,
    capacity_factor: float,
    min_capacity: int,
    used_token: Tensor | None = None,
    noisy_gate_policy: str | None = None,
    drop_tokens: bool = True,
    use_rts: bool = True,
    ep_group: Any = None,
    use_tutel: bool = False,
) -> Gated:
    """Gate [tokens, experts] logits, one expert each; see `gating.choose_top1`. `use_tutel` has no effect.

    Returns:
        (auxiliary loss, combine weights, dispatch mask, counts); the weight is the expert's probability.
    Raises:
        ValueError: fewer tokens than `min_capacity`, or an unknown noise policy.
    """
    _check_noise(noisy_gate_policy)
    if len(logits) < int(min_capacity):
        raise ValueError(
            f"top1gating: {len(logits)} tokens are fewer than min_capacity {int(min_capacity)}; give more tokens, or"
            " lower min_capacity"
        )
    choices = choose_top1(
        logits,
        capacity_of(logits, capacity_factor, min_capacity) if drop_tokens else None,
        used_token=used_token,
        noisy=noisy_gate_policy == "RSample",
        random_selection=use_rts,
    )
    return _dense(choices, logits.shape[1], ep_group)


def top2gating(
    logits: Tensor,
    capacity_factor: float,
    min_capacity: int,
    drop_tokens: bool = True,
    ep_group: Any = None,
    top2_2nd_expert_sampling: bool = True,
) -> Gated:
    """Gate [tokens, experts] logits, two experts each; see `gating.choose_top2` and `top1gating`."""
    capacity = capacity_of(logits, capacity_factor * 2, min_capacity) if drop_tokens else None
    choices = choose_top2(logits, capacity, sample_second=top2_2nd_expert_sampling)
    return _dense(choices, logits.shape[1], ep_group)


def topkgating(
    logits: Tensor,
    k: int,
    capacity_factor: float,
    min_capacity: int,
    drop_tokens: bool = True,
    ep_group: Any = None,
    drop_policy: str = "probs",
) -> Gated:
    """Gate [tokens, experts] logits, k experts each; see `gating.choose_topk` and `top1gating`.

    Raises:
        ValueError: an unknown `drop_policy`, or a k that is not 1 to the number of experts.
    """
    if drop_policy not in ("probs", "position"):
        raise ValueError(f"topkgating: drop_policy is {drop_policy!r}; expected 'probs' or 'position'")
    _check_k(k, logits.shape[1])
    capacity = capacity_of(logits, capacity_factor * k, min_capacity) if drop_tokens else None
    return _dense(choose_topk(logits, k, capacity, drop_policy=drop_policy), logits.shape[1], ep_group)


def _check_k(k: int, num_experts: int) -> None:
    if not 1 <= k <= num_experts:
        raise ValueError(f"k is {k}; expected 1 to {num_experts}, the number of experts")


def _check_noise(policy: str | None) -> None:
    if policy not in NOISE:
        raise ValueError(f"noisy_gate_policy is {policy!r}; expected None, 'Jitter' or 'RSample'")


def _dense(choices: Choices, num_experts: int, ep_group: Any) -> Gated:
    """The choices as one-hot tensors; without dropping, of the largest capacity that a rank of the group needs."""
    rows = torch.tensor([choices.capacity], device=choices.kept.device)
    if not choices.dropped and ds_comm.is_initialized() and ds_comm.get_world_size(ep_group) > 1:
        ds_comm.all_reduce(rows, ds_comm.ReduceOp.MAX, group=ep_group, label="capacity of experts")
    tokens, which = torch.nonzero(choices.kept, as_tuple=True)
    at = (tokens, choices.experts[tokens, which], choices.places[tokens, which])
    combine = choices.weights.new_zeros(len(choices.kept), num_experts, int(rows))
    combine = combine.index_put(at, choices.weights[tokens, which])
    return choices.aux_loss, combine, combine.detach().bool(), choices.counts


# -- the gate and the layer -------------------------------------------------------------------------------------------


class _Router(nn.Linear):
    """Logits in fp32 from inputs and weights of any dtype."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float())


class TopKGate(nn.Module):
    """A linear router `wg` and the choice of k experts; arguments as `deepspeed.moe.layer.MoE`'s.

    Attributes `k`, `capacity_factor`, `eval_capacity_factor`, `min_capacity` and their kin may be changed at any time.
    """

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 8,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        ep_group: Any = None,
        top2_2nd_expert_sampling: bool = True,
    ) -> None:
        super().__init__()
        _check_k(k, num_experts)
        _check_noise(noisy_gate_policy)
        self.wg = _Router(model_dim, num_experts, bias=False)
        self.ep_group = ep_group
        self.k = k
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.min_capacity = min_capacity
        self.noisy_gate_policy = noisy_gate_policy
        self.drop_tokens = drop_tokens
        self.use_rts = use_rts
        self.top2_2nd_expert_sampling = top2_2nd_expert_sampling

    def _set_ep_group(self, ep_group: Any) -> None:
        """Remember the group whose ranks have a common capacity in the dense answer when nothing is dropped."""
        self.ep_group = ep_group

    def choose(self, input: Tensor, used_token: Tensor | None = None) -> Choices:
        """Route [tokens, hidden]; `used_token` [tokens] is 0 where a token takes no part (k = 1 only, else a warning).

        Random: "Jitter" and random token selection while training, "RSample" too; the second expert of k = 2 always.
        """
        noise = self.noisy_gate_policy if self.training else None
        logits: Tensor = self.wg(multiplicative_jitter(input.float()) if noise == "Jitter" else input)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        capacity = capacity_of(logits, factor * self.k, self.min_capacity) if self.drop_tokens else None
        if self.k == 1:
            return choose_top1(
                logits,
                capacity,
                used_token=used_token,
                noisy=noise == "RSample",
                random_selection=self.use_rts,
            )
        if used_token is not None:
            warning_once(f"used_token has no effect on a gate of k = {self.k}, as upstream; it is for k = 1")
        if self.k == 2:
            return choose_top2(logits, capacity, sample_second=self.top2_2nd_expert_sampling)
        return choose_topk(logits, self.k, capacity)

    def forward(self, input: Tensor, used_token: Tensor | None = None, use_tutel: bool = False) -> Gated:
        """The dense answer of the gating functions, for [tokens, hidden]."""
        return _dense(self.choose(input, used_token), self.wg.out_features, self.ep_group)


class MOELayer(nn.Module):
    """Dispatch to `experts` what `gate` says, and combine; sets `l_aux` and `exp_counts` at every forward.

    Args:
        gate: a `TopKGate`, or a module that gives the dense answer (`Gated`) for [tokens, hidden].
        experts: `Experts` with all experts of the layer, or a module of [1, num_experts, capacity, hidden].
        ep_group_name, ep_size, num_local_experts, use_tutel: kept for scripts that read them.
    """

    def __init__(
        self,
        gate: nn.Module,
        experts: nn.Module,
        ep_group_name: str,
        ep_size: int,
        num_local_experts: int,
        use_tutel: bool = False,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.ep_group: Any = None
        self.ep_size = ep_size
        self.ep_group_name = ep_group_name
        self.num_local_experts = num_local_experts
        self.use_tutel = use_tutel
        self.l_aux: Any = None
        self.exp_counts: Any = None

    def _set_ep_group(self, ep_group: Any) -> None:
        self.ep_group = ep_group
        if isinstance(self.gate, TopKGate):
            self.gate._set_ep_group(ep_group)

    def forward(self, *input: Any, **kwargs: Any) -> Tensor:
        """Of `hidden` [..., hidden size] and, optionally, `used_token`, the output of the same shape."""
        hidden, *rest = input
        tokens = hidden.reshape(-1, hidden.shape[-1])
        used = [None if one is None else one.reshape(-1) for one in rest[:1]]
        plain = isinstance(self.gate, TopKGate) and type(self.gate).forward is TopKGate.forward
        out = self._sparse(tokens, *used) if plain and isinstance(self.experts, Experts) else self._dense(tokens, *used)
        return out.reshape(hidden.shape)

    def _sparse(self, tokens: Tensor, used_token: Tensor | None = None) -> Tensor:
        assert isinstance(self.gate, TopKGate)  # forward has looked
        choices = self.gate.choose(tokens, used_token)
        self.l_aux, self.exp_counts = choices.aux_loss, choices.counts
        routing, sizes = _routing(choices)
        rows = ds_kernels.moe_dispatch(tokens, routing)
        return ds_kernels.moe_combine(self.experts(rows, sizes), routing)

    def _dense(self, tokens: Tensor, *used_token: Tensor | None) -> Tensor:
        self.l_aux, weights, mask, self.exp_counts = self.gate(tokens, *used_token)
        rows = torch.einsum("sec,sm->ecm", mask.to(tokens.dtype), tokens)
        out: Tensor = self.experts(rows.unsqueeze(0)).squeeze(0)
        return torch.einsum("sec,ecm->sm", weights.to(out.dtype), out)


def _routing(choices: Choices) -> tuple[ds_kernels.Routing, list[int]]:
    """The kept choices as rows sorted by expert, and how many each expert has (which waits for the device)."""
    num_experts = len(choices.counts)
    experts = torch.where(choices.kept, choices.experts, num_experts)
    sizes = torch.bincount(experts.reshape(-1), minlength=num_experts + 1)[:num_experts]
    ends = sizes.cumsum(0)
    starts = F.pad(ends - sizes, (0, 1))
    slots = torch.where(choices.kept, starts[experts] + choices.places, -1)
    numbers = sizes.tolist()
    sources = slots.new_empty(sum(numbers))
    kept = choices.kept.reshape(-1)
    sources[slots.reshape(-1)[kept]] = kept.nonzero()[:, 0]
    routing = ds_kernels.Routing(
        weights=choices.weights,
        experts=choices.experts,
        slots=slots,
        sources=sources,
        ends=ends.int(),
        counts=choices.counts,
        aux_loss=choices.aux_loss,
        z_loss=choices.aux_loss.new_zeros(()),
    )
    return routing, numbers
