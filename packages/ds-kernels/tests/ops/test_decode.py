"""decode and bind_decode against the specification in fp64, over what a decoder may be made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_kernels import (
    DecodeLayer,
    DecodeModel,
    KernelArgumentError,
    Norm,
    Projection,
    QuantizedWeight,
    RopeTable,
    bind_decode,
    decode,
    quantize_weight,
    use_backend,
)
from ds_kernels._cpu.launch import HAS_NUMBA
from ds_kernels.ops.decode import composed, eager, reference
from ds_kernels.ops.linear import cpu as linear_cpu

needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass
class Sizes:
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    inner: int = 96
    vocabulary: int = 101
    layers: int = 2
    positions: int = 600


@dataclasses.dataclass
class Variant:
    """What differs from a plain Llama; `weight` turns a random matrix into what the model holds."""

    dtype: torch.dtype = torch.float32
    norm: str = "rms"
    norm_offset: float = 0.0
    bias: bool = False
    parallel: bool = False
    head_norms: bool = False
    sandwich: bool = False
    rotary: float = 1.0
    window: int | None = None
    learned: int | None = None
    weight: Callable[[Tensor], Any] | None = None
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


def build(sizes: Sizes, v: Variant) -> DecodeModel:
    def matrix(*shape: int) -> Any:
        made = (torch.randn(shape) / shape[-1] ** 0.5).to(v.dtype)
        return made if v.weight is None else v.weight(made)

    def norm(features: int) -> Norm:
        bias = torch.randn(features).to(v.dtype) * 0.1 if v.norm == "layer" else None
        return Norm((torch.rand(features) + 0.5).to(v.dtype), bias, 1e-5, v.norm, v.norm_offset)  # type: ignore[arg-type]

    def projection(outputs: int, columns: int) -> Projection:
        return Projection(matrix(outputs, columns), torch.randn(outputs).to(v.dtype) * 0.1 if v.bias else None)

    s, fields = sizes, {"activation": "silu", "gated": True, **v.fields}
    width = int(s.head_dim * v.rotary) // 2
    angles = torch.arange(s.positions)[:, None] * 10000.0 ** -(torch.arange(width) / max(1, width))[None]
    rope = RopeTable(angles.cos().contiguous(), angles.sin().contiguous()) if width else None
    layers = [
        DecodeLayer(
            norm(s.hidden),
            projection((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden),
            projection(s.hidden, s.heads * s.head_dim),
            None if v.parallel else norm(s.hidden),
            projection(s.inner * (2 if fields["gated"] else 1), s.hidden),
            projection(s.hidden, s.inner),
            query_norm=norm(s.head_dim) if v.head_norms else None,
            key_norm=norm(s.head_dim) if v.head_norms else None,
            attention_out_norm=norm(s.hidden) if v.sandwich else None,
            mlp_out_norm=norm(s.hidden) if v.sandwich else None,
            rope=rope,
            window=v.window if number % 2 == 0 else None,
        )
        for number in range(s.layers)
    ]
    if v.learned is not None:
        table = torch.randn(s.positions + v.learned, s.hidden).to(v.dtype) * 0.5
        fields |= {"positions": table, "position_offset": v.learned}
    embedding = matrix(s.vocabulary, s.hidden)
    head = projection(s.vocabulary, s.hidden) if v.bias else Projection(embedding)
    return DecodeModel(embedding, layers, norm(s.hidden), head, s.heads, s.kv_heads, s.head_dim, **fields)


@dataclasses.dataclass
class State:
    """Caches with random contexts in scattered blocks, and the inputs of one step over them."""

    k: list[Tensor]
    v: list[Tensor]
    inputs: tuple[Tensor, ...]

    def copy(self, dtype: torch.dtype | None = None) -> State:
        k, v = ([cache.clone().to(dtype or cache.dtype) for cache in caches] for caches in (self.k, self.v))
        return State(k, v, self.inputs)


def state(sizes: Sizes, dtype: torch.dtype, lengths: list[int], block: int = 16, unwritten: int | None = None) -> State:
    """Lengths count the new key; the row `unwritten` has slot -1, so its last key is what the cache holds."""
    per = [-(-length // block) for length in lengths]
    blocks, most = sum(per) + 2, max(1, *per) if len(per) > 1 else max(1, per[0])
    shape = (blocks, sizes.kv_heads, block, sizes.head_dim)
    k, v = ([torch.randn(shape).to(dtype) for _ in range(sizes.layers)] for _ in range(2))
    order, tables = torch.randperm(blocks).tolist(), torch.full((len(lengths), most), -3, dtype=torch.int32)
    slots = torch.full((len(lengths),), -1)
    for row, length in enumerate(lengths):
        own, order = order[: per[row]], order[per[row] :]
        tables[row, : per[row]] = torch.tensor(own, dtype=torch.int32)
        if length and row != unwritten:
            slots[row] = own[(length - 1) // block] * block + (length - 1) % block
    context = torch.tensor(lengths, dtype=torch.int32)
    tokens = torch.randint(0, sizes.vocabulary, (len(lengths),))
    return State(k, v, (tokens, (context - 1).clamp(min=0).long(), slots, tables, context))


def widened(model: DecodeModel) -> DecodeModel:
    """The same model in fp64 (the embedding's factor rounded as the original's dtype asks)."""

    def one(value: Any) -> Any:
        if isinstance(value, QuantizedWeight):
            return value.dequantize(torch.float64)
        if isinstance(value, Tensor):
            return value.double()
        if isinstance(value, (Norm, Projection, RopeTable, DecodeLayer)):
            return dataclasses.replace(
                value, **{f.name: one(getattr(value, f.name)) for f in dataclasses.fields(value)}
            )
        return [one(each) for each in value] if isinstance(value, list) else value

    fields = {field.name: one(getattr(model, field.name)) for field in dataclasses.fields(model)}
    return DecodeModel(**fields | {"embedding_scale": reference.scale_of(model)})


def check(model: DecodeModel, start: State, tolerance: float, run: Callable[..., Tensor] | None = None) -> Tensor:
    """Logits and caches of a run are those of the specification."""
    mine, exact = start.copy(), start.copy(torch.float64)
    if run is None:
        got = bind_decode(model, mine.k, mine.v, len(start.inputs[0]))(*mine.inputs).clone()
    else:
        got = run(model, *mine.inputs, mine.k, mine.v)
    expected = reference.decode(widened(model), *exact.inputs, exact.k, exact.v)
    assert got.dtype == torch.float32 and got.shape == (len(start.inputs[0]), model.head.weight.shape[0])
    scale = float(expected.abs().max())
    assert (got - expected).abs().max() <= tolerance * scale, f"off by {(got - expected).abs().max() / scale:.2e}"
    eps = max(torch.finfo(start.k[0].dtype).eps, tolerance)
    for caches, others in ((mine.k, exact.k), (mine.v, exact.v)):
        for cache, other in zip(caches, others, strict=True):
            torch.testing.assert_close(cache.double(), other, rtol=2 * eps, atol=4 * tolerance + eps)
    return got


VARIANTS: dict[str, Variant] = {
    "llama": Variant(),
    "biases": Variant(bias=True),
    "gpt2": Variant(norm="layer", bias=True, rotary=0, learned=0, fields={"activation": "gelu_tanh", "gated": False}),
    "opt": Variant(norm="layer", bias=True, rotary=0, learned=2, fields={"activation": "relu", "gated": False}),
    "phi": Variant(
        norm="layer", bias=True, parallel=True, rotary=0.5, fields={"activation": "gelu_tanh", "gated": False}
    ),
    "qwen3": Variant(head_norms=True),
    "gemma2": Variant(
        norm_offset=1.0,
        sandwich=True,
        window=7,
        fields={
            "activation": "gelu_tanh",
            "embedding_scale": 64**0.5,
            "attention_scale": 0.2,
            "attention_softcap": 3.0,
            "logit_softcap": 2.0,
        },
    ),
    "gelu": Variant(fields={"activation": "gelu"}),
    "window": Variant(window=20),
    "parallel sandwich": Variant(parallel=True, sandwich=True),
}


@needs_numba
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name: str) -> None:
    torch.manual_seed(0)
    sizes = Sizes()
    model = build(sizes, VARIANTS[name])
    check(model, state(sizes, torch.float32, [19, 1, 40]), 2e-5)


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(hidden=72, heads=3, kv_heads=1, head_dim=24, inner=100, vocabulary=7),
        Sizes(hidden=40, heads=5, kv_heads=1, head_dim=80, inner=33, vocabulary=130),
        Sizes(hidden=33, heads=2, kv_heads=2, head_dim=10, inner=5, vocabulary=50),
        Sizes(hidden=576, heads=9, kv_heads=3, head_dim=64, inner=1536, vocabulary=300, layers=1),
    ],
    ids=str,
)
def test_odd_sizes(sizes: Sizes, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = build(sizes, Variant(dtype=dtype, bias=True))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2  # 16-bit caches: a key may round the other way
    check(model, state(sizes, dtype, [5, 33]), tolerance)
    check(model, state(sizes, torch.float32, [5, 33]), 2e-5)


@needs_numba
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("block", [1, 16, 600])
def test_rows_and_blocks(rows: int, block: int) -> None:
    torch.manual_seed(rows)
    sizes = Sizes()
    lengths = torch.randint(1, 300, (rows,)).tolist()
    check(build(sizes, Variant()), state(sizes, torch.float32, lengths, block), 2e-5)


@needs_numba
@pytest.mark.parametrize("length", [64, 65, 2048, 2049, 5000])
def test_long_contexts_are_split(length: int) -> None:
    torch.manual_seed(0)
    sizes = Sizes(positions=5001)
    check(build(sizes, Variant(window=3000)), state(sizes, torch.float32, [length, 3]), 2e-5)


@needs_numba
def test_padding_and_rows_that_write_nothing() -> None:
    torch.manual_seed(0)
    sizes = Sizes()
    start = state(sizes, torch.float32, [0, 17, 30], unwritten=2)
    assert start.inputs[2].tolist()[0] == start.inputs[2].tolist()[2] == -1
    check(build(sizes, Variant()), start, 2e-5)


@needs_numba
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_quantised(bits: int, symmetric: bool, rows: int) -> None:
    torch.manual_seed(0)
    sizes = Sizes(hidden=72, inner=100, vocabulary=99)
    weight = lambda matrix: quantize_weight(matrix, bits, group_size=32, symmetric=symmetric)  # noqa: E731
    model = build(sizes, Variant(bias=True, weight=weight))
    start = state(sizes, torch.float32, [9] * rows)
    exact = check(model, start, 5e-4)
    mine = start.copy()
    rough = bind_decode(model, mine.k, mine.v, rows, activation_bits=8)(*start.inputs)
    error = (rough - exact).abs().max() / exact.abs().max()
    assert 1e-4 < error < 0.1, "8-bit activations err, but not much"


@needs_numba
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_a_row_does_not_depend_on_the_others_nor_on_threads(kind: str) -> None:
    torch.manual_seed(0)
    sizes = Sizes(hidden=576, heads=9, kv_heads=3, head_dim=64, inner=160)
    model = build(sizes, Variant(dtype=torch.bfloat16, weight=quantize_weight if kind == "int8" else None))
    start = state(sizes, torch.bfloat16, [5, 200, 31, 77, 9])
    before = torch.get_num_threads()
    try:
        together = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            mine = start.copy()
            together.append(bind_decode(model, mine.k, mine.v, 8)(*start.inputs).clone())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together[0], together[1]) and torch.equal(together[0], together[2])
    for row in range(5):
        mine = start.copy()
        alone = bind_decode(model, mine.k, mine.v, 8)(*(part[row : row + 1] for part in start.inputs))
        assert torch.equal(alone[0], together[0][row])


@needs_numba
def test_a_program_is_a_loop_over_living_weights() -> None:
    torch.manual_seed(0)
    sizes = Sizes()
    model, start = build(sizes, Variant()), state(sizes, torch.float32, [12])
    mine = start.copy()
    program = bind_decode(model, mine.k, mine.v, 2)
    assert program.rows == 2
    first = program(*start.inputs)
    before = first.clone()
    model.layers[0].down.weight.mul_(2.0)  # type: ignore[union-attr]
    second = program(*start.inputs)
    assert second.data_ptr() == first.data_ptr() and not torch.equal(second, before)
    check(model, start, 2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_decode_as_a_composition(backend: str, name: str) -> None:
    torch.manual_seed(0)
    sizes = Sizes(layers=1) if backend == "triton" else Sizes()
    model = build(sizes, VARIANTS[name])
    check(model, state(sizes, torch.float32, [19, 1, 40]), 1e-4, composed.decode)


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of CPUs without numba, also where there is one."""
    monkeypatch.setattr(eager, "HAS_NUMBA", False)
    monkeypatch.setattr(linear_cpu, "HAS_NUMBA", False)


