"""engine.compile(): blocks without graph breaks, one compilation for all of them, the numbers of an uncompiled run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pipelines
import pytest
import test_tensor_parallel
import torch
from engines import WIDTH, Block, Net, make_config, make_engine, make_net, micro_batch, same, train, weights
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor.exc import InductorError
from torch.utils.checkpoint import checkpoint

import deepspeed
from deepspeed.errors import DeepSpeedConfigError
from ds_comm.testing import run_ranks


class Counting:
    """A backend that counts what it is given to compile."""

    def __init__(self, name: str) -> None:
        self.backend = lookup_backend(name)
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        compiled: Callable[..., Any] = self.backend(graph, inputs)
        return compiled


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Checkpointed(Block):
    """Recomputes its inside, as models do by themselves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return out


class Tied(Net):
    """Blocks that share a weight, one that is frozen, dropout, and inputs of blocks that all require a gradient."""

    def __init__(self, kind: type[Block] = Block) -> None:
        super().__init__(dropout=0.2, depth=4)
        self.blocks = nn.ModuleList(kind(0.2) for _ in range(4))
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks[2].up.weight = self.blocks[0].up.weight
        self.blocks[1].down.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(self.embed(x), target)


def tied(kind: type[Block] = Block) -> Tied:
    torch.manual_seed(7)
    return Tied(kind)


def trained(stage: int, backend: Any, dtype: str = "fp32", kind: type[Block] = Block) -> tuple[list[float], Any, Any]:
    """Losses, weights and engine after three steps of two micro-batches."""
    model = tied(kind)
    config = make_config(stage, dtype, gradient_accumulation_steps=2)
    engine = make_engine(config, model, model_parameters=[p for p in model.parameters() if p.requires_grad])
    if backend is not None:
        engine.compile(backend=backend, compile_kwargs={"fullgraph": True})
    torch.manual_seed(3)
    return train(engine, range(3)), weights(engine), engine


@pytest.mark.parametrize("kind", [Block, Checkpointed])
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp16"), (3, "fp32"), (3, "bf16")])
def test_compiled_blocks_give_the_same_bits_from_one_compilation(stage: int, dtype: str, kind: type[Block]) -> None:
    losses, expected, _ = trained(stage, None, dtype, kind)
    backend = Counting("aot_eager")
    found, values, engine = trained(stage, backend, dtype, kind)
    assert found == losses
    assert same(values, expected)
    # Frozen and tied parameters are inputs of another kind, so blocks 1 and 2 may each have a graph of their own.
    assert 1 <= backend.graphs <= 3
    assert engine.is_compiled
    assert engine.get_compile_time() > 0


def test_four_equal_blocks_compile_once_and_a_second_engine_not_at_all() -> None:
    backend = Counting("eager")
    for _ in range(2):
        model = Net(depth=4)
        model.blocks.insert(0, Block(0.0))  # its input requires no gradient: one graph more
        engine = make_engine(make_config(3), model)
        engine.compile(backend=backend, compile_kwargs={"fullgraph": True})
        train(engine, range(2))
        assert backend.graphs == 2


def ranks(stage: int) -> tuple[bool, int, list[str]]:
    losses, expected, _ = trained(stage, None)
    backend = Counting("aot_eager")
    found, values, engine = trained(stage, backend)
    return found == losses and same(values, expected), backend.graphs, sorted(engine.module_state_dict())


@pytest.mark.parametrize("stage", [2, 3])
def test_on_two_ranks(stage: int) -> None:
    names = sorted(tied().state_dict())
    for equal, graphs, found in run_ranks(ranks, 2, stage, timeout=300):
        assert equal
        assert graphs <= 3
        assert found == names


