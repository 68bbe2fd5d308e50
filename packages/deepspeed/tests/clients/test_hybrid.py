"""The hybrid engine: tokens are transformers' own for the weights of the moment, losses those of a plain loop."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from client_scripts import require
from hybrid_models import MODELS, answers, loss_of, make, prompts, with_lora

import deepspeed
import ds_comm
import ds_inference
from ds_comm.testing import run_ranks
from ds_inference import CapacityError
from ds_zero import ZeroStateError

pytest.importorskip("transformers")

STEPS = 4
ranks = partial(run_ranks, timeout=240)  # the first call imports the clients, which takes long on a busy machine


def config(stage: int, dtype: str = "fp32", **hybrid: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},  # the steps of Adam blow up rounding
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 40},
        "hybrid_engine": {"enabled": True, "max_out_tokens": 64, **hybrid},
        **({dtype: {"enabled": True}} if dtype != "fp32" else {}),
    }


def make_engine(model: Any, stage: int, dtype: str = "fp32", **hybrid: Any) -> Any:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trainable, config=config(stage, dtype, **hybrid))[0]


def model_of(kind: str) -> Any:
    """`name`, `name+frozen`, `llama+peft` or `llama+chat`."""
    name, _, change = kind.partition("+")
    model = make(name)
    if change == "frozen":
        for parameter in model.model.layers[0].parameters():
            parameter.requires_grad_(False)
    return with_lora(model, change) if change in ("peft", "chat") else model


# -- generate, train on the result, generate ---------------------------------------------------------------------------


def rollouts(kind: str, stage: int, folder: str | None = None) -> dict[str, Any]:
    """One rank's tokens and losses; a checkpoint is saved after the second step and loaded into a new engine."""
    rank, engine = ds_comm.get_rank(), make_engine(model_of(kind), stage)
    frozen = {n: p.shape for n, p in engine.module.named_parameters() if not p.requires_grad}
    before = whole(engine, frozen)
    seen: dict[str, Any] = {"tokens": [], "losses": [], "copied": []}
    for step in range(STEPS):
        engine.eval()
        tokens = answers(engine, rank, step)
        assert answers(engine.module, rank, step).tolist() == tokens.tolist()  # the model's is the engine's
        seen["copied"].append(engine.rollout.copied_nbytes)
        engine.train()
        check_released(engine)
        loss = loss_of(engine, tokens)
        engine.backward(loss)
        engine.step()
        seen["tokens"].append(tokens.tolist())
        seen["losses"].append(loss.item())
        if step == 1 and folder is not None:
            engine.save_checkpoint(folder)
            engine.destroy()
            engine = make_engine(model_of(kind), stage)
            engine.eval()  # a rollout that goes on with the loaded weights
            answers(engine, rank, step)
            engine.load_checkpoint(folder)
    after = whole(engine, frozen)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    return seen


def whole(engine: Any, names: Any) -> dict[str, torch.Tensor]:
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {n: p.detach().clone() for n, p in engine.module.named_parameters() if n in names}


def check_released(engine: Any) -> None:
    """Nothing that generation took is held."""
    assert engine.rollout.decoder is None and engine.rollout.copied_nbytes == 0
    for unit in engine.sharded.units:
        assert not unit.sharded or not (unit.pinned or unit.storage.resident)
        for parameter in unit.parameters if unit.sharded else ():
            assert parameter.numel() == 0


def plain_rollouts(kind: str, num_ranks: int) -> tuple[list[list[Any]], list[list[float]]]:
    """Tokens and losses [rank][step] of one process that takes all ranks' parts itself."""
    model = model_of(kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tokens: list[list[Any]] = [[] for _ in range(num_ranks)]
    losses: list[list[float]] = [[] for _ in range(num_ranks)]
    for step in range(STEPS):
        model.eval()
        found = [answers(model, rank, step) for rank in range(num_ranks)]
        model.train()
        for rank in range(num_ranks):
            loss = loss_of(model, found[rank])
            (loss / num_ranks).backward()
            tokens[rank].append(found[rank].tolist())
            losses[rank].append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return tokens, losses


CASES = [
    ("llama", 0, 2), ("llama", 2, 3), ("llama", 3, 3), ("llama-odd", 3, 2), ("qwen2-tied", 3, 2), ("gemma", 3, 2),
    ("gpt2", 3, 2), ("gptneox", 3, 2), ("llama+frozen", 3, 2), ("llama+peft", 2, 2), ("llama+peft", 3, 2),
    ("llama+chat", 3, 2),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "stage", "num_ranks"), CASES)
