"""Ulysses as transformers and accelerate call it: two or three ranks share each sequence, and losses and gradient norms
are those of one process that has the whole of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_cases
import pytest
import torch
from client_scripts import require

import deepspeed
import ds_comm
from ds_comm.testing import RankFailure, run_ranks

require("accelerate", "transformers")

TOKENS, RATE = 13, 0.5


def model(heads: int = 4, family: str = "llama", **more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    sizes = {"vocab_size": 64, "hidden_size": 8 * heads, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": 2, "max_position_embeddings": 32, **more}
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(sliding_window=4, **sizes))
    return LlamaForCausalLM(LlamaConfig(**sizes))


def batches(count: int, kind: str) -> list[dict[str, torch.Tensor]]:
    found = []
    for seed in range(count):
        ids = torch.randint(0, 64, (2, TOKENS), generator=torch.Generator().manual_seed(seed))
        batch = {"input_ids": ids, "labels": ids.clone()}
        if kind == "padded":  # on both sides; the first token after padding has nothing to be told from
            mask = torch.ones_like(ids)
            mask[0, -4:] = mask[1, :3] = 0
            batch |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
            batch["labels"][(mask == 0) | (mask.cumsum(-1) == 1)] = -100
        elif kind == "packed":  # two documents in a row
            places = torch.arange(TOKENS).expand(2, TOKENS).clone()
            places[:, 6:] -= 6
            batch |= {"position_ids": places}
            batch["labels"][:, 6] = -100
        found.append(batch)
    return found


def alone(count: int, kind: str, **how: Any) -> list[tuple[float, float]]:
    """Losses and gradient norms of one process."""
    net, found = model(**how), []
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for batch in batches(count, kind):
        optimizer.zero_grad()
        loss = net(**batch, use_cache=False).loss
        loss.backward()
        found.append((loss.item(), float(torch.nn.utils.clip_grad_norm_(net.parameters(), 1e9))))
        optimizer.step()
    return found


def whole_loss(loss: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over all ranks' tokens that count, as transformers and accelerate's example compute it."""
    group = deepspeed.utils.groups._get_sequence_parallel_group()
    losses = torch.stack(torch.distributed.nn.functional.all_gather(loss, group=group))
    counts = torch.stack(torch.distributed.nn.functional.all_gather((labels != -100).sum(), group=group))
    return (torch.where(counts > 0, losses, torch.zeros_like(losses)) * counts).sum() / counts.sum()


def together(stage: int, kind: str, how: dict[str, Any]) -> list[tuple[float, float]]:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter

    rank, ranks = ds_comm.get_rank(), ds_comm.get_world_size()
    net = model(**how)
    mpu = UlyssesSPAttentionHF.register_with_transformers(net, "sdpa", ranks, micro_batch_size=2)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    try:
        optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
        engine = deepspeed.initialize(model=net, optimizer=optimizer, config=config, mpu=mpu)[0]
        assert engine.train_batch_size() == 2  # the ranks of a sequence read one batch
        mine = batches(2 * ranks, kind)[rank::ranks]
        loader = UlyssesSPDataLoaderAdapter(mine, rank, mpu.get_sequence_parallel_group(), ranks, engine.device)
        assert len(loader) == 2 * ranks
        found = []
        for batch in loader:
            loss = engine(**batch, labels=batch["shift_labels"], use_cache=False).loss
            loss = whole_loss(loss, batch["shift_labels"])
            engine.backward(loss)
            engine.step()
            found.append((loss.item(), engine.get_global_grad_norm()))
        engine.destroy()
        return found
    finally:
        UlyssesSPAttentionHF.unregister()


@pytest.mark.parametrize(
    ("ranks", "stage", "kind", "how"),
    [
        (2, 3, "plain", {}),
        (2, 2, "padded", {}),
        (3, 3, "packed", {"heads": 4}),  # uneven heads, key-value heads repeated, 13 tokens on three ranks
        (2, 1, "plain", {"family": "mistral"}),
    ],
)
def test_training_on_shared_sequences(ranks: int, stage: int, kind: str, how: dict[str, Any]) -> None:
    expected = alone(2 * ranks, kind, **how)
    for found in run_ranks(together, ranks, stage, kind, how, timeout=120):
        for one, two in zip(found, expected, strict=True):
            assert one == pytest.approx(two, rel=1e-4)


def parallelism(ranks: int) -> Any:
    from accelerate.utils import ParallelismConfig
    from accelerate.utils.dataclasses import DeepSpeedSequenceParallelConfig

    handler = DeepSpeedSequenceParallelConfig(
        sp_seq_length=TOKENS, sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
    )
    return ParallelismConfig(sp_backend="deepspeed", sp_size=ranks, sp_handler=handler)


