"""`deepspeed.initialize`: every way to say what to train, and every wrong one."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import Any
from unittest import mock

import engines
import pytest
import torch
from engines import make_config, make_engine, make_net, train, weights
from torch import nn

import deepspeed
import ds_comm
import ds_zero
from ds_comm.testing import run_ranks

# -- the four-tuple ---------------------------------------------------------------------------------------------------


def as_dict(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {"config": config}


def as_path(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "ds.json").write_text(json.dumps(config))
    return {"config": str(folder / "ds.json")}


def as_pathlib(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "ds.json").write_text(json.dumps(config))
    return {"config": folder / "ds.json"}


def as_args(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "ds.json").write_text(json.dumps(config))
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    return {"args": parser.parse_args(["--deepspeed", "--deepspeed_config", str(folder / "ds.json")])}


def as_config_params(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {"config_params": config}


@pytest.mark.parametrize("form", [as_dict, as_path, as_pathlib, as_args, as_config_params])
def test_every_form_of_the_config_trains_alike(form: Any, tmp_path: Path) -> None:
    config = make_config(2, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 4}})
    model = make_net()
    engine, optimizer, loader, scheduler = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), **form(config, tmp_path)
    )
    assert type(engine) is deepspeed.DeepSpeedEngine
    assert isinstance(optimizer, deepspeed.DeepSpeedOptimizer)
    assert optimizer is engine.optimizer and loader is None
    assert type(scheduler).__name__ == "WarmupLR"
    reference = make_engine(config)
    train(engine, range(3))
    train(reference, range(3))
    assert engines.same(weights(engine), weights(reference))


def test_the_optimizer_may_be_an_object_a_function_or_a_section() -> None:
    config = make_config(1)
    section = config.pop("optimizer")
    results = []
    for kind in ("section", "object", "function"):
        model = make_net()
        kwargs: dict[str, Any] = {"config": config}
        if kind == "section":
            kwargs = {"config": {**config, "optimizer": section}, "model_parameters": model.parameters()}
        elif kind == "object":
            kwargs["optimizer"] = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
        else:
            kwargs["optimizer"] = lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.01)
            kwargs["model_parameters"] = model.parameters()
        engine, *_ = deepspeed.initialize(model=model, **kwargs)
        assert engine.basic_optimizer is engine.optimizer.optimizer
        train(engine, range(2))
        results.append(weights(engine))
    assert engines.same(results[0], results[1]) and engines.same(results[0], results[2])


def test_the_scheduler_may_be_an_object_or_a_function_of_the_basic_optimizer() -> None:
    seen = []

    def make(optimizer: torch.optim.Optimizer) -> Any:
        seen.append(optimizer)
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    model = make_net()
    basic = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_, scheduler = deepspeed.initialize(model=model, optimizer=basic, lr_scheduler=make, config=make_config(0))
    assert seen == [basic] and scheduler is engine.lr_scheduler
    train(engine, range(2))
    assert engine.get_lr() == [0.25] == scheduler.get_last_lr()

    model = make_net()
    basic = torch.optim.SGD(model.parameters(), lr=1.0)
    made = torch.optim.lr_scheduler.StepLR(basic, 1, gamma=0.1)
    engine, *_, scheduler = deepspeed.initialize(model=model, optimizer=basic, lr_scheduler=made, config=make_config(0))
    assert scheduler is made
    train(engine, range(1))
    assert engine.get_lr() == pytest.approx([0.1])


def test_model_parameters_may_be_a_one_shot_iterator() -> None:
    model = make_net()
    model.head.weight.requires_grad = False
    engine = make_engine(make_config(2), model, model_parameters=filter(lambda p: p.requires_grad, model.parameters()))
    before = weights(engine)
    train(engine, range(1))
    after = weights(engine)
    assert torch.equal(before["head.weight"], after["head.weight"])
    assert not torch.equal(before["head.bias"], after["head.bias"])


def test_model_parameters_may_be_groups() -> None:
    model = make_net()
    groups = [{"params": list(model.blocks.parameters())}, {"params": list(model.head.parameters()), "lr": 0.5}]
    engine = make_engine(make_config(1), model, model_parameters=groups)
    assert engine.get_lr() == [1e-2, 0.5]
    assert engine.get_mom() == [(0.9, 0.999)] * 2


def test_without_an_optimizer_stage_3_runs_forward_only() -> None:
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    engine, optimizer, _, _ = deepspeed.initialize(model=make_net(), model_parameters=[], config=config)
    assert isinstance(optimizer, deepspeed.zero.DeepSpeedZeRoOffload)
    engine.eval()
    with torch.no_grad():
        loss = engine(*engines.micro_batch(0, 0))
    assert loss.item() == make_net().eval()(*engines.micro_batch(0, 0)).item()
    with pytest.raises(RuntimeError, match="needs an optimizer"):
        engine.backward(loss)


def test_without_an_optimizer_stage_0_has_none() -> None:
    engine, optimizer, _, scheduler = deepspeed.initialize(
        model=make_net(), config={"train_micro_batch_size_per_gpu": 1, "scheduler": {"type": "WarmupLR"}}
    )
    assert optimizer is None and scheduler is None and engine.get_lr() == []


def test_training_data_becomes_a_loader() -> None:
    data = [(x, y) for step in range(4) for x, y in zip(*engines.micro_batch(step, 0), strict=True)]
    model = make_net()
    engine, _, loader, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), training_data=data, config=make_config(0)
    )
    assert len(loader) == 4 and loader is engine.training_dataloader
    for x, y in loader:
        assert x.shape == (2, engines.WIDTH)
        engine.backward(engine(x, y))
        engine.step()
    assert engine.global_steps == 4 and engine.global_samples == 8


def test_device_rank_none_is_accepted() -> None:
    model = make_net()
    args = argparse.Namespace(device_rank=None)
    engine, *_ = deepspeed.initialize(
        args, model, model_parameters=model.parameters(), config=make_config(), dist_init_required=False
    )
    assert engine.device == torch.device("cpu")


def init_and_train(stage: int, sharded: bool) -> tuple[dict[str, torch.Tensor], int]:
    config = make_config(stage)
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=sharded):
        model = make_net()
    resident = sum(p.numel() for p in model.parameters())
    engine = make_engine(config, model)
    train(engine, range(2))
    return weights(engine), resident


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_model_built_in_shards_trains_like_any_other(stage: int) -> None:
    (whole, full), _ = run_ranks(init_and_train, 2, stage, False)
    for state, resident in run_ranks(init_and_train, 2, stage, True):
        assert engines.same(state, whole) and resident < full


def test_two_engines_live_side_by_side() -> None:
    one, two = make_engine(make_config(3)), make_engine(make_config(1))
    for step in range(2):
        train(one, [step])
        train(two, [step])
    assert engines.same(weights(one), weights(two))


# -- what clients look at ---------------------------------------------------------------------------------------------


def test_config_is_the_dict_that_was_given() -> None:
    config = make_config(2)
    assert make_engine(config).config is config


def test_module_is_the_model_and_lends_its_attributes() -> None:
    model = make_net()
    engine = make_engine(make_config(3), model)
    assert engine.module is model
    assert engine.greet() == "plain net" and engine.flavour == "plain" and engine.blocks is model.blocks
    assert engine in list(engine.modules())
    with pytest.raises(AttributeError, match="nothing_such"):
        engine.nothing_such


def test_mocks_of_the_engine_have_its_surface() -> None:
    fake = mock.Mock(spec=deepspeed.DeepSpeedEngine, optimizer=None)
    fake.save_checkpoint("x")
    fake.load_checkpoint("x")
    with pytest.raises(AttributeError):
        fake.no_such_method()
    spec = mock.create_autospec(deepspeed.DeepSpeedEngine)
    assert callable(spec.step) and callable(spec.backward) and callable(spec.modules)
    mock.create_autospec(deepspeed.init_distributed)("gloo", distributed_port=1, timeout=None)
    with pytest.raises(TypeError):
        mock.create_autospec(deepspeed.init_distributed)(no_such_argument=1)


def test_signatures_that_clients_inspect() -> None:
    save = list(inspect.signature(deepspeed.DeepSpeedEngine.save_checkpoint).parameters)
    assert save == ["self", "save_dir", "tag", "client_state", "save_latest", "exclude_frozen_parameters"]
    load = list(inspect.signature(deepspeed.DeepSpeedEngine.load_checkpoint).parameters)
    assert load[:9] == [
        "self",
        "load_dir",
        "tag",
        "load_module_strict",
        "load_optimizer_states",
        "load_lr_scheduler_states",
        "load_module_only",
        "custom_load_fn",
        "allow_pickle",
    ]
    names = list(inspect.signature(deepspeed.initialize).parameters)
    assert names == [
        "args", "model", "optimizer", "model_parameters", "training_data", "lr_scheduler", "distributed_port", "mpu",
        "dist_init_required", "collate_fn", "config", "mesh_param", "config_params",
    ]  # fmt: skip


def test_the_engine_can_be_patched_where_it_is_looked_up() -> None:
    with mock.patch("deepspeed.initialize") as initialize, mock.patch("deepspeed.zero.Init") as init:
        deepspeed.initialize(model=1)
        deepspeed.zero.Init()
    initialize.assert_called_once_with(model=1)
    init.assert_called_once_with()


def test_mpu_gives_the_data_parallel_group() -> None:
    ds_comm.init_distributed()
    mpu = mock.Mock(spec=["get_data_parallel_group", "get_model_parallel_world_size"])
    mpu.get_data_parallel_group.return_value = ds_comm.get_world_group()
    mpu.get_model_parallel_world_size.return_value = 1
    try:
        engine = make_engine(make_config(2), mpu=mpu)
        assert engine.dp_world_size == 1 and engine.mp_world_size == 1 and engine.mpu is mpu
    finally:
        deepspeed.utils.groups.mpu = None


# -- bad input --------------------------------------------------------------------------------------------------------


def test_no_model() -> None:
    with pytest.raises(ValueError, match="needs a model"):
        deepspeed.initialize(config=make_config())


def test_no_config() -> None:
    with pytest.raises(ValueError, match="config"):
        deepspeed.initialize(model=make_net())


def test_parameters_that_are_not_in_the_model() -> None:
    with pytest.raises(ds_zero.LayoutError, match="not in the model"):
        make_engine(make_config(2), model_parameters=nn.Linear(3, 3).parameters())


@pytest.mark.parametrize("stage", [1, 2])
def test_no_optimizer_to_shard(stage: int) -> None:
    config = make_config(stage)
    del config["optimizer"]
    with pytest.raises(ValueError, match=f"stage {stage} shards the optimizer, and there is none"):
        make_engine(config)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"zero_optimization": {"stage": 4}}, "stage"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "did you mean overlap_comm"),
        ({"gradient_clippin": 1.0}, "gradient_clipping"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "bf16"),
        ({"train_batch_size": 7}, "(?s)Check batch related parameters.*7"),
        ({"optimizer": {"type": "AdamWW", "params": {}}}, "AdamWW"),
        ({"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}}, "learning_rate"),
        ({"scheduler": {"type": "WarmUp", "params": {}}}, "WarmUp"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warm_steps": 1}}}, "warm_steps"),
    ],
)
def test_bad_values_are_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_engine(make_config(2, **change))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "there is no file"),
        ("", "empty"),
        ("not json", "JSON"),
        ('{"steps_per_print": 1, "steps_per_print": 2}', "(?i)duplicate|twice"),
    ],
)
def test_bad_config_files_are_named(content: str | None, text: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=text) as caught:
        make_engine(str(path))  # type: ignore[arg-type]
    assert "ds.json" in str(caught.value)


def test_an_optimizer_that_is_none() -> None:
    with pytest.raises(ValueError, match="optimizer is a str"):
        make_engine(make_config(0), optimizer="adam")


def test_a_model_that_is_sharded_already_until_its_engine_is_destroyed() -> None:
    engine = make_engine(make_config(2))
    with pytest.raises(ds_zero.LayoutError, match="sharded already"):
        make_engine(make_config(2), engine.module)
    engine.destroy()
    engine.destroy()
    again = make_engine(make_config(3), engine.module)
    assert len(train(again, range(1))) == 1
    again.destroy()
    again.destroy()


# -- what clients do to the objects -----------------------------------------------------------------------------------


def test_zero_is_a_module_and_an_attribute_alike() -> None:
    import importlib

    module = importlib.import_module("deepspeed.zero")
    assert module is deepspeed.zero is deepspeed.runtime.zero
    assert module.Init is deepspeed.zero.Init


class Delegate:
    """Wraps an optimizer as lightning's Fabric does: a class of its own that derives from the optimizer's."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type("DelegateOf" + type(optimizer).__name__, (Delegate, type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_optimizer"], name)

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)


def test_a_wrapper_of_a_dynamic_subclass_works() -> None:
    engine, reference = make_engine(make_config(3)), make_engine(make_config(3))
    wrapped = Delegate(engine.optimizer)
    assert isinstance(wrapped, deepspeed.DeepSpeedOptimizer) and isinstance(wrapped, torch.optim.Optimizer)
    for step in range(2):
        engine.backward(engine(*engines.micro_batch(step, 0)))
        wrapped.step()
        wrapped.zero_grad()
    train(reference, range(2))
    assert engines.same(weights(engine), weights(reference))
    assert set(vars(wrapped)) == {"_optimizer"}
    assert wrapped.state_dict()["zero_stage"] == 3
