"""apply_kernels on small models of every family: same results, the report, undo, what is left alone."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_kernels import KernelArgumentError, PatchError, apply_kernels

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
GPT2_SIZES = {
    "vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
BERT_SIZES = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", {key: value for key, value in GROUPED.items() if key != "head_dim"}),
    "qwen3": ("Qwen3ForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 5}),
    "gemma": ("GemmaForCausalLM", GROUPED),
    "gpt2": ("GPT2LMHeadModel", GPT2_SIZES),
    "bert": ("BertForMaskedLM", BERT_SIZES),
}
REPLACED = {
    **{
        name: {"norm": 5, "mlp": 2, "rope": 2, "attention": 2, "loss": 1}
        for name in ("llama", "qwen2", "mistral", "gemma")
    },
    "qwen3": {"norm": 9, "mlp": 2, "rope": 2, "attention": 2, "loss": 1},
    "gpt2": {"mlp": 2, "attention": 2, "loss": 1},
    "bert": {"loss": 1},
}


def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
    name, sizes = MODELS[family]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # norm weights that are all alike would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def batch(family: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(1, 99, (3, 13))
    labels = tokens.clone()
    labels[torch.rand(3, 13) < (0.8 if family == "bert" else 0.2)] = -100
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}  # type: ignore[misc]


def close(got: Tensor, expected: Tensor, share: float, what: str) -> None:
    """Norm-wise; the constant is for gradients that are zero but for rounding, as those of BERT's key biases."""
    error, size = (got.double() - expected.double()).norm(), expected.double().norm()
    assert error <= share * size + 1e-7, f"{what}: off by {error / size:.2e} of its size, allowed {share:.0e}"


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_is_the_same(family: str, dtype: torch.dtype) -> None:
    """fp32 within its rounding; bf16 no further from the fp32 model than twice transformers' own bf16."""
    inputs = batch(family)
    model = build(family, dtype)
    loss, grads = step(model, inputs)
    applied = apply_kernels(model)
    assert {kernel: len(names) for kernel, names in applied.replaced.items()} == REPLACED[family]
    assert not applied.skipped
    new_loss, new_grads = step(model, inputs)
    if dtype == torch.float32:
        close(new_loss, loss, 2e-6, "loss")
        for name, grad in grads.items():
            close(new_grads[name], grad, 2e-5, name)
        return
    exact_loss, exact = step(build(family, dtype).float(), inputs)
    assert (new_loss - exact_loss).abs() <= 2 * (loss - exact_loss).abs() + 4e-3 * exact_loss
    for name, grad in exact.items():
        bound = (grads[name].float() - grad).norm() / grad.norm() if grad.norm() else 0.0
        close(new_grads[name], grad, 2 * float(bound) + 8e-3, name)


@pytest.mark.parametrize("family", MODELS)
def test_evaluation_and_generation_have_logits(family: str) -> None:
    inputs = batch(family)
    model = build(family).eval()
    expected = model(**inputs)
    with apply_kernels(model):
        got = model(**inputs)
        close(got.logits, expected.logits, 2e-6, "logits")
        close(got.loss, expected.loss, 2e-6, "loss")
        if family != "bert":
            found = [model.generate(inputs["input_ids"][:1, :5], max_new_tokens=6, do_sample=False) for _ in range(2)]
    if family != "bert":
        plain = model.generate(inputs["input_ids"][:1, :5], max_new_tokens=6, do_sample=False)
        assert all(torch.equal(tokens, plain) for tokens in found)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt2"])
def test_a_training_step_without_padding(family: str) -> None:
    """No mask: attention runs in flash_attention (but for Mistral, whose window of 5 needs one)."""
    inputs = {name: value for name, value in batch(family).items() if name != "attention_mask"}
    model = build(family)
    loss, grads = step(model, inputs)
    with apply_kernels(model):
        new_loss, new_grads = step(model, inputs)
    close(new_loss, loss, 2e-6, "loss")
    for name, grad in grads.items():
        close(new_grads[name], grad, 2e-5, name)


def test_undo_restores_every_module() -> None:
    model = build("llama")
    names = list(model.state_dict())
    before = step(model, batch("llama"))
    applied = apply_kernels(model)
    assert list(model.state_dict()) == names
    assert any("forward" in vars(module) for module in model.modules())
    applied.undo()
    assert not any("forward" in vars(module) for module in model.modules())
    after = step(model, batch("llama"))
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(grad, after[1][name]) for name, grad in before[1].items())
    with pytest.raises(PatchError, match="nothing is applied here any more"):
        applied.undo()


def test_undo_refuses_what_was_wrapped_since() -> None:
    model = build("llama")
    applied = apply_kernels(model)
    norm = model.model.norm
    inner = norm.forward
    norm.forward = lambda x: inner(x)
    with pytest.raises(PatchError, match=r"the forward of 'model.norm' is no longer"):
        applied.undo()
    assert "forward" in vars(model.model.layers[0].mlp), "nothing is undone"
    norm.forward = inner
    applied.undo()


def test_twice_is_refused_and_afterwards_nothing_changed() -> None:
    model = build("qwen3")
    applied = apply_kernels(model)
    with pytest.raises(PatchError, match="already; undo that first"):
        apply_kernels(model)
    applied.undo()
    apply_kernels(model).undo()


def test_only_some_kernels_and_the_report() -> None:
    model = build("llama")
    with apply_kernels(model, only=("norm",)) as applied:
        assert applied.replaced == {"norm": [name for name, _ in model.named_modules() if name.endswith("norm")]}
        assert str(applied) == "LlamaForCausalLM: norm in 5 modules"
        assert model(**batch("llama")).logits is not None
    with pytest.raises(KernelArgumentError, match="only holds 'norms'; known are norm, mlp, rope, attention, loss"):
        apply_kernels(model, only=("norms",))


