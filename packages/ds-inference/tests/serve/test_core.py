"""Jobs on a pretend model: choices, text, stops, failures; nothing is left behind."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_fakes import END, VOCABULARY, FakeDecoder, alone, alphabet, greedy, make_core, scrambled

from ds_inference import Completion, Delta, SamplingParams, ServingCore
from ds_inference.errors import CapacityError, LogitsError, RequestError


def run(core: ServingCore) -> dict[str, dict[int, Completion]]:
    """Step to the end; the joined answers."""
    made: dict[str, dict[int, Completion]] = {}
    while core.has_work:
        join(made, core.step())
    return made


def join(made: dict[str, dict[int, Completion]], deltas: Iterable[Delta]) -> None:
    for delta in deltas:
        assert delta.error is None
        choices = made.setdefault(delta.job_id, {})
        choices.setdefault(delta.index, Completion(delta.index)).take(delta)


def check_empty(core: ServingCore) -> None:
    blocks = core.scheduler.blocks
    assert not core.has_work
    assert blocks.num_free == blocks.num_blocks
    assert core.scheduler.num_running == core.scheduler.num_waiting == 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.text("xyz", min_size=1, max_size=30), st.integers(1, 12), st.booleans()), min_size=1,
             max_size=10),
    st.integers(12, 40), st.booleans(), st.integers(8, 20), st.integers(0, 10**6),
)  # fmt: skip
def test_answers_do_not_depend_on_company(
    jobs: list[tuple[str, int, bool]], num_blocks: int, prefix_caching: bool, budget: int, seed: int
) -> None:
    """Whatever the order of arrival, the room (preemption) and the budget (split prompts): the answer is one's own."""
    core = make_core(num_blocks=num_blocks, prefix_caching=prefix_caching, max_tokens_per_step=budget)
    chance = random.Random(seed)
    made: dict[str, dict[int, Completion]] = {}
    for number, (prompt, max_tokens, stream) in enumerate(jobs):
        core.add(f"job{number}", list(prompt.encode()), greedy(max_tokens), stream=stream)
        for _ in range(chance.randrange(3)):
            join(made, core.step() if core.has_work else [])
    for job_id, choices in run(core).items():
        for index, choice in choices.items():
            whole = made.setdefault(job_id, {}).setdefault(index, Completion(index))
            whole.text += choice.text
            whole.token_ids += choice.token_ids
    for number, (prompt, max_tokens, _) in enumerate(jobs):
        expected = alone(list(prompt.encode()), max_tokens)
        answer = made[f"job{number}"][0]
        assert answer.token_ids == expected
        assert answer.text == bytes(token for token in expected if token != END).decode()
    check_empty(core)


@pytest.mark.parametrize(("budget", "num_blocks"), [(32, 256), (9, 256), (8, 24)], ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_prompts(budget: int, num_blocks: int, stream: bool) -> None:
    """In chunks, after the cache knows the prompt, preempted, of several choices: always the whole prompt's."""
    core = make_core(num_blocks=num_blocks, max_tokens_per_step=budget)
    prompts = [list(b"a prompt that is long enough for chunks"), [65], list(b"two"), list(b"a prompt that is long too")]
    wanted = [SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=top) for top in (2, 0, 1, 3)]
    for again in range(2):
        for at, (prompt, params) in enumerate(zip(prompts, wanted, strict=True)):
            core.add(f"{again}-{at}", prompt, params, n=1 + at, stream=stream)
        core.add(f"{again}-plain", prompts[0], greedy(4), stream=stream)
    made = run(core)
    check_empty(core)
    decoder = core.decoder
    assert isinstance(decoder, FakeDecoder)
    for job_id, choices in made.items():
        if job_id.endswith("plain"):
            assert choices[0].prompt_logprobs is None
            continue
        at = int(job_id[2:])
        prompt, top = prompts[at], wanted[at].prompt_logprobs
        assert top is not None and sorted(choices) == list(range(1 + at))
        for choice in choices.values():
            assert choice.token_ids == alone(prompt, 4) and choice.logprobs is None
            found = choice.prompt_logprobs
            assert found is not None and [one.token for one in found] == prompt
            assert found[0].logprob is None and found[0].top == ()
            for place, one in enumerate(found[1:], 1):
                exact = decoder._row(prompt[:place]).log_softmax(-1)
                assert one.logprob == pytest.approx(float(exact[prompt[place]]), abs=1e-5)
                best = exact.topk(max(1, top)).values.tolist()[:top]
                assert [value for _, value in one.top] == pytest.approx(best, abs=1e-5)
    assert core.scheduler.num_cached_tokens > 0, "others still share what was computed"