def test_a_loop_of_rollouts_is_a_plain_loop(kind: str, stage: int, num_ranks: int, tmp_path: Path) -> None:
    if kind.endswith("peft"):
        pytest.importorskip("peft")
    folder = str(tmp_path) if kind == "llama" else None
    found = ranks(rollouts, num_ranks, kind, stage, folder)
    tokens, losses = plain_rollouts(kind, num_ranks)
    for rank, seen in enumerate(found):
        assert seen["tokens"] == tokens[rank]
        assert seen["losses"] == pytest.approx(losses[rank], rel=2e-4)
    copies = kind not in ("llama", "gemma", "gptneox", "llama+frozen")
    assert all((nbytes > 0) == copies for seen in found for nbytes in seen["copied"])


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_bf16_generates_as_the_inference_engine_does(transport: Any) -> None:
    found = ranks(bf16_rollouts, 2, transport=transport)
    first = found[0]["weights"]
    assert not torch.equal(first[0]["lm_head.weight"], first[1]["lm_head.weight"])
    for rank, seen in enumerate(found):
        for step, values in enumerate(seen["weights"]):
            assert all(torch.equal(values[name], value) for name, value in first[step].items())
            model = make("qwen2-tied")
            model.load_state_dict(values)
            engine = ds_inference.init_inference(model, dtype="bf16", replace_with_kernel_inject=True)
            assert answers(engine, rank, step).tolist() == seen["tokens"][step]


def bf16_rollouts() -> dict[str, Any]:
    rank, engine = ds_comm.get_rank(), make_engine(make("qwen2-tied"), 3, "bf16")
    seen: dict[str, Any] = {"tokens": [], "weights": []}
    for step in range(3):
        engine.eval()
        tokens = answers(engine, rank, step)
        seen["tokens"].append(tokens.tolist())
        seen["weights"].append({n: p.clone() for n, p in engine.module.state_dict().items()})
        engine.train()
        engine.backward(loss_of(engine, tokens))
        engine.step()
    return seen


# -- what a rollout costs, and what ranks may do in it -----------------------------------------------------------------