@pytest.mark.usefixtures("without_numba")
@pytest.mark.parametrize(
    "name", [name for name, variant in VARIANTS.items() if "attention_softcap" not in variant.fields]
)
@pytest.mark.parametrize(
    ("lengths", "block"), [([19, 1, 40], 16), ([19, 1, 40], 600), ([33], 16), ([33], 600), ([16, 16], 16)], ids=str
)
def test_steps_without_numba(name: str, lengths: list[int], block: int) -> None:
    torch.manual_seed(0)
    sizes = Sizes()
    model, start = build(sizes, VARIANTS[name]), state(sizes, torch.float32, lengths, block)
    assert eager.takes_eager(model, composed.OneEach(*start.inputs))
    check(model, start, 1e-4, composed.decode)


@pytest.mark.usefixtures("without_numba")
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_without_numba(rows: int, dtype: torch.dtype) -> None:
    """Few rows of bf16 go to torch's product with a vector; the greatest logits are not rounded to 16 bits."""
    torch.manual_seed(0)
    sizes = Sizes(vocabulary=1000)
    model, start = build(sizes, Variant(dtype=dtype, norm_offset=1.0)), state(sizes, dtype, [9, 30, 31][:rows])
    logits = check(model, start, 3e-2, composed.decode)
    greatest = logits.topk(100).values
    assert (greatest != greatest.to(dtype)).float().mean() > 0.5
    mine = start.copy()
    exact = composed.decode(model, *start.inputs, *([part.float() for part in side] for side in (mine.k, mine.v)))
    assert (exact - logits).abs().max() <= 3e-2 * exact.abs().max(), "caches of another dtype"


