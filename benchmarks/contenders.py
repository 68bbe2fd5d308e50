"""What is compared: one class per way to train, all with the same model, data, AdamW, clipping and precision.

Runs inside a rank (see `worker.py`), so nothing here may need anything but torch and what the contender is made of:
- `engine`: `deepspeed.initialize(...)`. This project and upstream share the very same lines; which of the two it is
  depends on the interpreter and `PYTHONPATH` alone. With bf16 the parameters are bf16 and the master copy is fp32.
- `fsdp2`: `fully_shard` per block and on the root. As users run it: parameters stay in fp32 (they are the master copy),
  `MixedPrecisionPolicy(param_dtype=bf16)`; gradients are reduced in bf16 too, the cheaper of its two choices.
- `ddp`: `DistributedDataParallel`, fp32.
- `compute`: forward and backward alone, no communication and no optimizer: the floor.
- `bare`: the loop a user would write for one rank: forward, backward, `clip_grad_norm_`, fused AdamW.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import models
import torch
from torch import Tensor, nn

CLIP = 1.0
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


class Contender:
    """One way to train: `build` once, then `step` per micro-batch. `times` collects seconds of named set-up phases."""

    can_checkpoint = False

    def __init__(self, spec: dict[str, Any], folder: Path) -> None:
        self.name: str = spec["model"]
        self.dtype: str = spec["dtype"]
        self.spec = spec
        self.folder = folder
        self.times: dict[str, float] = {}
        self.model: nn.Module

    def build(self) -> None:
        """Set up everything up to the first step."""
        self.model = models.load(self.name, self.folder, self.dtype)

    def loss(self, tokens: Tensor) -> Tensor:
        """The scalar loss of `tokens`, with its graph."""
        return models.loss_of(self.name, self.model(**models.arguments(self.name, tokens)))

    def step(self, tokens: Tensor) -> Tensor:
        """One optimizer step on one micro-batch; the detached loss."""
        raise TypeError(f"{type(self).__name__} has no step")

    def timed(self, phase: str, start: float) -> None:
        """Note the seconds since `start` as `phase`."""
        self.times[phase] = time.perf_counter() - start


class Engine(Contender):
    """`deepspeed.initialize`, whichever deepspeed this interpreter imports."""

    can_checkpoint = True

    def config(self) -> dict[str, Any]:
        """The JSON configuration: defaults, but for what the comparison fixes."""
        optimizer = {"type": "AdamW", "params": {**ADAMW, "betas": list(ADAMW["betas"])}}
        return {
            "train_micro_batch_size_per_gpu": models.SHAPES[self.name].batch,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": self.spec["stage"], **self.spec.get("zero", {})},
            "optimizer": optimizer,
            **({"bf16": {"enabled": True}} if self.dtype == "bf16" else {}),
            **self.spec.get("config", {}),
        }

    def build(self) -> None:
        import deepspeed

        start = time.perf_counter()
        deepspeed.init_distributed()
        self.timed("init_distributed_s", start)
        start = time.perf_counter()
        if not self.spec["random"]:
            model = models.load(self.name, self.folder, self.dtype)
        elif self.spec["stage"] == 3:
            with deepspeed.zero.Init(config_dict_or_path=self.config()):
                model = models.from_config(self.name, self.folder, self.dtype)
        else:
            model = models.from_config(self.name, self.folder, self.dtype)
        self.timed("build_s", start)
        start = time.perf_counter()
        self.model, *_ = deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), config=self.config()
        )
        self.timed("initialize_s", start)
        self.model.train()

    def step(self, tokens: Tensor) -> Tensor:
        engine: Any = self.model
        loss = self.loss(tokens)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    def save(self, folder: str, tag: str) -> None:
        """Write a checkpoint; returns when training may go on."""
        engine: Any = self.model
        engine.save_checkpoint(folder, tag=tag)

    def load(self, folder: str, tag: str) -> None:
        """Read a checkpoint back, optimizer state included."""
        engine: Any = self.model
        path, _ = engine.load_checkpoint(folder, tag=tag)
        if path is None:
            raise FileNotFoundError(f"{folder}/{tag}: the engine loaded nothing")


class Compute(Contender):
    """Forward and backward of one rank; the other ranks do the same at the same time."""

    def build(self) -> None:
        init_process_group()
        super().build()

    def step(self, tokens: Tensor) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        loss = self.loss(tokens)
        loss.backward()
        return loss.detach()


class Bare(Compute):
    """The plain PyTorch loop: what an engine is overhead over."""

    def build(self) -> None:
        super().build()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **ADAMW, fused=True)

    def step(self, tokens: Tensor) -> Tensor:
        loss = super().step(tokens)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss


class DDP(Bare):
    """`DistributedDataParallel` around the same loop."""

    def build(self) -> None:
        super().build()
        self.model = nn.parallel.DistributedDataParallel(self.model)


class FSDP2(Bare):
    """`fully_shard` per block and root; fp32 parameters are the master, compute and reduction in bf16."""

    def build(self) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        init_process_group()
        start = time.perf_counter()
        if self.spec["random"]:
            with torch.device("meta"):
                model = models.from_config(self.name, self.folder, "fp32")
        else:
            model = models.load(self.name, self.folder, "fp32")
        self.timed("build_s", start)
        start = time.perf_counter()
        reduce = models.DTYPES[self.spec.get("reduce_dtype", self.dtype)]
        policy = MixedPrecisionPolicy(param_dtype=models.DTYPES[self.dtype], reduce_dtype=reduce)
        mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for block in models.blocks(self.name, model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        if self.spec["random"]:
            model.to_empty(device="cpu")
            models.fill(self.name, model)
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, fused=True)
        self.timed("initialize_s", start)


KINDS: dict[str, type[Contender]] = {
    "engine": Engine,
    "fsdp2": FSDP2,
    "ddp": DDP,
    "compute": Compute,
    "bare": Bare,
}


def init_process_group() -> None:
    """The gloo world of this run, from the environment of a launcher."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