def differing_ranks(kind: str) -> tuple[list[Any], dict[str, int], dict[str, int]]:
    """Rank 0 generates nothing, rank 1 three times, rank 2 raises in between; then all train.

    Transformers knows of ZeRO-3, as under its Trainer: by itself its `generate` would wait for the other ranks.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    known = HfDeepSpeedConfig(config(3))
    assert known.is_zero3() and is_deepspeed_zero3_enabled()
    rank, engine = ds_comm.get_rank(), make_engine(make(kind), 3)
    engine.backward(loss_of(engine, prompts(rank, 0)[0]))
    engine.step()
    ledger = ds_comm.communicator().ledger
    ledger.reset()
    engine.eval()
    gathers = {label: count for (op, label), count in ledger.counts.items() if op == "all_gather"}
    sharded = {unit.layout.name: 1 for unit in engine.sharded.units if unit.sharded}
    ledger.reset()
    found: list[Any] = []
    if rank == 1:
        found = [answers(engine, rank, step, synced_gpus=True).tolist() for step in range(3)]
    if rank == 2:
        answers(engine, rank, 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate(prompts(2, 0)[0], max_new_tokens=5, stopping_criteria=[lambda *_: 1 // 0])
        with pytest.raises(CapacityError, match=r"hybrid_engine\.max_out_tokens"):
            engine.generate(prompts(2, 0)[0], max_new_tokens=500)
        found = [answers(engine, rank, 3).tolist()]
    assert not ledger.counts, f"generation communicated: {ledger.counts}"
    engine.train()
    check_released(engine)
    ledger.reset()
    engine.backward(loss_of(engine, prompts(rank, 1)[0]))
    engine.step()
    return found, gathers, sharded


@pytest.mark.parametrize("kind", ["llama", "gptneox"])
@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_one_gather_per_rollout_and_nothing_within(kind: str, transport: Any) -> None:
    require("accelerate")
    found = ranks(differing_ranks, 3, kind, transport=transport)
    for _, gathers, sharded in found:
        assert gathers == sharded and sharded
    assert len(found[1][0]) == 3 and len(found[2][0]) == 1


def test_weights_are_shared_not_copied() -> None:
    ranks(check_addresses, 2)


def check_addresses() -> None:
    engine = make_engine(make("llama"), 3)
    engine.eval()
    answers(engine, 0, 0)
    decoder = engine.rollout.decoder
    own = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    for layer in decoder.model.layers:
        for projection in (layer.qkv, layer.output, layer.up, layer.down):
            assert projection.weight.untyped_storage().data_ptr() in own
    attention = engine.module.model.layers[0].self_attn
    assert decoder.model.layers[0].qkv.weight.data_ptr() == attention.q_proj.weight.data_ptr()


# -- the engine's other verbs, in one process --------------------------------------------------------------------------


@pytest.fixture
def llama() -> Any:
    engine = make_engine(make("llama"), 3)
    yield engine
    engine.destroy()


def test_the_cache_lives_as_long_as_configured(llama: Any) -> None:
    llama.eval()
    answers(llama, 0, 0)
    kept = llama.rollout._loop.kept_size
    assert kept is not None
    llama.rollout.release_cache()
    assert llama.rollout._loop.kept_size is None
    llama.retake_inference_cache()
    assert llama.rollout._loop.kept_size == kept
    freeing = make_engine(make("llama"), 3, release_inference_cache=True)
    freeing.eval()
    tokens = answers(freeing, 0, 0)
    assert freeing.rollout._loop.kept_size is None
    assert tokens.tolist() == answers(make("llama").eval(), 0, 0).tolist()
    freeing.destroy()


def test_generating_without_eval_ends_with_the_next_forward(llama: Any) -> None:
    assert llama.training
    tokens = answers(llama, 0, 0)
    assert llama.training and llama.module.training and llama.rollout.active
    loss = loss_of(llama, tokens)
    assert not llama.rollout.active
    llama.backward(loss)
    llama.eval()
    answers(llama, 0, 0)
    llama.step()  # in eval mode: the weights change under the rollout, which ends
    assert not llama.rollout.active
    check_released(llama)
    assert answers(llama, 0, 0).shape[0] == 2


def test_an_evaluation_in_a_rollout(llama: Any) -> None:
    llama.eval()
    expected = answers(llama, 0, 1)
    with torch.no_grad():
        found = loss_of(llama, expected)
    assert float(found) == pytest.approx(float(loss_of(make("llama").eval(), expected)), rel=1e-5)
    assert answers(llama, 0, 1).tolist() == expected.tolist()


def test_lora_is_fused_into_copies_and_dropped(llama: Any) -> None:
    del llama
    engine = make_engine(with_lora(make("llama"), "chat"), 3)
    engine.eval()
    engine.fuse_lora_weight()
    fused = engine.rollout.copied_nbytes
    expected = answers(with_lora(make("llama"), "chat").eval(), 0, 0)
    assert fused and answers(engine, 0, 0).tolist() == expected.tolist()
    engine.unfuse_lora_weight()
    assert engine.rollout.copied_nbytes == 0
    engine.create_inference_module()
    assert engine.rollout.copied_nbytes == fused
    engine.unfuse_lora_weight_non_pinned()
    with torch.no_grad():
        engine.module.model.layers[0].self_attn.q_proj.lora_scaling = 0.5
    other = answers(engine, 0, 0)
    assert other.tolist() != expected.tolist()
    engine.destroy()


def test_adapters_that_change_in_a_rollout_are_fused_anew() -> None:
    """PEFT's disable_adapter() is how the reference model is asked."""
    pytest.importorskip("peft")
    model, plain = with_lora(make("llama"), "peft"), with_lora(make("llama"), "peft").eval()
    engine = make_engine(model, 3)
    engine.eval()
    tokens, kwargs = prompts(0, 0)[0][1:], {"do_sample": False, "max_new_tokens": 9}

    def both() -> tuple[list[Any], Any]:
        found, expected = (each.generate(input_ids=tokens, **kwargs).tolist() for each in (engine, plain))
        assert found == expected
        return found, engine.rollout.decoder

    adapted, decoder = both()
    with model.disable_adapter(), plain.disable_adapter():
        reference, _ = both()
    assert reference != adapted
    again, _ = both()
    same, last = both()
    assert again == same == adapted and last is engine.rollout.decoder and last is not decoder
    engine.destroy()