def test_choices_share_the_prompt_and_differ() -> None:
    core = make_core()
    prompt = list(b"a prompt that is long enough for several blocks")
    timing = core.add("one", prompt, SamplingParams(max_tokens=12, temperature=3.0, seed=5, ignore_eos=True), n=4)
    choices = run(core)["one"]
    assert sorted(choices) == [0, 1, 2, 3]
    assert len({tuple(choice.token_ids) for choice in choices.values()}) == 4
    # Computed: the prompt once, its last token once more for each fork, and what was generated.
    assert core.stats.computed_tokens == len(prompt) + 3 + 4 * 11
    assert timing.arrived <= timing.first_token <= timing.finished  # type: ignore[operator]
    again = make_core(prefix_caching=False)
    for index in (2, 0):
        again.add(f"alone{index}", prompt, SamplingParams(max_tokens=12, temperature=3.0, seed=5 + index,
                                                          ignore_eos=True))  # fmt: skip
    made = run(again)
    assert made["alone2"][0].token_ids == choices[2].token_ids
    check_empty(core)


def test_choices_when_the_first_ends_at_once_or_there_is_no_room_beside_it() -> None:
    core = make_core(max_running=2, max_queued=3)
    core.add("short", list(b"abc"), greedy(1), n=3)
    core.add("other", list(b"abd"), greedy(3, ignore_eos=True))
    made = run(core)
    assert [len(choice.token_ids) for choice in made["short"].values()] == [1, 1, 1]
    core.add("many", list(b"hello"), greedy(5, ignore_eos=True), n=3)
    assert len(run(core)["many"]) == 3
    check_empty(core)


def test_stop_strings_over_borders_of_tokens() -> None:
    core = make_core(alphabet)
    core.add("whole", list(b"-"), greedy(20, stop=("efg", "zz")))
    core.add("stream", list(b"-"), greedy(20, stop=("efg", "zz")), stream=True)
    made = run(core)
    for answer in (made["whole"][0], made["stream"][0]):
        assert (answer.text, answer.finish_reason, answer.stop) == ("abcd", "stop", "efg")
        assert bytes(answer.token_ids) == b"abcdefg"
    check_empty(core)


def test_text_that_only_began_like_a_stop_string_is_given_in_the_end() -> None:
    core = make_core(alphabet)
    core.add("one", list(b"-"), greedy(4, stop=("cde",)), stream=True)
    texts = []
    while core.has_work:
        texts += [delta.text for delta in core.step()]
    assert texts == ["a", "b", "", "cd"]


def test_min_tokens_and_stops() -> None:
    core = make_core(alphabet)
    core.add("one", list(b"-"), greedy(20, stop=("b", "f"), min_tokens=4))
    answer = run(core)["one"][0]
    assert (answer.text, answer.stop) == ("abcde", "f")


def test_end_tokens_are_tokens_and_no_text() -> None:
    core = make_core(alphabet)
    core.add("own", list(b"-"), greedy())
    core.add("given", list(b"-"), greedy(stop_token_ids=[ord("c")]))
    made = run(core)
    assert made["own"][0].token_ids[-1] == END
    assert made["own"][0].text == "abcdefghijklmnopqrstuvwxyz"
    assert (made["given"][0].text, made["given"][0].stop) == ("ab", ord("c"))
    assert bytes(made["given"][0].token_ids) == b"abc"


def test_logprobs_come_with_each_token_streamed_or_not() -> None:
    core = make_core()
    for name, stream in (("whole", False), ("stream", True)):
        core.add(name, list(b"prompt"), SamplingParams(max_tokens=5, logprobs=2, seed=1, ignore_eos=True),
                 stream=stream)  # fmt: skip
    made = run(core)
    whole, streamed = made["whole"][0], made["stream"][0]
    assert whole.logprobs == streamed.logprobs
    assert [one.token for one in whole.logprobs or ()] == whole.token_ids
    assert all(len(one.top) == 2 for one in whole.logprobs or ())


def test_a_row_without_logits_fails_alone() -> None:
    core = make_core()
    assert isinstance(core.decoder, FakeDecoder)
    core.decoder.broken = lambda text: bytes(text[:3]) == b"bad"
    core.add("bad", list(b"bad prompt"), greedy(5), n=2)
    core.add("good", list(b"good prompt"), greedy(5))
    errors, good = [], Completion(0)
    while core.has_work:
        for delta in core.step():
            if delta.job_id == "bad":
                errors.append(delta)
            else:
                good.take(delta)
    assert [(delta.index, type(delta.error), delta.last) for delta in errors] == [(0, LogitsError, True),
                                                                                   (1, LogitsError, True)]  # fmt: skip
    assert good.token_ids == alone(list(b"good prompt"), 5)
    check_empty(core)