def pipelined(stage: int, schedule: str, compiles: bool) -> tuple[pipelines.Trained, int]:
    config = pipelines.make_config(stage, "fp32", 4, pipeline={"schedule": schedule})
    engine = pipelines.make_pipeline("tied", config)
    backend = Counting("aot_eager")
    if compiles:
        engine.compile(backend=backend, compile_kwargs={"fullgraph": True})
    source = pipelines.data(0, range(3), 4)
    losses, norms = [], []
    for _ in range(3):
        losses.append(engine.train_batch(source).item())
        norms.append(engine.get_global_grad_norm())
    return (losses, norms, pipelines.weights_of(engine)), backend.graphs


@pytest.mark.parametrize(("stage", "schedule"), [(1, "gpipe"), (3, "1f1b")])
def test_a_pipeline(stage: int, schedule: str) -> None:
    expected = run_ranks(pipelined, 2, stage, schedule, False)
    for (plain, _), (found, graphs) in zip(expected, run_ranks(pipelined, 2, stage, schedule, True), strict=True):
        assert found[:2] == plain[:2]
        assert same(found[2], plain[2])
        assert 1 <= graphs <= 2


def tensor_parallel(policy: str | None, compiles: bool) -> list[float]:
    config = test_tensor_parallel.config(2, 1, activation_checkpointing={"policy": policy})
    engine = deepspeed.initialize(model=test_tensor_parallel.make(), config=config)[0]
    if compiles:
        engine.compile(backend="aot_eager")
    losses = test_tensor_parallel.train(engine, 0, 2)[0]
    engine.destroy()
    torch._dynamo.reset()
    return losses


def test_tensor_parallel_blocks_compile_between_their_collectives() -> None:
    expected = run_ranks(tensor_parallel, 2, None, False)
    for policy in (None, "selective"):
        assert run_ranks(tensor_parallel, 2, policy, True, timeout=300) == expected


def test_a_pipeline_that_splits_backwards_is_refused() -> None:
    engine = pipelines.make_pipeline("plain", pipelines.make_config(0, "fp32", 2, pipeline={"schedule": "zb_h1"}), 1)
    with pytest.raises(DeepSpeedConfigError, match="zb_h1"):
        engine.compile()
    engine.destroy()


def test_inductor_is_within_rounding() -> None:
    try:
        torch.compile(lambda x: x + 1)(torch.ones(3))
    except (torch._dynamo.exc.BackendCompilerFailed, InductorError) as error:
        pytest.skip(f"inductor needs a C++ compiler here: {error}")
    losses, expected, _ = trained(3, None)
    torch._inductor.config.fallback_random = True  # draw dropout as eager does
    try:
        found, values, _ = trained(3, "inductor")
    finally:
        torch._inductor.config.fallback_random = False
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-4, atol=1e-5)


def test_evaluation_copies_checkpoints_and_destroy_after_compiling(tmp_path: Path) -> None:
    engine = make_engine(make_config(3))
    names = list(engine.module.state_dict())
    engine.compile(backend="eager", compile_kwargs={"fullgraph": True})
    train(engine, range(2))
    engine.eval()
    with torch.no_grad():
        loss = engine(*micro_batch(9, 0))
    engine.save_checkpoint(tmp_path)
    assert list(engine.module.state_dict()) == names
    assert list(dict(engine.module.named_modules())) == list(dict(make_net().named_modules()))
    other = make_engine(make_config(2), make_net(depth=2))
    other.load_checkpoint(tmp_path)
    other.eval()
    with torch.no_grad():
        assert torch.equal(other(*micro_batch(9, 0)), loss)
    engine.destroy()
    assert all("forward" not in module.__dict__ for module in engine.module.modules())


def test_a_copy_of_a_compiled_block_is_an_ordinary_one() -> None:
    engine = make_engine(make_config(1))
    backend = Counting("eager")
    engine.compile(backend=backend)
    block, x = engine.module.blocks[0], torch.ones(2, WIDTH)
    clone = copy.deepcopy(block)
    assert torch.equal(clone(x), Block.forward(block, x))
    assert clone.forward.__self__ is clone
    assert backend.graphs == 0
    block(x)
    assert backend.graphs == 1


