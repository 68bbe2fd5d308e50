"""`MoE`: a layer of experts, with upstream's arguments, attributes and names of parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from deepspeed.moe.experts import Experts, copies_of
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from deepspeed.utils import groups
from deepspeed.utils.logging import log_dist_once

__all__ = ["MoE"]


class MoE(nn.Module):
    """Send each token through k of `num_experts` copies of a module.

    Args:
        hidden_size: of the tokens.
        expert: a module from [..., hidden_size] to the same shape, such as a transformer's MLP; may return a tuple
            whose first element is the output. It is copied, not used.
        num_experts: in all. ep_size: ranks that share the experts; divides `num_experts`. A layout: the numbers do
            not depend on it, and ZeRO shards the experts' weights (see `deepspeed.moe`).
        k: experts per token.
        capacity_factor, eval_capacity_factor, min_capacity: of each expert, per k tokens / num_experts.
        use_residual: add a copy of `expert` that sees every token, mixed by a learned coefficient (PR-MoE;
            Rajbhandari et al. 2022, arXiv:2201.05596).
        noisy_gate_policy: None, "Jitter" (inputs of the router times 1 +- 0.01) or "RSample" (k = 1: choose by logits
            with Gumbel noise); while training.
        drop_tokens: False: experts take every token, whatever their capacity.
        use_rts: k = 1: a full expert keeps random tokens instead of the earlier ones.
        use_tutel, enable_expert_tensor_parallelism: no effect.
        top2_2nd_expert_sampling: k = 2: sample the second expert instead of taking the next best.
    Raises:
        ValueError: `ep_size` does not divide `num_experts`, an unknown policy, k out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
    ) -> None:
        super().__init__()
        if ep_size < 1 or num_experts % ep_size:
            raise ValueError(
                f"num_experts {num_experts} is not a multiple of ep_size {ep_size}; change one, so that every rank of"
                " an expert-parallel group has as many experts"
            )
        self.use_residual = use_residual
        self.enable_expert_tensor_parallelism = enable_expert_tensor_parallelism
        self.ep_size = ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        self.num_experts = num_experts
        self.num_local_experts = num_experts
        gate = TopKGate(
            hidden_size,
            num_experts,
            k,
            capacity_factor,
            eval_capacity_factor,
            min_capacity,
            noisy_gate_policy,
            drop_tokens,
            use_rts,
            None,
            top2_2nd_expert_sampling,
        )
        experts = Experts(expert, num_experts, self.expert_group_name)
        self.deepspeed_moe = MOELayer(gate, experts, self.expert_group_name, ep_size, num_experts, use_tutel)
        if use_residual:
            [self.mlp] = copies_of(expert, 1)
            self.coefficient = nn.Linear(hidden_size, 2)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Make the process groups of `ep_size`; `deepspeed.initialize` calls it. Collective on first use of a size.

        Raises:
            ValueError: `ep_size` does not divide the data-parallel ranks.
        """
        if self.ep_size > 1:
            if self.expert_group_name not in groups._get_expert_parallel_group_dict():
                groups._create_expert_and_data_parallel(
                    self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
                )
            log_dist_once(
                f"ep_size {self.ep_size}: every rank computes its own tokens with all {self.num_experts} experts, whose"
                " weights are sharded by ZeRO; the numbers are those of expert parallelism",
                ranks=[0],
            )
        self.deepspeed_moe._set_ep_group(groups._get_expert_parallel_group(self.expert_group_name))

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Of [..., hidden_size], (output, auxiliary loss, choices of each expert [num_experts]).

        `used_token`, of the shape before the last dimension, is 0 where a token takes no part (k = 1).
        """
        output = self.deepspeed_moe(hidden_states, used_token)
        if self.use_residual:
            dense: Any = self.mlp(hidden_states)
            dense = dense[0] if isinstance(dense, tuple) else dense
            share = F.softmax(self.coefficient(hidden_states), dim=-1)
            output = output * share[..., 0:1] + dense * share[..., 1:]
        return output, self.deepspeed_moe.l_aux, self.deepspeed_moe.exp_counts
