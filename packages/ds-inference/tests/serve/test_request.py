"""Sampling values and requests: what is refused, when a request ends, what names a block."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_inference.errors import RequestError
from ds_inference.serve.request import Request, SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.0),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("min_tokens", None),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 1e300),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", ((1, 101),)),
        ("logit_bias", ((-1, 1),)),
        ("logit_bias", (1,)),
        ("logit_bias", 1),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", ("a", "")),
        ("stop", 3),
        ("stop", ("x",) * 17),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", 5),
        ("ignore_eos", 1),
        ("logprobs", 65),
        ("logprobs", True),
    ],
)
def test_bad_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams.from_dict({name: value})


def test_good_values_at_the_edges() -> None:
    params = SamplingParams(temperature=0, top_k=-1, top_p=1, min_p=1, seed=2**64 - 1, stop=["a"], logprobs=0)
    assert params.greedy and params.stop == ("a",)
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(max_tokens=3, min_tokens=3).min_tokens == 3


def test_values_that_contradict_or_do_not_exist() -> None:
    with pytest.raises(RequestError, match="min_tokens is 4; expected an int from 0 to 3"):
        SamplingParams(max_tokens=3, min_tokens=4)
    with pytest.raises(RequestError, match=r"'temprature' is unknown; known are .*temperature"):
        SamplingParams.from_dict({"temprature": 1})


@pytest.mark.parametrize("prompt", [[], [1, -1], [1, 2.0], [True], [2**63]])
def test_bad_prompts(prompt: list[int]) -> None:
    with pytest.raises(RequestError, match="request 'r'"):
        Request("r", prompt)


def test_end_tokens_are_banned_and_not_obeyed_before_min_tokens() -> None:
    request = Request("r", [5], SamplingParams(min_tokens=2, stop_token_ids=(7,)), eos_token_ids=(0,))
    request.max_length = 10
    assert request.banned == (0, 7)
    assert request.append(3) is None and request.banned == (0, 7)
    assert request.append(3) is None and request.banned == ()
    assert request.append(7) == "stop"
    assert request.output == [3, 3, 7] and request.num_output == 3 and request.num_prompt == 1


def test_ignore_eos_and_length() -> None:
    request = Request("r", [5], SamplingParams(ignore_eos=True), eos_token_ids=(0,))
    request.max_length = 3
    assert request.append(0) is None
    assert request.append(0) == "length"


def test_seeds() -> None:
    assert Request("r", [1], SamplingParams(seed=9)).seed == 9
    drawn = {Request("r", [1]).seed for _ in range(20)}
    assert len(drawn) == 20


tokens = st.lists(st.integers(0, 3), min_size=4, max_size=16)


@given(tokens, tokens, st.sampled_from([1, 2, 4]), st.sampled_from([b"", b"a"]), st.sampled_from([b"", b"a"]))
def test_digests_are_equal_exactly_where_prefixes_are(
    left: list[int], right: list[int], size: int, salt: bytes, other_salt: bytes
) -> None:
    a, b = Request("a", left, cache_salt=salt), Request("b", right, cache_salt=other_salt)
    for index in range(min(len(left), len(right)) // size):
        end = (index + 1) * size
        same = left[:end] == right[:end] and salt == other_salt
        assert (a.digest(index, size) == b.digest(index, size)) == same


def test_digests_do_not_depend_on_how_they_are_asked_for() -> None:
    a, b = Request("a", range(1, 13)), Request("b", range(1, 13))
    last = a.digest(2, 4)
    assert [b.digest(index, 4) for index in range(3)] == [*a.digests] and a.digests[2] == last


def test_the_scheduling_half_needs_no_torch() -> None:
    code = "import sys, ds_inference.serve.scheduler; print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
