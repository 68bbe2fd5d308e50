"""Mixture of experts: layers whose tokens each go through a few of many expert modules.

    layer.MoE           the layer, as upstream's
    sharded_moe         gating functions, the gate, the dispatching layer
    gating              the mathematics of gating, on tensors alone
    experts, mappings   the experts' modules; tokens over tensor-parallel ranks
    utils               parameter groups

Expert parallelism is a layout: every rank routes its own tokens by its own capacity and sends them through all experts,
whose weights ZeRO shards like any others. Gradients, capacities and losses are those of `ep_size` ranks that exchange
tokens instead; see docs/moe.md.
"""
