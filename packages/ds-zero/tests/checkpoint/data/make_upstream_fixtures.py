"""Makes upstream_*.tar.xz: checkpoints written by upstream DeepSpeed 0.19.8 (used as a black box) and the true values.

Run in a venv with deepspeed==0.19.8, safetensors and torch (two CPU ranks, gloo):

    torchrun --nproc-per-node 2 make_upstream_fixtures.py OUT STAGE DTYPE
    cd OUT && tar -cJf upstream_STAGE_DTYPE.tar.xz latest step3 truth.safetensors

OUT then holds `latest`, `step3/*.pt` and `truth.safetensors`: per parameter the fp32 master, and at stage 3 also
exp_avg and exp_avg_sq, as upstream's own accessors return them after three steps.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from safetensors.torch import save_file

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state


class Tiny(torch.nn.Module):
    """Odd sizes, a tied weight (head = embedding), a frozen layer, a buffer, parameters in two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 7)
        self.norm = torch.nn.LayerNorm(7)
        self.frozen = torch.nn.Linear(7, 7)
        self.inner = torch.nn.Linear(7, 13)
        self.outer = torch.nn.Linear(13, 7, bias=False)
        self.head = torch.nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([0.5, 2.0, 3.25]))
        self.frozen.requires_grad_(False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.embed(ids))
        hidden = hidden + self.outer(torch.tanh(self.inner(self.frozen(hidden))))
        return torch.nn.functional.cross_entropy(self.head(hidden).float().flatten(0, 1), labels.flatten())


def main() -> None:
    out, stage, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    deepspeed.init_distributed("gloo")
    torch.manual_seed(11)
    model = Tiny()
    decay = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 5e-3}]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95]}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    rank = torch.distributed.get_rank()
    for step in range(3):
        generator = torch.Generator().manual_seed(100 * step + rank)
        ids = torch.randint(0, 11, (2, 5), generator=generator)
        loss = engine(ids, ids.roll(-1, 1))
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(out, tag="step3", client_state={"note": "tiny", "numbers": [1, 2, 3]})
    truth: dict[str, torch.Tensor] = {}
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            with deepspeed.zero.GatheredParameters([param]):
                truth[f"param/{name}"] = param.detach().clone().contiguous()
            continue
        truth[f"master/{name}"] = safe_get_full_fp32_param(param).clone()
        for key in ("exp_avg", "exp_avg_sq") if stage == 3 else ():  # below 3 the accessor raises on two ranks
            truth[f"{key}/{name}"] = safe_get_full_optimizer_state(param, key).clone()
    if rank == 0:
        names = {"0": [], "1": []}
        for name, param in engine.module.named_parameters():
            if param.requires_grad:
                names["0" if len(getattr(param, "ds_shape", param.shape)) > 1 else "1"].append(name)
        meta = {
            "groups": json.dumps(names),
            "step": "3",
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
        }
        save_file(truth, os.path.join(out, "truth.safetensors"), metadata=meta)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