class Cached(nn.Module):
    """Blocks that are given an object to change, as caches of keys and values are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CachedBlock() for _ in range(2))

    def forward(self, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, cache=cache)
        return x.sum()


class CachedBlock(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
        if cache is not None:
            cache.seen.append(x.shape)
        return super().forward(x)


class Cache:
    def __init__(self) -> None:
        self.seen: list[Any] = []


def test_a_call_that_is_given_a_cache_runs_uncompiled_and_says_so_when_it_trains(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make_engine(make_config(2), Cached())
    backend = Counting("eager")
    engine.compile(backend=backend)
    logging.getLogger("DeepSpeed").addHandler(caplog.handler)
    try:
        with torch.no_grad():
            cache = Cache()
            engine(torch.ones(2, 4), cache=cache)
            assert len(cache.seen) == 2
            assert "is given a Cache" not in caplog.text
        engine(torch.ones(2, 4), cache=Cache())
        assert "is given a Cache" in caplog.text
    finally:
        logging.getLogger("DeepSpeed").removeHandler(caplog.handler)
    assert backend.graphs == 0
    engine(torch.ones(2, 4))
    assert backend.graphs > 0


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 3), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (self.last(self.first(x).relu()) - target).square().mean()


def test_a_model_without_blocks_is_compiled_whole_below_stage_3(caplog: pytest.LogCaptureFixture) -> None:
    expected = train(make_engine(make_config(2), copy.deepcopy(flat := Flat())), range(3))
    engine = make_engine(make_config(2), copy.deepcopy(flat))
    backend = Counting("aot_eager")
    engine.compile(backend=backend, compile_kwargs={"fullgraph": True})
    assert train(engine, range(3)) == expected
    assert backend.graphs == 1
    assert engine.compiled.names == ("",)
    engine = make_engine(make_config(3), copy.deepcopy(flat))
    logging.getLogger("DeepSpeed").addHandler(caplog.handler)
    try:
        engine.compile(backend=backend)
    finally:
        logging.getLogger("DeepSpeed").removeHandler(caplog.handler)
    assert "Flat has no repeated blocks" in caplog.text
    assert train(engine, range(3)) == expected
    assert backend.graphs == 1


def test_compiling_again_replaces_the_backend() -> None:
    engine = make_engine(make_config(1))
    first, second = Counting("eager"), Counting("eager")
    engine.compile(backend=first)
    engine.compile(backend=second)
    train(engine, range(1))
    assert (first.graphs, second.graphs > 0) == (0, True)


def test_what_is_refused_says_what_to_do() -> None:
    engine = make_engine(make_config(1))
    assert not engine.is_compiled
    assert engine.get_compile_time() == 0.0
    with pytest.raises(DeepSpeedConfigError, match=r"engine.compile\(backend=\.\.\.\)"):
        engine.compile(compile_kwargs={"backend": "eager"})
    with pytest.raises(DeepSpeedConfigError, match="schedule"):
        engine.compile(schedule=[(0, ["zero3_compile"])])
    with pytest.raises(DeepSpeedConfigError, match="compiled_autograd_enabled"):
        engine.compile(compiled_autograd_enabled=True)
    with pytest.raises(DeepSpeedConfigError, match=r"'inductr'.*inductor"):
        engine.compile(backend="inductr")
    with pytest.raises(DeepSpeedConfigError, match=r"register_compile_pass.*backend="):
        engine.register_compile_pass("mine", lambda graph: graph)
    assert not engine.is_compiled
    engine.compile(backend="eager")
    with pytest.raises(DeepSpeedConfigError, match="inductr"):
        engine.compile(backend="inductr")
    assert not engine.is_compiled  # the blocks run as they are, and the engine says so
    assert deepspeed.runtime.compiler.is_compile_supported()
