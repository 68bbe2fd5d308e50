"""Plans of known families, from lists of modules as those families register them."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_inference.errors import ModelError
from ds_inference.tp.plan import ModelFacts, ModuleInfo, Rule, TensorParallelPlan, plan_tensor_parallel

VOCABULARY, WIDTH, HIDDEN, DIM = 512, 48, 96, 4


def linear(name: str, num_out: int, num_in: int, bias: bool = False) -> ModuleInfo:
    return ModuleInfo(name, "linear", (num_out, num_in), bias)


def llama(heads: int = 12, kv: int = 12, *, fused: bool = False) -> list[ModuleInfo]:
    modules = [ModuleInfo("model.embed_tokens", "embedding", (VOCABULARY, WIDTH))]
    for layer in range(2):
        at = f"model.layers.{layer}."
        if fused:
            modules += [
                linear(at + "self_attn.o_proj", WIDTH, heads * DIM),
                linear(at + "self_attn.qkv_proj", (heads + 2 * kv) * DIM, WIDTH),
                linear(at + "mlp.gate_up_proj", 2 * HIDDEN, WIDTH),
            ]
        else:
            modules += [
                linear(at + "self_attn.q_proj", heads * DIM, WIDTH, bias=True),
                linear(at + "self_attn.k_proj", kv * DIM, WIDTH, bias=True),
                linear(at + "self_attn.v_proj", kv * DIM, WIDTH, bias=True),
                linear(at + "self_attn.o_proj", WIDTH, heads * DIM),
                linear(at + "mlp.gate_proj", HIDDEN, WIDTH),
                linear(at + "mlp.up_proj", HIDDEN, WIDTH),
            ]
        modules += [
            linear(at + "mlp.down_proj", WIDTH, HIDDEN),
            ModuleInfo(at + "input_layernorm", "norm", (WIDTH,)),
            ModuleInfo(at + "post_attention_layernorm", "norm", (WIDTH,)),
        ]
    return [*modules, ModuleInfo("model.norm", "norm", (WIDTH,)), linear("lm_head", VOCABULARY, WIDTH)]


def gpt2() -> list[ModuleInfo]:
    modules = [
        ModuleInfo("transformer.wte", "embedding", (VOCABULARY, WIDTH)),
        ModuleInfo("transformer.wpe", "embedding", (VOCABULARY, WIDTH)),
    ]
    for layer in range(2):
        at = f"transformer.h.{layer}."
        modules += [
            ModuleInfo(at + "ln_1", "layer_norm", (WIDTH,), True),
            ModuleInfo(at + "attn.c_attn", "linear_t", (WIDTH, 3 * WIDTH), True),
            ModuleInfo(at + "attn.c_proj", "linear_t", (WIDTH, WIDTH), True),
            ModuleInfo(at + "ln_2", "layer_norm", (WIDTH,), True),
            ModuleInfo(at + "mlp.c_fc", "linear_t", (WIDTH, 4 * WIDTH), True),
            ModuleInfo(at + "mlp.c_proj", "linear_t", (4 * WIDTH, WIDTH), True),
        ]
    return [*modules, ModuleInfo("transformer.ln_f", "layer_norm", (WIDTH,)), linear("lm_head", VOCABULARY, WIDTH)]


def bert() -> list[ModuleInfo]:
    at = "bert.encoder.layer.0."
    return [
        ModuleInfo("bert.embeddings.word_embeddings", "embedding", (VOCABULARY, WIDTH)),
        ModuleInfo("bert.embeddings.position_embeddings", "embedding", (VOCABULARY, WIDTH)),
        linear(at + "attention.self.query", WIDTH, WIDTH, bias=True),
        linear(at + "attention.self.key", WIDTH, WIDTH, bias=True),
        linear(at + "attention.self.value", WIDTH, WIDTH, bias=True),
        linear(at + "attention.output.dense", WIDTH, WIDTH, bias=True),
        ModuleInfo(at + "attention.output.LayerNorm", "layer_norm", (WIDTH,), True),
        linear(at + "intermediate.dense", HIDDEN, WIDTH, bias=True),
        linear(at + "output.dense", WIDTH, HIDDEN, bias=True),
        ModuleInfo(at + "output.LayerNorm", "layer_norm", (WIDTH,), True),
        linear("bert.pooler.dense", WIDTH, WIDTH, bias=True),
    ]


def facts(kv: int = 12, model_type: str = "llama") -> ModelFacts:
    return ModelFacts(12, kv, VOCABULARY, model_type)


def styles(plan: TensorParallelPlan) -> dict[str, str]:
    return {entry.module.name: f"{entry.style} {entry.unit}".strip() for entry in plan.entries}


def test_llama() -> None:
    plan = plan_tensor_parallel(llama(kv=4), facts(4), 2, grain=16)
    found = styles(plan)
    at = "model.layers.1."
    assert found["model.embed_tokens"] == found["lm_head"] == "vocabulary vocabulary"
    assert found[at + "self_attn.q_proj"] == "column heads" and found[at + "self_attn.o_proj"] == "row heads"
    assert found[at + "self_attn.k_proj"] == found[at + "self_attn.v_proj"] == "column kv_heads"
    assert found[at + "mlp.gate_proj"] == found[at + "mlp.up_proj"] == "column features"
    assert found[at + "mlp.down_proj"] == "row features"
    assert found[at + "input_layernorm"] == "replicated"
    tensors = plan.tensors(1)
    assert tensors[at + "self_attn.q_proj.weight"] == (0, ((24, 48),)) == tensors[at + "self_attn.q_proj.bias"]
    assert tensors[at + "self_attn.o_proj.weight"] == (1, ((24, 48),))
    assert tensors[at + "input_layernorm.weight"] is None
    assert plan[at + "mlp.down_proj"].local_shape(0) == (WIDTH, 48)


def test_gpt2_keeps_positions_and_knows_its_transposed_weights() -> None:
    plan = plan_tensor_parallel(gpt2(), facts(model_type="gpt2"), 3, grain=16)
    found, at = styles(plan), "transformer.h.0."
    assert found["transformer.wpe"] == "replicated" and found["transformer.wte"] == "vocabulary vocabulary"
    assert found[at + "attn.c_attn"] == "column qkv" and found[at + "attn.c_proj"] == "row heads"
    assert found[at + "mlp.c_fc"] == "column features" and found[at + "mlp.c_proj"] == "row features"
    tensors = plan.tensors(1)
    assert tensors[at + "attn.c_attn.weight"] == (1, ((16, 32), (64, 80), (112, 128)))
    assert tensors[at + "attn.c_attn.bias"] == (0, ((16, 32), (64, 80), (112, 128)))
    assert tensors[at + "attn.c_proj.weight"] == (0, ((16, 32),)) and tensors[at + "attn.c_proj.bias"] is None
    assert plan[at + "attn.c_proj"].bias == "once" and plan[at + "ln_1"].bias == "whole"


def test_bert_rows_stand_before_layer_norms() -> None:
    plan = plan_tensor_parallel(bert(), facts(model_type="bert"), 2)
    found, at = styles(plan), "bert.encoder.layer.0."
    assert found[at + "attention.output.dense"] == "row heads" and found[at + "output.dense"] == "row features"
    assert found[at + "intermediate.dense"] == "column features"
    assert found["bert.pooler.dense"] == found["bert.embeddings.position_embeddings"] == "replicated"


def test_a_row_is_known_by_the_norm_alone() -> None:
    modules = [
        linear("h.0.attn.q_proj", WIDTH, WIDTH),
        linear("h.0.attn.k_proj", WIDTH, WIDTH),
        linear("h.0.attn.v_proj", WIDTH, WIDTH),
        linear("h.0.attn.mix", WIDTH, WIDTH),
        ModuleInfo("h.0.ln", "layer_norm", (WIDTH,)),
        linear("h.0.mlp.widen", HIDDEN, WIDTH),
        linear("h.0.mlp.narrow", WIDTH, HIDDEN),
        ModuleInfo("h.0.layer_norm", "norm", (WIDTH,)),
    ]
    found = styles(plan_tensor_parallel(modules, facts(), 2))
    assert found["h.0.attn.mix"] == "row heads" and found["h.0.mlp.narrow"] == "row features"


def test_fused_layouts() -> None:
    plan = plan_tensor_parallel(llama(kv=4, fused=True), facts(4, "phi3"), 2, grain=16)
    at = "model.layers.0."
    assert styles(plan)[at + "mlp.gate_up_proj"] == "column pair"
    assert plan.tensors(1)[at + "mlp.gate_up_proj.weight"] == (0, ((48, 96), (144, 192)))
    assert plan.tensors(0)[at + "self_attn.qkv_proj.weight"] == (0, ((0, 24), (48, 56), (64, 72)))
    grouped = plan_tensor_parallel(llama(kv=4, fused=True), facts(4, "falcon"), 2, grain=16)
    assert grouped.tensors(0)[at + "self_attn.qkv_proj.weight"] == (0, ((0, 40),))


def test_routers_stay_and_experts_are_split() -> None:
    modules = llama()
    at = "model.layers.0.block_sparse_moe."
    modules += [linear(at + "gate", 4, WIDTH)]
    for expert in range(2):
        modules += [linear(f"{at}experts.{expert}.{name}", HIDDEN, WIDTH) for name in ("w1", "w3")]
        modules += [linear(f"{at}experts.{expert}.w2", WIDTH, HIDDEN)]
    modules += [
        ModuleInfo("model.layers.1.mlp.experts.gate_up_proj", "linear", (4, 2 * HIDDEN, WIDTH)),
        ModuleInfo("model.layers.1.mlp.experts.down_proj", "linear", (4, WIDTH, HIDDEN)),
    ]
    plan = plan_tensor_parallel(modules, facts(), 2, grain=1)
    found = styles(plan)
    assert found[at + "gate"] == "replicated"
    assert found[at + "experts.1.w1"] == "column features" and found[at + "experts.1.w2"] == "row features"
    tensors = plan.tensors(1)
    assert tensors["model.layers.1.mlp.experts.gate_up_proj"] == (1, ((48, 96), (144, 192)))
    assert tensors["model.layers.1.mlp.experts.down_proj"] == (2, ((48, 96),))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([(12, 12), (12, 4), (12, 3), (12, 2), (12, 1), (9, 3)]),
    st.integers(1, 8),
    st.sampled_from([1, 8, 64]),
    st.sampled_from(["llama", "phi3", "falcon", "gpt2"]),
)
def test_every_weight_is_covered_once(heads: tuple[int, int], num_ranks: int, grain: int, family: str) -> None:
    """Each element is on one rank, key/value heads that are copied excepted; rows read what columns make."""
    num_heads, kv = (12, 12) if family == "gpt2" else heads
    modules = gpt2() if family == "gpt2" else llama(num_heads, kv, fused=family != "llama")
    plan = plan_tensor_parallel(modules, ModelFacts(num_heads, kv, VOCABULARY, family), num_ranks, grain=grain)
    for entry in plan.entries:
        if entry.style == "replicated":
            continue
        assert entry.dim is not None
        size = entry.module.shape[entry.dim]
        elements = [at for piece in entry.pieces for low, high in piece for at in range(low, high)]
        assert set(elements) == set(range(size))
        if not (plan.heads.copied and entry.unit in ("kv_heads", "qkv", "groups")):
            assert len(elements) == size
        else:
            assert len(elements) > size
        for rank, piece in enumerate(entry.pieces):
            assert piece and entry.local_shape(rank)[entry.dim] == sum(high - low for low, high in piece)
            if entry.unit in ("heads", "kv_heads", "qkv", "groups"):
                head_dim = entry.local_size(rank) and (WIDTH // 12 if family == "gpt2" else DIM)
                assert all(low % head_dim == 0 and high % head_dim == 0 for low, high in piece)
    for entry in plan.entries:
        parent = entry.module.name.rpartition(".")[0]
        if entry.unit == "features" and entry.style == "row":
            partner = next(one for one in plan.entries if one.module.name.startswith(parent) and one.style == "column")
            assert [piece[0] for piece in partner.pieces] == [piece[0] for piece in entry.pieces]
    if num_ranks == 1:
        assert plan.num_elements(0) == sum(_size(module) for module in modules)


def _size(module: ModuleInfo) -> int:
    return module.shape[0] * (module.shape[1] if len(module.shape) > 1 else 1)


def test_rules_go_first() -> None:
    modules = [*llama(), linear("model.layers.0.adapter", 8, WIDTH)]
    with pytest.raises(ModelError, match=r"adapter is column-parallel .* over 8 features, but no row-parallel"):
        plan_tensor_parallel(modules, facts(), 2)
    found = styles(plan_tensor_parallel(modules, facts(), 2, rules=[Rule("adapter$", "replicated")]))
    assert found["model.layers.0.adapter"] == "replicated"
    unknown = llama(fused=True)
    with pytest.raises(ModelError, match=r"qkv_proj is a fused .* not known for model type 'llama'; give Rule"):
        plan_tensor_parallel(unknown, facts(), 2)
    found = styles(plan_tensor_parallel(unknown, facts(), 2, rules=[Rule("qkv_proj", "column", "groups")]))
    assert found["model.layers.0.self_attn.qkv_proj"] == "column groups"


def test_what_cannot_be_split_is_said() -> None:
    at = "model.layers.0."
    with pytest.raises(ModelError, match="would share a group; use at most 12 ranks"):
        plan_tensor_parallel(llama(), facts(), 13)
    odd = [linear(at + "self_attn.q_proj", 50, WIDTH)]
    with pytest.raises(ModelError, match=r"self_attn\.q_proj has 50 features; expected a multiple of its 12 heads"):
        plan_tensor_parallel(odd, facts(), 2)
    alone = [linear(at + "mlp.down_proj", WIDTH, HIDDEN)]
    with pytest.raises(ModelError, match=r"down_proj is row-parallel .* over 96 features, but no column-parallel"):
        plan_tensor_parallel(alone, facts(), 2)
    small = [linear(at + "mlp.up_proj", 3, WIDTH), linear(at + "mlp.down_proj", WIDTH, 3)]
    with pytest.raises(ModelError, match=r"mlp\.up_proj: 3 features cannot be split over 4 ranks; use at most 3"):
        plan_tensor_parallel(small, facts(), 4)
    norm = [*llama(), ModuleInfo(at + "self_attn.q_norm", "norm", (WIDTH,))]
    with pytest.raises(ModelError, match="q_norm normalises all 12 heads together"):
        plan_tensor_parallel(norm, facts(), 2)
    plan_tensor_parallel([*llama(), ModuleInfo(at + "self_attn.q_norm", "norm", (DIM,))], facts(), 2)
    with pytest.raises(ModelError, match=r"model\.norm is of kind norm; only linear"):
        plan_tensor_parallel(llama(), facts(), 2, rules=[Rule(r"model\.norm", "column")])
    with pytest.raises(ModelError, match="0 ranks, grain 64"):
        plan_tensor_parallel(llama(), facts(), 0)


def test_a_plan_is_printed_before_it_runs() -> None:
    text = str(plan_tensor_parallel(llama(kv=2), facts(2), 3, grain=16))
    lines = text.splitlines()
    assert lines[0].split() == ["module", "count", "style", "shape", "per", "rank", "because"]
    assert "model.layers.*.self_attn.q_proj" in text and text.count("q_proj") == 1
    (down,) = [line for line in lines if "down_proj" in line]
    assert down.split()[:6] == ["model.layers.*.mlp.down_proj", "2", "row", "(features)", "48x96", "32/32/32"]
    (key,) = [line for line in lines if "k_proj" in line]
    assert "4/4/4" in key
    assert "elements of weights; each rank holds" in lines[-1]


def test_facts_of_configurations() -> None:
    config = SimpleNamespace(num_attention_heads=8, num_key_value_heads=2, vocab_size=9, model_type="llama")
    assert ModelFacts.from_config(config) == ModelFacts(8, 2, 9, "llama")
    assert ModelFacts.from_config(SimpleNamespace(n_head=4)).num_kv_heads == 4
    falcon = SimpleNamespace(num_attention_heads=8, num_kv_heads=8, multi_query=True, model_type="falcon")
    assert ModelFacts.from_config(falcon).num_kv_heads == 1
    mpt = SimpleNamespace(n_heads=8, attn_config=SimpleNamespace(kv_n_heads=4), model_type="mpt")
    assert ModelFacts.from_config(mpt).num_kv_heads == 4
    with pytest.raises(ModelError, match="SimpleNamespace has no number of attention heads"):
        ModelFacts.from_config(SimpleNamespace())


def test_planning_needs_no_torch() -> None:
    code = "import sys, ds_inference.tp.plan; print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