def accelerated(stage: int) -> list[float]:
    """accelerate's own example of sequence parallelism."""
    from accelerate import Accelerator, DeepSpeedPlugin

    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    hf_cases.fresh()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), parallelism_config=parallelism(2))
    try:
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
        loader = torch.utils.data.DataLoader(batches(4, "plain"), batch_size=1, collate_fn=lambda rows: rows[0])
        net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
        losses = []
        for batch in loader:
            out = net(**batch, use_cache=False)
            loss = accelerator.unwrap_model(net).loss_function(
                logits=out.logits, labels=None, shift_labels=batch["shift_labels"], vocab_size=64
            )
            loss = whole_loss(loss, batch["shift_labels"])
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        net.destroy()
        return losses
    finally:
        UlyssesSPAttentionHF.unregister()


def test_accelerate_with_a_parallelism_config() -> None:
    expected = [loss for loss, _ in alone(4, "plain")]
    for found in run_ranks(accelerated, 2, 2, timeout=120):
        assert found == pytest.approx(expected, rel=1e-4)


SAMPLES = [{**row, "position_ids": list(range(12))} for row in hf_cases.SAMPLES]


def trainer(out: Path, batch: int, **more: Any) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        seed=5,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **more,
    )
    job = Trainer(model=model(), args=arguments, train_dataset=SAMPLES, eval_dataset=SAMPLES[:4])
    job.train()
    shown = [(row["loss"], row["grad_norm"]) for row in job.state.log_history if "loss" in row]
    return {"losses": shown, "eval": job.evaluate()["eval_loss"]}


def trainer_together(out: Path, stage: int) -> dict[str, Any]:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    hf_cases.fresh()
    try:
        return trainer(
            out,
            2,
            deepspeed=hf_cases.ds_config(stage),
            accelerator_config={"use_configured_state": True},
            parallelism_config=parallelism(2),
        )
    finally:
        UlyssesSPAttentionHF.unregister()


def test_the_trainer_with_a_parallelism_config(tmp_path: Path) -> None:
    hf_cases.fresh(deepspeed=False)
    expected = trainer(tmp_path / "alone", 2, use_cpu=True)
    for found in run_ranks(trainer_together, 2, tmp_path / "two", 3, timeout=180):
        assert found["eval"] == pytest.approx(expected["eval"], rel=1e-4)
        for one, two in zip(found["losses"], expected["losses"], strict=True):
            assert one == pytest.approx(two, rel=1e-3)


def refusals() -> list[str]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter

    said = []
    register = UlyssesSPAttentionHF.register_with_transformers
    assert register(model(), "sdpa", 1, 1) is None
    for net, core, more in (
        (model(), "eager", {}),
        (model(attn_implementation="eager"), "sdpa", {}),
        (model(), "sdpa", {"seq_length": 7, "seq_length_is_variable": False}),
        (model(heads=1, num_key_value_heads=1), "sdpa", {}),
    ):
        with pytest.raises(ValueError) as error:
            register(net, core, 2, 1, **more)
        said.append(str(error.value))
    mpu = register(model(), "sdpa", 2, 1)
    try:
        with pytest.raises(ValueError) as error:
            ALL_ATTENTION_FUNCTIONS["sdpa"](model().model.layers[0].self_attn, *[torch.zeros(1, 4, 3, 2)] * 3, None)
        said.append(str(error.value))
        own = [{"input_ids": torch.zeros(1, 1, dtype=torch.int64), "labels": torch.zeros(1, 1)}]
        group, rank = mpu.get_sequence_parallel_group(), mpu.get_sequence_parallel_rank()
        with pytest.raises(ValueError) as error:
            next(iter(UlyssesSPDataLoaderAdapter(own, rank, group, 2, "cpu")))
        said.append(str(error.value))
        long = [{"input_ids": torch.zeros(1, 4, dtype=torch.int64), "labels": torch.zeros(1, 4)}] * (1 + rank)
        assert len(list(UlyssesSPDataLoaderAdapter(long, rank, group, 2, "cpu"))) == 2  # none waits for the longer one
    finally:
        UlyssesSPAttentionHF.unregister()
    return said


def test_what_cannot_be_shared_is_said() -> None:
    for said in run_ranks(refusals, 2, timeout=120):
        expected = ["'eager'; Ulysses", "load the model with attn_implementation='sdpa'", "multiple of the 2 ranks"]
        expected += ["at most 1", "position_ids", "with at least 2 tokens"]
        assert all(part in text for part, text in zip(expected, said, strict=True)), said


def mesh_conflict() -> None:
    net = torch.nn.Linear(2, 2)
    config = {"train_micro_batch_size_per_gpu": 1, "sequence_parallel_size": 3, "optimizer": {"type": "Adam"}}
    deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)


def test_a_world_that_does_not_divide() -> None:
    with pytest.raises(RankFailure, match="start a multiple of 3 ranks"):
        run_ranks(mesh_conflict, 2)
