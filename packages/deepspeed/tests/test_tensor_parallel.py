"""Training over tensor-parallel ranks: the losses, norms and weights of one rank, at every stage and with replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deepspeed
import ds_comm
from deepspeed.config import resolve
from deepspeed.errors import ConfigConflictError, DeepSpeedConfigError
from deepspeed.tensor_parallel import TensorParallelGrid, applied_to, requested
from ds_comm.testing import RankFailure, run_ranks
from ds_inference import ModelError

WORDS, WIDTH, HEADS, KEYS, LAYERS = 40, 24, 6, 2, 2


class Settings:
    """What a transformers configuration would say."""

    num_attention_heads, num_key_value_heads, vocab_size, model_type = HEADS, KEYS, WORDS, "llama"


class HeadNorm(nn.Module):
    """Over the features of each head, as Qwen3's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH // HEADS) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = HEADS, KEYS, WIDTH // HEADS
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, KEYS * self.head_dim)
        self.v_proj = nn.Linear(WIDTH, KEYS * self.head_dim)
        self.o_proj = nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = HeadNorm(), HeadNorm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q, k, v = self.q_norm(heads(self.q_proj(x))), self.k_norm(heads(self.k_proj(x))), heads(self.v_proj(x))
        repeats = self.num_heads // self.num_key_value_heads
        k, v = (y.repeat_interleave(repeats, 1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_norm, self.self_attn, self.post_norm = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(WIDTH, 2 * WIDTH), "down_proj": nn.Linear(2 * WIDTH, WIDTH)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_norm(x))
        return x + self.mlp["down_proj"](F.silu(self.mlp["up_proj"](self.post_norm(x))))


class Decoder(nn.Module):
    """A small causal language model with tied embeddings; `forward` gives the loss."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.config = Settings()
        self.embed_tokens = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        self.register_buffer("seen", torch.zeros(1))
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())


def make(tied: bool = True) -> Decoder:
    torch.manual_seed(11)
    return Decoder(tied)


def batch(step: int, index: int) -> torch.Tensor:
    return torch.randint(0, WORDS, (2, 9), generator=torch.Generator().manual_seed(100 * step + index))


def config(size: int, stage: int, steps: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.01}},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "tensor_parallel": {"autotp_size": size, "tensor_parallel": {"tp_grain_size": 1}},
        **changes,
    }


def train(engine: Any, first: int, last: int) -> tuple[list[float], list[float]]:
    """Losses (means over this step's micro-batches of all replicas) and norms."""
    losses, norms = [], []
    replicas, steps = engine.dp_world_size, engine.gradient_accumulation_steps()
    for step in range(first, last):
        total = 0.0
        for micro in range(steps):
            loss = engine(batch(step, micro * replicas + engine.get_data_parallel_rank()))
            engine.backward(loss)
            engine.step()
            total += float(loss.detach())
        mean = torch.tensor([total / steps])
        ds_comm.all_reduce(mean, group=engine.data_parallel_group)
        losses.append(float(mean) / replicas)
        norms.append(float(engine.get_global_grad_norm()))
    return losses, norms


def run(size: int, stage: int, steps: int, tied: bool, num_steps: int, options: dict[str, Any]) -> dict[str, Any]:
    model = make(tied)
    engine = deepspeed.initialize(model=model, config=config(size, stage, steps, **options))[0]
    losses, norms = train(engine, 0, num_steps)
    state = engine._consolidated_16bit_state_dict()
    return {"losses": losses, "norms": norms, "state": state, "tied": model.lm_head.weight is model.embed_tokens.weight}


def alike(got: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    for key in ("losses", "norms"):
        torch.testing.assert_close(torch.tensor(got[key]), torch.tensor(expected[key]), rtol=tolerance, atol=tolerance)
    for name, value in expected["state"].items():
        torch.testing.assert_close(got["state"][name], value, rtol=tolerance, atol=2 * tolerance, msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_twenty_steps_over_two_tensor_ranks_and_two_replicas(stage: int) -> None:
    expected = run_ranks(run, 1, 1, 0, 4, True, 20, {})[0]
    results = run_ranks(run, 4, 2, stage, 2, True, 20, {}, timeout=120)
    assert [result["state"] is None for result in results] == [False, True, True, True]
    assert all(result["losses"] == results[0]["losses"] for result in results)
    assert results[0]["tied"]
    assert results[0]["state"]["lm_head.weight"] is results[0]["state"]["embed_tokens.weight"]
    alike(results[0], expected)


@pytest.mark.parametrize(("size", "tied"), [(2, False), (3, True), (4, True)])
def test_twenty_steps_with_fewer_key_heads_than_ranks(size: int, tied: bool) -> None:
    expected = run_ranks(run, 1, 1, 0, 1, tied, 20, {})[0]
    alike(run_ranks(run, size, size, 1, 1, tied, 20, {}, timeout=120)[0], expected)


def test_bf16_trains_like_one_rank() -> None:
    options = {"bf16": {"enabled": True}}
    expected = run_ranks(run, 1, 1, 0, 1, True, 10, options)[0]
    got = run_ranks(run, 2, 2, 1, 1, True, 10, options)[0]
    torch.testing.assert_close(torch.tensor(got["losses"]), torch.tensor(expected["losses"]), rtol=0.02, atol=0.02)
    assert got["state"]["norm.weight"].dtype == torch.bfloat16


def copies_stay_equal() -> list[float]:
    """What several ranks hold is bit-identical on them after training."""
    engine = deepspeed.initialize(model=make(), config=config(4, 1))[0]
    train(engine, 0, 5)
    applied = applied_to(engine.module)
    assert applied is not None
    keys = engine.module.layers[0].self_attn.k_proj.weight
    assert keys.shape == (WIDTH // HEADS, WIDTH)
    return [float(keys.double().sum()), *(float(p.double().sum()) for p in engine.module.norm.parameters())]


def test_what_ranks_hold_in_common_stays_equal_to_the_bit() -> None:
    results = run_ranks(copies_stay_equal, 4)
    assert results[0][0] == results[1][0] and results[2][0] == results[3][0]
    assert all(result[1:] == results[0][1:] for result in results)


# -- ways to ask for it -----------------------------------------------------------------------------------------------


def by_record() -> list[float]:
    settings = config(2, 1)
    settings.pop("tensor_parallel")
    model = deepspeed.tp_model_init(make(), 2, torch.float32, settings)
    own = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    settings.pop("optimizer")
    engine = deepspeed.initialize(model=model, optimizer=own, config=settings)[0]
    assert engine.autotp_size() == 2
    return train(engine, 0, 4)[0]


def by_config() -> list[float]:
    return train(deepspeed.initialize(model=make(), config=config(2, 1))[0], 0, 4)[0]


def by_grid() -> list[float]:
    grid = TensorParallelGrid(2)
    engine = deepspeed.initialize(model=make(), config=config(2, 1), mpu=grid)[0]
    assert (engine.mp_world_size, engine.dp_world_size) == (2, 1)
    return train(engine, 0, 4)[0]


def by_group() -> list[float]:
    group = ds_comm.new_group([1, 0])
    model = deepspeed.tp_model_init(make(), 2, torch.float32, tp_group=group)
    return train(deepspeed.initialize(model=model, config=config(2, 1))[0], 0, 4)[0]


def test_recorded_configured_with_a_grid_or_with_a_group() -> None:
    results = [run_ranks(way, 2) for way in (by_record, by_config, by_grid, by_group)]
    assert all(result == results[0] for result in results)


def counting(total: int) -> tuple[int, int]:
    engine = deepspeed.initialize(model=make(), config=config(2, 0, 3, train_batch_size=total))[0]
    return engine.train_batch_size(), engine.gradient_accumulation_steps()


def test_a_batch_size_that_counts_every_rank_is_understood() -> None:
    assert run_ranks(counting, 4, 24) == [(12, 3)] * 4  # as transformers and accelerate count
    assert run_ranks(counting, 4, 12) == [(12, 3)] * 4
    with pytest.raises(RankFailure, match="train_batch_size is not equal"):
        run_ranks(counting, 4, 13)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def saves_and_resumes(folder: str, stage: int) -> None:
    engine = deepspeed.initialize(model=make(), config=config(2, stage))[0]
    train(engine, 0, 3)
    engine.save_checkpoint(folder, client_state={"note": 7})
    whole = engine._consolidated_16bit_state_dict()
    expected = train(engine, 3, 6)
    engine.save_16bit_model(folder, "model.safetensors")
    again = deepspeed.initialize(model=make(), config=config(2, stage))[0]
    path, state = again.load_checkpoint(folder)
    assert path is not None and state is not None and state["note"] == 7
    assert again.global_steps == 3
    assert train(again, 3, 6) == expected
    with pytest.raises(ds_comm.DivergenceError, match="tag of the checkpoint"):
        again.load_checkpoint(folder, tag=f"of rank {ds_comm.get_rank() % 2}")
    if ds_comm.get_rank() == 0:
        assert (Path(folder) / "latest").read_text() == "global_step3"
        assert whole is not None and whole["layers.0.self_attn.k_proj.weight"].shape == (8, WIDTH)


@pytest.mark.parametrize(("ranks", "stage"), [(2, 0), (4, 1), (4, 3)])
def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path, ranks: int, stage: int) -> None:
    run_ranks(saves_and_resumes, ranks, str(tmp_path), stage, timeout=120)
    from safetensors.torch import load_file

    state = load_file(str(tmp_path / "model.safetensors"))
    missing = make().load_state_dict(state, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys  # tied: stored once


def fails_on_one_part(folder: str) -> str:
    from ds_zero.checkpoint import durable

    engine = deepspeed.initialize(model=make(), config=config(2, 0))[0]
    with pytest.MonkeyPatch.context() as patch:
        if ds_comm.get_rank() == 1:
            patch.setattr(durable, "free_nbytes", lambda path: 10)
        with pytest.raises(ds_zero_error()) as caught:
            engine.save_checkpoint(folder)
    return str(caught.value)


def test_a_part_that_cannot_be_written_fails_the_save_on_every_rank(tmp_path: Path) -> None:
    for text in run_ranks(fails_on_one_part, 2, str(tmp_path), timeout=60):
        assert "too full" in text and "mp_rank_01_of_02" in text
    assert not (tmp_path / "latest").exists()


def at_another_size(folder: str, size: int) -> None:
    engine = deepspeed.initialize(model=make(), config=config(size, 1))[0]
    with pytest.raises(ds_zero_error(), match="saved by 2 tensor-parallel ranks"):
        engine.load_checkpoint(folder)


def ds_zero_error() -> type[Exception]:
    from ds_zero import CheckpointError

    return CheckpointError


def test_another_number_of_tensor_ranks_is_refused_and_whole_states_load(tmp_path: Path) -> None:
    run_ranks(saves_and_resumes, 2, str(tmp_path), 1, timeout=120)
    run_ranks(at_another_size, 3, str(tmp_path), 3)
    expected, got = run_ranks(loads_whole, 1, 1), run_ranks(loads_whole, 2, 2)
    torch.testing.assert_close(torch.tensor(got[0]), torch.tensor(expected[0]), rtol=1e-5, atol=1e-5)


def loads_whole(size: int) -> list[float]:
    torch.manual_seed(3)
    other = Decoder().state_dict()
    engine = deepspeed.initialize(model=make(), config=config(size, 1))[0]
    engine.load_module_state_dict(other)
    return train(engine, 0, 3)[0]


def reads_its_data() -> list[float]:
    data = [batch(9, index)[0] for index in range(16)]
    engine, _, loader, _ = deepspeed.initialize(model=make(), config=config(2, 1), training_data=data)
    losses = []
    for tokens in loader:
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def test_the_loader_gives_tensor_ranks_the_same_samples_and_replicas_their_own() -> None:
    losses = run_ranks(reads_its_data, 4)
    assert len(losses[0]) == 4
    assert losses[0] == losses[1] and losses[2] == losses[3] and losses[0] != losses[2]


# -- refusals ---------------------------------------------------------------------------------------------------------


def other_batches() -> None:
    engine = deepspeed.initialize(model=make(), config=config(2, 0))[0]
    engine(batch(0, ds_comm.get_rank()))


def test_ranks_that_are_given_other_batches_are_told() -> None:
    with pytest.raises(RankFailure, match="which every tensor-parallel rank must be given alike"):
        run_ranks(other_batches, 2)


def refused(changes: dict[str, Any], match: str, size: int = 2) -> None:
    kind = (ConfigConflictError, DeepSpeedConfigError, ModelError)
    with pytest.raises(kind, match=match):
        deepspeed.initialize(model=make(), config=config(size, 0, **changes))


@pytest.mark.parametrize(
    ("changes", "match", "size"),
    [
        ({"optimizer": {"type": "Lamb", "params": {"lr": 1e-3}}}, "lamb needs whole matrices", 2),
        ({"tensor_parallel": {"autotp_size": 2, "dtype": "bf16"}}, "trains in", 2),
        ({"tensor_parallel": {"autotp_size": 2, "tensor_parallel": {"tp_size": 4}}}, "give one", 2),
        ({}, "cannot be tensor-parallel groups of 3", 3),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], match: str, size: int) -> None:
    run_ranks(refused, 2, changes, match, size)


def pipeline() -> None:
    from deepspeed.pipe import PipelineModule

    module = PipelineModule([nn.Linear(4, 4), nn.Linear(4, 4)], num_stages=2, loss_fn=nn.MSELoss())
    with pytest.raises(DeepSpeedConfigError, match="inside a pipeline stage"):
        deepspeed.initialize(model=module, config=config(2, 0))


def split_twice() -> None:
    model = make()
    deepspeed.initialize(model=model, config=config(2, 0))[0].destroy()
    with pytest.raises(DeepSpeedConfigError, match="build it anew"):
        deepspeed.initialize(model=model, config=config(2, 0))


def test_pipelines_and_models_that_are_split_already_are_refused() -> None:
    run_ranks(pipeline, 2)
    run_ranks(split_twice, 2)


def test_records_are_checked_at_once() -> None:
    model = make()
    with pytest.raises(DeepSpeedConfigError, match="tp_size is 0"):
        deepspeed.tp_model_init(model, 0, torch.float32)
    with pytest.raises(DeepSpeedConfigError, match=r"torch\.dtype"):
        deepspeed.tp_model_init(model, 2, "bf16")  # type: ignore[arg-type]
    with pytest.raises(ConfigConflictError, match="autotp_size is 4"):
        deepspeed.tp_model_init(model, 2, torch.float32, {"tensor_parallel": {"autotp_size": 4}})
    assert deepspeed.tp_model_init(model, 2, torch.float32) is model
    assert requested(model, {}, None, None).size == 2
    with pytest.raises(ConfigConflictError, match="the program passes 2"):
        resolve(
            {"train_batch_size": 2, "tensor_parallel": {"autotp_size": 4}},
            dp_world_size=1,
            arguments=requested(model, {}, None, None).arguments,
        )


SPEC = {"patterns": [r".*q_proj\.weight$"], "partition_type": "COLUMN"}


def with_specs(specs: list[dict[str, Any]], strict: bool) -> list[float]:
    section = {"autotp_size": 2, "partition_config": {"layer_specs": specs, "strict_mode": strict}}
    return train(deepspeed.initialize(model=make(), config=config(2, 0, tensor_parallel=section))[0], 0, 3)[0]


def test_a_partition_config_is_rules() -> None:
    expected = run_ranks(with_specs, 2, [], False)
    skipped = [{"patterns": ["mlp"], "partition_type": "skip"}, SPEC]
    got = run_ranks(with_specs, 2, skipped, True)
    torch.testing.assert_close(torch.tensor(got[0]), torch.tensor(expected[0]), rtol=1e-5, atol=1e-5)
    with pytest.raises(RankFailure, match="no parameter matches the pattern"):
        run_ranks(with_specs, 2, [{"patterns": ["nothing"]}], True)
    with pytest.raises(RankFailure, match="gather_output"):
        run_ranks(with_specs, 2, [{**SPEC, "gather_output": True}], True)