def test_other_models_of_the_class_are_left_alone() -> None:
    model, other = build("llama"), build("llama")
    expected = step(other, batch("llama"))
    with apply_kernels(model):
        assert not any("forward" in vars(module) for module in other.modules())
        assert torch.equal(step(other, batch("llama"))[0], expected[0])


def test_a_deep_copy_of_a_patched_model_works_on_its_own_weights() -> None:
    model = build("llama")
    apply_kernels(model)
    twin = copy.deepcopy(model)
    loss = step(model, batch("llama"))[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(step(twin, batch("llama"))[0], loss)


@pytest.mark.parametrize("family", sorted(MODELS))
def test_a_pickle_of_a_patched_model_loads_without_patches_and_can_be_patched(family: str) -> None:
    model = build(family)
    expected = step(model, batch(family))[0]
    applied = apply_kernels(model)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(step(twin, batch(family))[0], expected)
    assert twin(**batch(family)).logits is not None
    again = apply_kernels(twin)
    assert again.replaced == applied.replaced and not again.skipped
    assert torch.equal(step(twin, batch(family))[0], step(model, batch(family))[0])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compiled_model_has_the_kernels(family: str) -> None:
    model = build(family)
    apply_kernels(model)
    inputs = batch(family)
    expected, grads = step(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    loss, found = step(compiled, inputs)
    close(loss, expected, 1e-6, "loss")
    for name, grad in grads.items():
        close(found[f"_orig_mod.{name}"], grad, 1e-5, name)


def test_unknown_models_and_unfit_modules() -> None:
    with pytest.raises(PatchError, match="no module of Linear is of a known class"):
        apply_kernels(nn.Linear(2, 2))
    name, sizes = MODELS["llama"]
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**sizes, hidden_act="relu"))
    model.lm_head = nn.Sequential(nn.Linear(32, 99))
    model.model.norm.forward = functools.partial(model.model.norm.forward)
    applied = apply_kernels(model)
    assert applied.skipped["model.layers.0.mlp"] == "its activation is ReLU; known are silu and gelu"
    assert "head is a Sequential" in applied.skipped[""]
    assert applied.skipped["model.norm"] == "it has a forward of its own"
    assert set(applied.replaced) == {"norm", "rope", "attention"}


def test_subclasses_of_users_are_left_alone() -> None:
    model = build("llama")

    class Doubled(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) * 2

    model.model.norm.__class__ = Doubled
    applied = apply_kernels(model)
    assert "model.norm" not in applied.replaced["norm"]


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: {**inputs, "num_items_in_batch": torch.tensor(17)},
        lambda inputs: {**inputs, "num_items_in_batch": 17},
        lambda inputs: {**inputs, "ignore_index": 5},
        lambda inputs: {**inputs, "shift_labels": inputs["labels"].roll(-1, 1)},
        lambda inputs: {**inputs, "output_hidden_states": True},
    ],
    ids=["items", "items-int", "ignore", "shifted", "hidden"],
)
def test_what_trainers_pass_to_the_loss(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    model = build("llama")
    inputs = change(batch("llama"))
    if "ignore_index" in inputs:
        inputs["labels"] = inputs["labels"].clamp(min=0)
    expected = model(**inputs)
    with apply_kernels(model):
        got = model(**inputs)
    close(got.loss.detach(), expected.loss.detach(), 2e-6, "loss")
    assert got.logits is None
    assert (got.hidden_states is None) == (expected.hidden_states is None)
    for one, two in zip(got.hidden_states or (), expected.hidden_states or (), strict=True):
        close(one.detach(), two.detach(), 1e-5, "hidden states")


def test_calls_that_want_more_than_a_loss_run_as_before() -> None:
    model, inputs = build("llama"), batch("llama")
    with apply_kernels(model):
        assert isinstance(model(**inputs, return_dict=False), tuple)
        no_labels = {name: value for name, value in inputs.items() if name != "labels"}
        assert model(**no_labels).logits.shape == (3, 13, 99)


def test_hooks_on_the_head_see_its_call() -> None:
    """What ZeRO-3 hangs on a layer: the weight is used inside the layer's own call."""
    model, calls = build("llama"), []
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.lm_head.register_forward_hook(lambda _m, _a, output: calls.append(tuple(output.shape)))
    with apply_kernels(model):
        model(**batch("llama")).loss.backward()
    assert calls == ["before", ()]


def test_gradient_checkpointing() -> None:
    model, inputs = build("llama"), batch("llama")
    _, expected = step(model, inputs)
    with apply_kernels(model):
        model.gradient_checkpointing_enable()
        _, grads = step(model, inputs)
    for name, grad in expected.items():
        close(grads[name], grad, 2e-5, name)


@pytest.mark.parametrize(("dtype", "band"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_thirty_steps_of_training_have_the_same_losses(dtype: torch.dtype, band: float) -> None:
    """The curve falls, and stays within a share of transformers' own at every step."""
    curves = []
    for patched in (False, True):
        model = build("llama", dtype)
        if patched:
            apply_kernels(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        curve = []
        for index in range(30):
            torch.manual_seed(index % 3)
            tokens = torch.randint(1, 99, (4, 16))
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    plain, fused = curves
    assert plain[-1] < 0.8 * plain[0]
    worst = max(abs(one - two) / one for one, two in zip(plain, fused, strict=True))
    assert worst <= band, f"losses differ by up to {worst:.2e} of their size"
