"""zero.Init and GatheredParameters: models that no rank could build whole, and how to look inside them.

Quick run: torchrun --standalone --nproc-per-node 2 examples/ds_zero_init.py

Under `Init` every parameter is cut over the ranks as soon as its module is built. Outside of forward and backward it
is empty on every rank; `GatheredParameters` makes it whole for as long as the context lasts.
"""

from __future__ import annotations

import torch
from torch import nn

import ds_comm
import ds_zero


def main() -> None:
    ds_comm.init_distributed()
    first = ds_comm.get_rank() == 0
    config = ds_zero.ZeroConfig(stage=3, dtype="bf16", param_persistence_threshold=0)

    torch.manual_seed(ds_comm.get_rank())  # ranks may draw different numbers: rank 0's values are the ones that count
    with ds_zero.Init(config=config):
        model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
    assert model[0].weight.numel() == 0

    # Whole on every rank inside; what rank 0 writes is kept, because modifier_rank says so.
    with ds_zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        assert model[0].weight.shape == (1024, 256)
        if first:
            nn.init.xavier_uniform_(model[0].weight)
            nn.init.zeros_(model[2].bias)
    assert model[0].weight.numel() == 0

    # Writing without saying who is kept would be lost silently; here it is an error.
    try:
        with ds_zero.GatheredParameters(model[2].bias), torch.no_grad():
            model[2].bias.add_(1.0)
    except ds_zero.ZeroStateError as error:
        if first:
            print(f"ZeroStateError: {error}")

    model, optimizer = ds_zero.shard(model, torch.optim.AdamW(model.parameters(), lr=1e-3), config=config)
    for _ in range(3):
        x = torch.randn(16, 256, dtype=torch.bfloat16)
        loss = (model(x) - x).float().square().mean()
        optimizer.backward(loss)
        optimizer.step()

    # The fp32 master of one parameter, put together from the ranks' shards, and this rank's part of it.
    weight = model[0].weight
    master = ds_zero.safe_get_full_fp32_param(weight)
    moment = ds_zero.safe_get_full_optimizer_state(weight, "exp_avg")
    part = ds_zero.safe_get_local_fp32_param(weight)
    assert master is not None and moment is not None and master.shape == (1024, 256)
    with ds_zero.GatheredParameters(weight):
        assert torch.equal(weight, master.to(torch.bfloat16))  # 16-bit parameters are the cast of their fp32 masters
    if first:
        held = 0 if part is None else part.numel()
        print(f"loss {loss.item():.3f}; of the first weight's {master.numel():,} elements this rank holds {held:,}")
    optimizer.close()
    ds_comm.destroy_process_group()


if __name__ == "__main__":
    main()