def test_a_failed_step_fails_who_was_in_it() -> None:
    core = make_core(max_running=1)
    decoder = core.decoder
    assert isinstance(decoder, FakeDecoder)
    core.add("first", list(b"one"), greedy(5))
    core.add("second", list(b"two"), greedy(5))
    decoder.failing = MemoryError("no room")
    (delta,) = core.step()
    assert (delta.job_id, delta.error) == ("first", decoder.failing)
    decoder.failing = None
    assert run(core)["second"][0].token_ids == alone(list(b"two"), 5)
    assert core.stats.failed_steps == 1
    check_empty(core)


def test_steps_that_keep_failing_end_it() -> None:
    core = make_core(max_running=1)
    assert isinstance(core.decoder, FakeDecoder)
    core.decoder.failing = OSError("the device is gone")
    for number in range(5):
        core.add(f"job{number}", list(b"abc"), greedy(2))
    core.step()
    core.step()
    with pytest.raises(RuntimeError, match=r"3 steps in a row.*the device is gone"):
        core.step()
    check_empty(core)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_abort(steps: int) -> None:
    core = make_core()
    core.add("gone", list(b"a longer prompt"), greedy(50, ignore_eos=True), n=3)
    core.add("stays", list(b"a longer one"), greedy(8))
    made: dict[str, dict[int, Completion]] = {}
    for _ in range(steps):
        join(made, core.step())
    core.abort("gone")
    core.abort("gone")
    assert not core.has("gone")
    for choices in run(core).values():
        join(made, [Delta("stays", 0, one.text, tuple(one.token_ids)) for one in choices.values()])
    assert made["stays"][0].token_ids == alone(list(b"a longer one"), 8)
    assert "gone" not in made
    check_empty(core)


def test_what_can_never_be_served_is_refused() -> None:
    core = make_core(max_queued=4)
    prompt = list(b"abc")
    for wrong, match in (
        (lambda: core.add("x", [VOCABULARY], greedy(1)), "vocabulary"),
        (lambda: core.add("x", [], greedy(1)), "empty"),
        (lambda: core.add("x", [1] * 256, greedy(1)), "at most 255"),
        (lambda: core.add("x", prompt, greedy(254)), "ask for at most 253"),
        (lambda: core.add("x", prompt, greedy(1), n=0), "n is 0"),
        (lambda: core.add("x", prompt, greedy(1), n=5), "max_queued"),
    ):
        with pytest.raises(RequestError, match=match):
            wrong()
    core.add("x", prompt, greedy(1), n=4)
    with pytest.raises(RequestError, match="there already"):
        core.add("x", prompt, greedy(1))
    core.add("y", prompt, greedy(1), n=3)
    with pytest.raises(CapacityError, match="max_queued"):
        core.add("z", prompt, greedy(1), n=3)
    run(core)
    check_empty(core)


def test_without_a_tokenizer_there_are_tokens_only() -> None:
    core = make_core()
    core.codec = None
    with pytest.raises(RequestError, match="stop_token_ids"):
        core.add("x", [1, 2], greedy(3, stop="a"))
    core.add("x", [1, 2], greedy(3))
    answer = run(core)["x"][0]
    assert (answer.text, answer.token_ids) == ("", alone([1, 2], 3, scrambled))


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_ten_thousand_requests_leave_nothing_behind() -> None:
    """Objects and memory after 2,000 and after 10,000 requests of all kinds."""
    core = make_core(num_blocks=64, max_running=32, max_tokens_per_step=128)
    chance = random.Random(0)
    counts = []
    for number in range(10_000):
        prompt = chance.choices(range(97, 123), k=chance.randrange(1, 12))
        stop = ("ab",) if number % 5 == 0 else ()
        core.add(str(number), prompt, SamplingParams(max_tokens=3, temperature=float(number % 2), stop=stop),
                 stream=number % 3 == 0)  # fmt: skip
        if number % 7 == 0:
            core.abort(str(number - 3))
        while core.num_jobs > 40:
            core.step()
        if number in (2_000, 9_999):
            run(core)
            gc.collect()
            counts.append((len(gc.get_objects()), resident_kib()))
    check_empty(core)
    assert counts[1][0] - counts[0][0] < 500
    assert counts[1][1] - counts[0][1] < 4096
