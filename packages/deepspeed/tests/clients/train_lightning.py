"""Trains a small net through lightning: functions that test_lightning.py runs, on two ranks and without DeepSpeed.

lightning's strategies refuse every accelerator but CUDA, and number devices, which CPUs do not: the two subclasses here
leave out those two checks, nothing else.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning
import lightning.fabric.strategies.deepspeed as fabric_strategy
import lightning.pytorch.strategies.deepspeed as trainer_strategy
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import TorchElasticEnvironment

STEPS, BATCH = 4, 8
for module in (fabric_strategy, trainer_strategy):
    module._validate_device_index_selection = lambda devices: None  # type: ignore[attr-defined]


class ForFabric(fabric_strategy.DeepSpeedStrategy):
    def setup_environment(self) -> None:
        super(fabric_strategy.DeepSpeedStrategy, self).setup_environment()


class ForTrainer(trainer_strategy.DeepSpeedStrategy):
    def setup_environment(self) -> None:
        super(trainer_strategy.DeepSpeedStrategy, self).setup_environment()


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layers(x)
        return found

    def training_step(self, batch: Any, _index: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def make_data() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(4)
    count = STEPS * BATCH
    return torch.utils.data.TensorDataset(
        torch.randn(count, 8, generator=generator), torch.randint(3, (count,), generator=generator)
    )


def strategy(kind: type[Any], stage: int | None, ranks: int) -> Any:
    if stage is None:
        return "auto"
    config = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": BATCH // ranks,
    }
    return kind(config=config, process_group_backend="gloo", cluster_environment=TorchElasticEnvironment())


def through_fabric(out: Path, stage: int | None, ranks: int) -> dict[str, Any]:
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy(ForFabric, stage, ranks))
    fabric.launch()
    torch.manual_seed(3)
    model = Net()
    engine, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(make_data(), batch_size=BATCH // ranks))
    losses = []
    for step, (x, y) in enumerate(loader):
        loss = torch.nn.functional.cross_entropy(engine(x), y)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_reduce(loss.detach(), reduce_op="mean").item())
        if step == 1:
            fabric.save(out / "half", {"model": engine, "optimizer": optimizer, "step": step})
    state = {"model": engine, "optimizer": optimizer, "step": 0}
    fabric.load(out / "half", state)
    again = []
    for step, (x, y) in enumerate(loader):
        if step > state["step"]:
            loss = torch.nn.functional.cross_entropy(engine(x), y)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            again.append(fabric.all_reduce(loss.detach(), reduce_op="mean").item())
    return {"losses": losses, "again": again, "rank": fabric.global_rank, "engine": type(engine.module).__name__}


def through_trainer(out: Path, stage: int | None, ranks: int) -> dict[str, Any]:
    torch.manual_seed(3)
    model = Net()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy(ForTrainer, stage, ranks),
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    data = make_data()
    # The sampler that lightning would put in shuffles; this one keeps to the order of the run without DeepSpeed.
    order = torch.utils.data.DistributedSampler(data, ranks, int(os.environ.get("RANK", "0")), shuffle=False)
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=BATCH // ranks, sampler=order))
    trainer.save_checkpoint(out / "last.ckpt")
    mean = trainer.strategy.reduce(torch.tensor(model.losses), reduce_op="mean")
    return {"losses": mean.tolist(), "rank": trainer.global_rank, "engine": type(trainer.model).__name__}


def train(kind: str, out: Path, stage: int | None) -> dict[str, Any]:
    """With DeepSpeed on the ranks that are here, without it (`stage` is None) on this process alone."""
    ranks = 1 if stage is None else int(os.environ["WORLD_SIZE"])
    return {"fabric": through_fabric, "trainer": through_trainer}[kind](out, stage, ranks)