@pytest.mark.usefixtures("without_numba")
def test_rows_that_write_nothing_and_padding_without_numba() -> None:
    torch.manual_seed(0)
    sizes = Sizes()
    check(build(sizes, Variant()), state(sizes, torch.float32, [4, 17, 30], unwritten=2), 1e-4, composed.decode)
    check(build(sizes, Variant()), state(sizes, torch.float32, [0, 17, 30], unwritten=2), 1e-4, composed.decode)


@pytest.mark.usefixtures("without_numba")
@pytest.mark.parametrize(
    ("which", "value", "text"), [(2, 1 << 40, "slots"), (3, 99, "block"), (3, -1, "block"), (4, 99, "context_lens")]
)
def test_an_index_out_of_range_without_numba(which: int, value: int, text: str) -> None:
    sizes = Sizes()
    model, start = build(sizes, Variant()), state(sizes, torch.float32, [12])
    mine, inputs = start.copy(), [part.clone() for part in start.inputs]
    inputs[which].fill_(value)
    with pytest.raises(KernelArgumentError, match=text):
        composed.decode(model, *inputs, mine.k, mine.v)
    assert all(torch.equal(a, b) for a, b in zip(mine.k, start.k, strict=True))


def test_composition_of_quantised_embeddings() -> None:
    torch.manual_seed(0)
    sizes = Sizes(hidden=72, inner=100)
    for bits, symmetric in ((8, True), (4, False)):
        weight = lambda matrix, b=bits, s=symmetric: quantize_weight(matrix, b, group_size=32, symmetric=s)  # noqa: E731
        check(build(sizes, Variant(weight=weight)), state(sizes, torch.float32, [19, 3]), 5e-4, composed.decode)


