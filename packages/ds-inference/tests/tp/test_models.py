"""Whole transformers models split over ranks: what they say, their gradients, their way back to one piece."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent))

from tp_models import CONFIGS, OTHERS, build, tokens

import ds_comm
from ds_comm.testing import RankFailure, run_ranks
from ds_inference import ModelError, Rule
from ds_inference.loader import open_checkpoint
from ds_inference.tp.apply import TRIED_MODEL_TYPES, apply_tensor_parallel, plan_model

FEW_KEYS = {"num_attention_heads": 6, "num_key_value_heads": 2}


def difference(model: Any, expected: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(tokens())[0] - expected).abs().max())


def same_as_one_rank(model_type: str, changes: dict[str, Any]) -> None:
    """Logits within 1e-5, gradients within rounding, and the whole state dict to the bit."""
    whole, model = build(model_type, **changes), build(model_type, **changes)
    applied = apply_tensor_parallel(model)
    outputs = [one(tokens())[0] for one in (whole, model)]
    assert float((outputs[0] - outputs[1]).detach().abs().max()) < 1e-5
    for output in outputs:
        output.float().log_softmax(-1)[..., 3].mean().backward()
    parts = dict(model.named_parameters())
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            got = parts[name].grad
            assert got is not None, name
            torch.testing.assert_close(got, applied.cut(name, parameter.grad), rtol=1e-4, atol=1e-6, msg=name)
    gathered = applied.gather_state_dict(everywhere=True)
    assert gathered is not None
    assert gathered.keys() == whole.state_dict().keys()
    assert all(torch.equal(gathered[name], value) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_logits_and_gradients_are_those_of_one_rank(model_type: str, num_ranks: int) -> None:
    run_ranks(same_as_one_rank, num_ranks, model_type, {})


@pytest.mark.parametrize(
    ("model_type", "changes", "num_ranks"),
    [
        ("llama", FEW_KEYS, 3),
        ("qwen3", {**FEW_KEYS, "num_key_value_heads": 1}, 4),
        ("phi3", FEW_KEYS, 4),
        ("falcon", {"num_attention_heads": 6, "num_kv_heads": 2}, 3),
        ("falcon", {"new_decoder_architecture": False, "multi_query": True, "alibi": True}, 2),
        ("falcon", {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 6}, 2),
        ("llama", {"num_attention_heads": 9, "hidden_size": 72, "vocab_size": 101}, 2),
        ("gpt2", {"tie_word_embeddings": False}, 2),
        ("gpt_neox", {"tie_word_embeddings": True}, 2),
        ("qwen2", {"tie_word_embeddings": True}, 4),
    ],
)
def test_fewer_key_heads_than_ranks_uneven_heads_and_ties(
    model_type: str, changes: dict[str, Any], num_ranks: int
) -> None:
    run_ranks(same_as_one_rank, num_ranks, model_type, changes)


def test_every_family_that_is_applied_unchecked_is_tested() -> None:
    assert set(CONFIGS) == TRIED_MODEL_TYPES


# -- generate ---------------------------------------------------------------------------------------------------------


def generates(model_type: str, changes: dict[str, Any]) -> list[list[int]]:
    whole, model = build(model_type, **changes), build(model_type, **changes)
    apply_tensor_parallel(model)
    prompt = tokens(2, 9)
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0  # left padding
    settings = {"attention_mask": mask, "max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None}
    expected = whole.generate(prompt, do_sample=False, **settings)
    assert torch.equal(model.generate(prompt, do_sample=False, **settings), expected)
    torch.manual_seed(ds_comm.get_rank())
    apply_tensor_parallel(build("gpt2"))  # aligns the random numbers
    drawn = model.generate(prompt, do_sample=True, **settings)
    assert not torch.equal(drawn, expected)
    return drawn.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "bloom", "phi3", "gemma2", "mixtral"])
def test_generate_of_transformers_gives_the_same_tokens_on_every_rank(model_type: str) -> None:
    one, two = run_ranks(generates, 2, model_type, {})
    assert one == two


# -- training mode ----------------------------------------------------------------------------------------------------


def drops(checkpointing: bool) -> torch.Tensor:
    """9 heads on 2 ranks draw different numbers of random numbers for attention; all else must drop alike."""
    changes = {"n_head": 9, "n_embd": 72, "attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3}
    model = build("gpt2", **changes).train()
    apply_tensor_parallel(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    gradient = model.transformer.wpe.weight.grad
    return torch.cat([loss.detach().view(1), gradient.flatten(), torch.rand(2)])


def test_replicated_dropouts_drop_alike_and_recomputation_repeats_them() -> None:
    plain, checkpointed = run_ranks(drops, 2, False), run_ranks(drops, 2, True)
    assert torch.equal(plain[0], plain[1])
    assert torch.equal(checkpointed[0], checkpointed[1])
    torch.testing.assert_close(plain[0][:-2], checkpointed[0][:-2])


# -- checkpoints ------------------------------------------------------------------------------------------------------


def fills(folder: str) -> None:
    import transformers

    whole = build("llama")
    config = transformers.AutoConfig.for_model("llama", **CONFIGS["llama"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    applied = apply_tensor_parallel(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    with open_checkpoint(folder) as checkpoint:
        assert applied.load(checkpoint) == []
    model.model.rotary_emb = whole.model.rotary_emb  # buffers that no checkpoint has
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert difference(model, whole(tokens())[0]) < 1e-5
    wider = build("llama", intermediate_size=128)
    applied = apply_tensor_parallel(wider)
    with open_checkpoint(folder) as checkpoint, pytest.raises(ModelError, match="another model"):
        applied.load(checkpoint)


def test_a_model_without_memory_is_filled_by_ranges(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    run_ranks(fills, 2, str(tmp_path))


# -- plans and refusals -----------------------------------------------------------------------------------------------


def test_a_plan_can_be_read_before_anything_changes() -> None:
    text = str(plan_model(build("gpt2"), 2))
    assert "transformer.h.*.attn.c_attn" in text and "column (qkv)" in text
    assert "transformer.wte" in text and "vocabulary" in text


def test_what_cannot_be_split_is_refused_before_anything_changes() -> None:
    model = build("llama")
    with pytest.raises(ModelError, match="6 query heads"):
        plan_model(model, 7)
    with pytest.raises(ModelError, match="no configuration"):
        plan_model(nn.Linear(3, 3), 2)
    rule = [Rule("lm_head", "replicated")]
    with pytest.raises(ModelError, match="one parameter, but would be split differently"):
        plan_model(model, 2, rules=rule)
    assert plan_model(build("llama", tie_word_embeddings=False), 2, rules=rule)["lm_head"].style == "replicated"
    with pytest.raises(ModelError, match="no such module"):
        plan_model(model, 2, injection_policy={nn.Linear: "wo"})


def refuses() -> None:
    model = build("llama")
    before = dict(model.named_parameters())
    with pytest.raises(ModelError, match="the plan is for 3 ranks, the group has 2"):
        apply_tensor_parallel(model, plan=plan_model(model, 3))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    apply_tensor_parallel(model)
    with pytest.raises(ModelError, match="split it once"):
        apply_tensor_parallel(model)


def unknown_family() -> None:
    """A model whose code does what no plan can see is put back as it was."""
    model = build("llama")
    model.config.model_type = "unheard_of"
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(lambda module, args, output: (output[0] + module.q_proj.weight.shape[0], None))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = model(tokens())[0]
    with pytest.raises(ModelError, match="its output changes by"):
        apply_tensor_parallel(model)
    assert torch.equal(model(tokens())[0], before)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    attention._forward_hooks.clear()
    whole = model(tokens())[0]
    apply_tensor_parallel(model)  # and what does not change is applied
    assert difference(model, whole) < 1e-5


def test_a_family_that_nobody_tried_is_checked_and_put_back() -> None:
    run_ranks(unknown_family, 2)


@pytest.mark.parametrize("model_type", OTHERS)
def test_names_and_shapes_are_enough_for_other_families(model_type: str) -> None:
    run_ranks(same_as_one_rank, 2, model_type, {})


def policy() -> None:
    model = build("opt")
    layer = type(model.model.decoder.layers[0])
    given = {layer: ("self_attn.out_proj", "fc2")}
    assert plan_model(model, 2, injection_policy=given)["model.decoder.layers.1.fc2"].style == "row"
    expected = model(tokens())[0]
    apply_tensor_parallel(model, injection_policy=given)
    assert difference(model, expected) < 1e-5


def test_an_injection_policy_is_rules() -> None:
    run_ranks(policy, 2)


def differing() -> None:
    apply_tensor_parallel(build("llama"), grain=8 + 16 * ds_comm.get_rank())


def test_ranks_whose_plans_differ_say_so() -> None:
    with pytest.raises(RankFailure, match="tensor-parallel plan"):
        run_ranks(differing, 2)


def test_ranks_refuse_together() -> None:
    run_ranks(refuses, 2)
