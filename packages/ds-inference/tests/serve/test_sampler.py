"""The sampler against one plain row at a time, and what must not change with the batch."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_inference.errors import LogitsError
from ds_inference.serve.request import Request, SamplingParams
from ds_inference.serve.sampler import Sampled, SampleRow, sample, uniform


def plain(logits: list[float], row: SampleRow) -> int:
    """One row in loops, as the module's text says."""
    params, scores = row.params, list(logits)
    if params.repetition_penalty != 1:
        for token in set(row.seen):
            score, penalty = scores[token], torch.tensor(params.repetition_penalty)
            scores[token] = float(torch.tensor(score) / penalty if score > 0 else torch.tensor(score) * penalty)
    for token in row.banned:
        scores[token] = -math.inf
    greatest = max(scores)
    if params.temperature == 0:
        return scores.index(greatest)
    kept = {token: (score - greatest) / params.temperature for token, score in enumerate(scores) if score > -math.inf}
    if 0 < params.top_k < len(kept):
        limit = sorted(kept.values(), reverse=True)[params.top_k - 1]
        kept = {token: x for token, x in kept.items() if x >= limit}
    if params.top_p < 1:
        ordered = sorted(kept.values(), reverse=True)
        total = sum(math.exp(x) for x in ordered)
        before, limit = 0.0, ordered[0]
        for x in ordered:
            if before < params.top_p * total:
                limit = x
            before += math.exp(x)
        kept = {token: x for token, x in kept.items() if x >= limit}
    if params.min_p > 0:
        kept = {token: x for token, x in kept.items() if x >= math.log(params.min_p)}
    target, reached = uniform(row.seed, row.index) * sum(math.exp(x) for x in kept.values()), 0.0
    for token, x in sorted(kept.items()):
        reached += math.exp(x)
        if reached > target:
            return token
    raise AssertionError("the last token reaches all")


def random_row(source: random.Random, vocabulary: int) -> SampleRow:
    params = SamplingParams(
        temperature=source.choice([0, 0.3, 1.0, 2.5]),
        top_k=source.choice([0, -1, 1, 2, 5, 1000]),
        top_p=source.choice([1.0, 0.95, 0.6, 0.05]),
        min_p=source.choice([0.0, 0.0, 0.02, 0.3, 1.0]),
        repetition_penalty=source.choice([1.0, 1.0, 1.3, 0.7]),
        logprobs=source.choice([None, None, 0, 3]),
    )
    seen = [source.randrange(vocabulary) for _ in range(source.randrange(8))]
    banned = tuple(source.sample(range(vocabulary), source.randrange(3)))
    return SampleRow(params, source.getrandbits(64), source.randrange(100), seen, banned)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(4, 40), st.integers(1, 8))
def test_equals_one_plain_row_at_a_time(seed: int, vocabulary: int, num_rows: int) -> None:
    source = random.Random(seed)
    logits = torch.randn(num_rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    before = logits.clone()
    rows = [random_row(source, vocabulary) for _ in range(num_rows)]
    got = sample(logits, rows)
    assert torch.equal(logits, before)
    assert [one.token for one in got] == [plain(line, row) for line, row in zip(logits.tolist(), rows, strict=True)]
    for one, row, line in zip(got, rows, logits, strict=True):
        if row.params.logprobs is None:
            assert one.logprob is None and one.top == ()
            continue
        logprobs = line.log_softmax(-1)
        assert one.logprob == pytest.approx(float(logprobs[one.token]), abs=1e-6)
        assert [token for token, _ in one.top] == logprobs.topk(row.params.logprobs).indices.tolist()
        assert all(value == pytest.approx(float(logprobs[token]), abs=1e-6) for token, value in one.top)


@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_top_p_over_a_vocabulary_of_real_size(spread: float) -> None:
    """Flat, where the most likely thousand do not reach p, and peaked, where they do."""
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(1)) * spread
    rows = [SampleRow(SamplingParams(top_p=p), at, at) for at, p in enumerate((0.2, 0.9, 0.99, 0.6))]
    together = sample(logits, rows)
    assert [one.token for one in together] == [
        plain(line, row) for line, row in zip(logits.tolist(), rows, strict=True)
    ]
    assert [sample(logits[at : at + 1], [row])[0] for at, row in enumerate(rows)] == together


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_a_row_is_the_same_in_any_batch(seed: int) -> None:
    """Alone, in the middle, in another order: token and log-probabilities to the bit."""
    source = random.Random(seed)
    logits = torch.randn(7, 1003, generator=torch.Generator().manual_seed(seed)) * 2
    rows = [random_row(source, 1003) for _ in range(7)]
    together = sample(logits, rows)
    order = source.sample(range(7), 7)
    shuffled = sample(logits[order], [rows[at] for at in order])
    for place, at in enumerate(order):
        assert sample(logits[at : at + 1], [rows[at]]) == [together[at]] == [shuffled[place]]


