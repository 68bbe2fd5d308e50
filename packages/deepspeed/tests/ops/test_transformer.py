"""The BERT-style training layer under each of its upstream names, and trained by the engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import deepspeed
import deepspeed.ops
import deepspeed.ops.transformer.transformer as module


def test_one_class_under_all_names() -> None:
    assert deepspeed.DeepSpeedTransformerLayer is module.DeepSpeedTransformerLayer
    assert deepspeed.DeepSpeedTransformerConfig is module.DeepSpeedTransformerConfig
    assert deepspeed.ops.DeepSpeedTransformerLayer is deepspeed.ops.transformer.DeepSpeedTransformerLayer
    assert deepspeed.ops.DeepSpeedTransformerConfig is module.DeepSpeedTransformerConfig


class Model(nn.Module):
    """Two layers and a mean: a loss to train."""

    def __init__(self) -> None:
        super().__init__()
        config = deepspeed.DeepSpeedTransformerConfig(
            batch_size=2, hidden_size=16, heads=2, intermediate_size=32, num_hidden_layers=2, initializer_range=0.1
        )
        self.layers = nn.ModuleList(deepspeed.DeepSpeedTransformerLayer(config) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def test_trains_in_the_engine() -> None:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": 3},
    }
    model = Model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    x, losses = torch.randn(2, 5, 16), []
    for _ in range(5):
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