def test_decode_takes_every_backend() -> None:
    torch.manual_seed(0)
    sizes = Sizes()
    model, start = build(sizes, Variant()), state(sizes, torch.float32, [12, 3])
    results = []
    for name in ("reference", "cpu"):
        with use_backend(name):
            results.append(check(model, start, 1e-4, decode))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@needs_numba
@pytest.mark.parametrize(
    ("which", "value", "text"),
    [
        (0, 101, "vocabulary"),
        (0, -1, "vocabulary"),
        (1, 600, "positions"),
        (2, 1 << 40, "slots"),
        (3, 99, "block"),
        (4, 99, "context_lens"),
    ],
)
def test_an_index_out_of_range_is_an_error_and_changes_nothing(which: int, value: int, text: str) -> None:
    sizes = Sizes()
    model, start = build(sizes, Variant()), state(sizes, torch.float32, [12])
    mine, inputs = start.copy(), [part.clone() for part in start.inputs]
    inputs[which].fill_(value)
    with pytest.raises(KernelArgumentError, match=text):
        bind_decode(model, mine.k, mine.v)(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(mine.k, start.k, strict=True))


def test_what_does_not_fit_is_named() -> None:
    sizes = Sizes()
    model, start = build(sizes, Variant()), state(sizes, torch.float32, [12])
    with pytest.raises(KernelArgumentError, match="max_rows"):
        bind_decode(model, start.k, start.v, 0)
    with pytest.raises(KernelArgumentError, match="caches"):
        decode(model, *start.inputs, start.k[:1], start.v)
    broken = dataclasses.replace(model, layers=[dataclasses.replace(model.layers[0], down=model.layers[0].up)] * 2)
    with pytest.raises(KernelArgumentError, match="layer 0: "):
        decode(broken, *start.inputs, start.k, start.v)
    if HAS_NUMBA:
        with pytest.raises(KernelArgumentError, match="rows"):
            bind_decode(model, start.k, start.v, 1)(*state(sizes, torch.float32, [1, 1]).inputs)
        double = dataclasses.replace(model, final_norm=Norm(model.final_norm.weight.double()))
        with pytest.raises(KernelArgumentError, match="float64"):
            bind_decode(double, start.k, start.v)