def test_half_precision_logits_are_sampled_as_they_are() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = [random_row(random.Random(at), 50) for at in range(4)]
    assert sample(logits, rows) == sample(logits.float(), rows)


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    number = 8000
    rows = [SampleRow(SamplingParams(), seed=5, index=at) for at in range(number)]
    counts = Counter(one.token for one in sample(logits.expand(number, -1), rows))
    for token, probability in enumerate(logits.softmax(-1).tolist()):
        assert abs(counts[token] / number - probability) < 4 * math.sqrt(0.25 / number)
    assert counts[4] == 0


def test_the_uniform_numbers_are_uniform_and_streams_differ() -> None:
    for draws in ([uniform(3, at) for at in range(20_000)], [uniform(at, 0) for at in range(20_000)]):
        assert len(set(draws)) == len(draws) and min(draws) >= 0 and max(draws) < 1
        counts = Counter(int(draw * 20) for draw in draws)
        assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 50  # chi-squared, 19 degrees of freedom
    pairs = [(uniform(1, at) - 0.5) * (uniform(2, at) - 0.5) for at in range(20_000)]
    assert abs(sum(pairs) / len(pairs)) < 0.003
    assert uniform(0, 0) == uniform(0, 0) != uniform(2**64 - 1, 0)


def test_ties_stay_together_and_small_temperatures_do_not_overflow() -> None:
    logits = torch.tensor([[5.0, 5.0, 1.0]])
    tied = {sample(logits, [SampleRow(SamplingParams(top_k=1), 1, at)])[0].token for at in range(40)}
    assert tied == {0, 1}
    cold = SamplingParams(temperature=1e-300)
    assert sample(torch.tensor([[1.0, 88.0, 3e38]]), [SampleRow(cold, 1, 0)])[0].token == 2


def test_every_draw_of_a_request_is_its_own() -> None:
    request = Request("r", [1, 2], SamplingParams(seed=4, min_tokens=2, repetition_penalty=1.5), (7,))
    request.max_length = 10
    assert SampleRow.of(request) == SampleRow(request.params, 4, 0, [1, 2], (7,), "r", 2)
    logits = torch.zeros(1, 100)
    drawn = []
    for _ in range(6):
        drawn.append(sample(logits, [SampleRow.of(request)])[0].token)
        request.append(drawn[-1])
    again = Request("again", [1, 2], request.params, (7,))
    again.tokens += drawn[:3]
    assert sample(logits, [SampleRow.of(again)])[0].token == drawn[3] and len(set(drawn)) > 2


@pytest.mark.parametrize("logits", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
def test_logits_that_nothing_can_be_drawn_from(logits: list[float]) -> None:
    row: Any = SampleRow(SamplingParams(), 1, 0)
    with pytest.raises(LogitsError, match=r"row 1 \(request 'x'\) is (nan|inf|-inf)"):
        sample(torch.tensor([[0.0, 1.0], logits]), [row, SampleRow(SamplingParams(temperature=0), 1, 0, name="x")])
    with pytest.raises(LogitsError, match="row 0 is -inf"):
        sample(torch.zeros(1, 2), [SampleRow(SamplingParams(), 1, 0, banned=(0, 1))])


def test_shapes() -> None:
    assert sample(torch.zeros(0, 3), []) == []
    with pytest.raises(ValueError, match=r"shape \(2, 3\); expected \[1, vocabulary\]"):
        sample(torch.zeros(2, 3), [SampleRow(SamplingParams(), 1, 0)])
    assert sample(torch.zeros(1, 1), [SampleRow(SamplingParams(logprobs=5), 1, 0)]) == [Sampled(0, 0.0, ((0, 0.0),))]


def test_bias_presence_and_frequency_are_openai_s() -> None:
    """logit - count * frequency - (count > 0) * presence + bias, counted over the answer alone."""
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(
        temperature=0, presence_penalty=0.7, frequency_penalty=-0.4, logit_bias={2: 1.5, 5: -100, 99: 3.0}
    )
    answer = [1, 1, 1, 5, 6]
    expected = logits[1].clone()
    for token in range(8):
        expected[token] -= -0.4 * answer.count(token) + 0.7 * (token in answer)
    expected[2] += 1.5
    expected[5] -= 100
    plain = SamplingParams(temperature=0)
    rows = [
        SampleRow(plain, 0, 0),
        SampleRow(params, 0, 5, [3, 3, *answer], num_prompt=2),
        SampleRow(plain, 0, 0, [1, 1]),
    ]
    before = logits.clone()
    tokens = [one.token for one in sample(logits, rows)]
    assert tokens == [int(logits[0].argmax()), int(expected.argmax()), int(logits[2].argmax())]
    assert torch.equal(logits, before)
    for token in range(8):  # each one's score, one at a time: all others are pushed down
        others = {one: -100.0 for one in range(8) if one not in (token, 0)}
        pair = SamplingParams(temperature=0, presence_penalty=0.7, frequency_penalty=-0.4, logit_bias=others)
        row = SampleRow(pair, 0, 5, [3, 3, *answer], num_prompt=2)
        found = sample(logits[1:2], [row])[0].token
        shifted = logits[1] + 0.4 * torch.tensor([answer.count(one) for one in range(8)])
        shifted -= 0.7 * torch.tensor([one in answer for one in range(8)])
        assert found == (token if shifted[token] > shifted[0] else 0)