def test_destroy_keeps_a_generate_of_the_models_own() -> None:
    model = make("llama")
    model.generate = own = model.generate
    engine = make_engine(model, 1)
    assert model.generate == engine.generate
    with pytest.raises(ZeroStateError, match="copy it before"):
        copy.deepcopy(model)
    engine.destroy()
    engine.destroy()
    assert model.generate is own


def test_destroy_gives_the_model_back() -> None:
    model = make("llama")
    engine = make_engine(model, 1)
    engine.eval()
    expected = answers(model, 0, 0)
    assert engine.rollout.decoder is not None
    engine.destroy()
    assert "generate" not in vars(model) and not engine.rollout.active
    assert answers(model, 0, 0).tolist() == expected.tolist()


def test_what_the_decoder_does_not_do(llama: Any) -> None:
    llama.eval()
    tokens = prompts(0, 0)[0][1:]
    for kwargs in ({"prompt_lookup_num_tokens": 2, "do_sample": False}, {"num_beams": 3, "do_sample": False}):
        expected = make("llama").eval().generate(tokens, **kwargs, max_new_tokens=5)
        assert llama.generate(tokens, **kwargs, max_new_tokens=5).tolist() == expected.tolist()
    with pytest.raises(CapacityError, match="max_out_tokens is 64"):
        llama.generate(tokens, prompt_lookup_num_tokens=2, max_new_tokens=100)


def test_every_model_is_known_or_not() -> None:
    for name in MODELS:
        engine = make_engine(make(name), 1)
        engine.eval()
        engine.create_inference_module()
        assert (engine.rollout.decoder is None) == (name == "gptneox")
        engine.destroy()


# -- what others do around generation ----------------------------------------------------------------------------------


def hooks_taken_out() -> list[Any]:
    """As trl's `unwrap_model_for_generation`; each rank generates another number of tokens."""
    from trl.models.utils import add_hooks, remove_hooks

    rank, model = ds_comm.get_rank(), make("llama")
    plain = {**config(3), "hybrid_engine": {"enabled": False}}
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=plain)[0]
    ledger, found = ds_comm.communicator().ledger, []
    for step in range(2):
        model.eval()
        with deepspeed.zero.GatheredParameters(model.parameters()):
            remove_hooks(engine)
            ledger.reset()
            tokens = answers(model, rank, step)
            assert not ledger.counts, f"generation communicated: {ledger.counts}"
            add_hooks(engine)
        model.train()
        assert all(not unit.pinned for unit in engine.sharded.units)
        engine.backward(loss_of(engine, tokens))
        engine.step()
        found.append(tokens.tolist())
    return found


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_trl_takes_the_hooks_out(transport: Any) -> None:
    pytest.importorskip("trl")
    found = ranks(hooks_taken_out, 2, transport=transport)
    tokens, _ = plain_rollouts("llama", 2)
    assert [rank[:2] for rank in found] == [rank[:2] for rank in tokens]
