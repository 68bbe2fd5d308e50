"""The scheduler drives a pretend model whose cache is a list of slots, checked at every token that it reads.

The model's next token is a function of all tokens before it, read from the cache through the block table. A block that
was shared, freed, evicted, copied or written wrongly therefore shows as another token, or at once as a wrong slot.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_inference.errors import CapacityError, RequestError
from ds_inference.serve.blocks import BlockManager
from ds_inference.serve.request import Request, RequestState, SamplingParams
from ds_inference.serve.scheduler import Progress, Scheduler, SchedulerLimits, StepPlan

VOCABULARY = 5
END = 0


def next_token(tokens: Sequence[int], seed: int = 0) -> int:
    return random.Random(repr((list(tokens), seed))).randrange(VOCABULARY)


def alone(prompt: Sequence[int], params: SamplingParams, eos: tuple[int, ...], room: int, seed: int) -> list[int]:
    """What the request gives when nothing else is served: the reference."""
    request = Request("alone", prompt, params, eos)
    request.max_length = room if params.max_tokens is None else len(prompt) + params.max_tokens
    while request.append(next_token(request.tokens, seed)) is None:
        pass
    return request.output


@dataclass
class World:
    """A scheduler and the pretend cache it plans for."""

    num_blocks: int = 8
    block_size: int = 4
    prefix_caching: bool = True
    limits: SchedulerLimits = field(default_factory=lambda: SchedulerLimits(max_length=32, max_tokens_per_step=8,
                                                                            max_running=4))  # fmt: skip

    def __post_init__(self) -> None:
        self.blocks = BlockManager(self.num_blocks, self.block_size, prefix_caching=self.prefix_caching)
        self.scheduler = Scheduler(self.blocks, self.limits)
        self.slots: list[int | None] = [None] * (self.num_blocks * self.block_size)
        self.seeds: dict[str, int] = {}
        self.made: dict[str, list[int]] = {}
        self.first_tokens: list[str] = []

    def compute(self, plan: StepPlan) -> list[int]:
        """Carry out a plan, checking all that a plan promises."""
        size = self.block_size
        assert plan.num_tokens <= self.limits.max_tokens_per_step
        assert len({work.request.request_id for work in plan.work}) == len(plan.work) <= self.limits.max_running
        for source, target in plan.copies:
            self.slots[target * size : (target + 1) * size] = self.slots[source * size : (source + 1) * size]
        for work in plan.work:
            assert work.tokens and work.start + len(work.tokens) <= len(work.request.tokens)
            assert list(work.tokens) == work.request.tokens[work.start : work.context]
            assert len(work.block_table) == -(-work.context // size)
            for at, slot, token in zip(range(work.start, work.context), work.slots, work.tokens, strict=True):
                assert slot == work.block_table[at // size] * size + at % size
                assert self.blocks.count(slot // size) == 1, "a shared block is written"
                self.slots[slot] = token
        sampled = []
        for work in plan.work:
            read = [self.slots[work.block_table[at // size] * size + at % size] for at in range(work.context)]
            assert read == work.request.tokens[: work.context]
            assert work.samples == (work.context == len(work.request.tokens))
            if work.samples:
                sampled.append(next_token(work.request.tokens, self.seeds.get(work.request.request_id, 0)))
        return sampled

    def step(self) -> list[Progress]:
        plan = self.scheduler.plan()
        assert plan.work, "nothing is planned although there is work"
        got = self.scheduler.update(plan, self.compute(plan))
        for progress in got:
            name = progress.request.request_id
            if progress.request.num_output == 1:
                self.first_tokens.append(name)
            self.made.setdefault(name, []).append(progress.token)
        self.check()
        return got

    def check(self) -> None:
        """Queue and blocks are as the module says."""
        running, waiting = self.scheduler._running, list(self.scheduler._waiting)
        orders = [request.order for request in [*running, *waiting]]
        assert orders == sorted(orders), "order of arrival is not kept"
        assert self.scheduler._num_queued_tokens == sum(len(request.tokens) for request in waiting)
        held: dict[int, int] = {}
        for request in running:
            assert len(request.block_table) == self.blocks.blocks_for(request.num_computed)
            for block in request.block_table:
                held[block] = held.get(block, 0) + 1
        assert not any(request.block_table or request.num_computed for request in waiting)
        assert [self.blocks.count(block) for block in range(self.num_blocks)] == [
            held.get(block, 0) for block in range(self.num_blocks)
        ]

    def finish_all(self, limit: int = 20_000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                assert self.blocks.num_free == self.num_blocks, "blocks leak"
                assert self.scheduler.num_running == self.scheduler.num_waiting == 0
                return
            self.step()
        raise AssertionError("requests starve")


@st.composite
def worlds(draw: st.DrawFn) -> World:
    size = draw(st.sampled_from([1, 2, 4]))
    num_blocks = draw(st.integers(-(-12 // size), 40 // size))
    running = draw(st.integers(1, 5))
    limits = SchedulerLimits(
        max_length=draw(st.integers(12, 40)),
        max_running=running,
        max_tokens_per_step=draw(st.integers(running, 12)),
    )
    return World(num_blocks, size, draw(st.booleans()), limits)


# Prompts share prefixes often: few tokens, and pieces that come again.
piece = st.sampled_from([[1, 2, 3, 4], [1, 2, 3, 4, 1, 2, 3, 4], [1, 2], [3], [4, 4, 4, 4], [2, 1]])
prompts = st.lists(piece, min_size=1, max_size=3).map(lambda pieces: [token for one in pieces for token in one][:9])
arrivals = st.lists(
    st.tuples(
        prompts, st.integers(1, 20) | st.none(), st.integers(0, 6), st.sampled_from(["run", "fork", "abort", "restart"])
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=400, deadline=None)
@given(worlds(), arrivals)
def test_every_request_gets_the_tokens_it_would_get_alone(
    world: World, asked: list[tuple[list[int], int | None, int, str]]
) -> None:
    """Random arrivals, forks, aborts and restarts, with blocks for little more than one request."""
    scheduler, room = world.scheduler, min(world.limits.max_length, world.num_blocks * world.block_size)
    expected: dict[str, list[int]] = {}
    aborted: set[str] = set()
    for number, (prompt, wanted, pause, what) in enumerate(asked):
        wanted = None if wanted is None else min(wanted, room - len(prompt))
        params = SamplingParams(max_tokens=wanted, min_tokens=0)
        name = str(number)
        world.seeds[name] = number % 3
        expected[name] = alone(prompt, params, (END,), room, world.seeds[name])
        request = Request(name, prompt, params, (END,))
        scheduler.add(request)
        for _ in range(pause):
            if scheduler.has_work:
                world.step()
        live = [*scheduler._running, *scheduler._waiting]
        if what == "fork" and live:
            parent, child = live[0], f"{name}'"  # the oldest: its branch comes before younger ones that run
            running = parent.state is RequestState.RUNNING
            world.seeds[child] = 7
            expected[child] = alone(parent.prompt, parent.params, (END,), room, 7)
            shares = scheduler.fork(parent.request_id, Request(child, parent.prompt, parent.params, (END,)))
            assert not shares or running
            world.check()
        elif what == "abort":
            scheduler.finish(name)
            aborted.add(name)
        elif what == "restart":
            scheduler.restart()
    world.finish_all()
    for name, tokens in expected.items():
        made = world.made.get(name, [])
        assert made == tokens if name not in aborted else made == tokens[: len(made)]


def test_first_tokens_come_in_order_of_arrival() -> None:
    """With prompts of one length nobody overtakes, however tight the cache."""
    world = World(
        num_blocks=6, block_size=2, limits=SchedulerLimits(max_length=12, max_tokens_per_step=5, max_running=5)
    )
    for number in range(30):
        world.scheduler.add(Request(str(number), [1 + number % 4, 2, 3], SamplingParams(max_tokens=8)))
    world.finish_all()
    assert world.first_tokens == [str(number) for number in range(30)]
    assert world.scheduler.num_preemptions > 0


def test_a_long_prompt_is_read_in_chunks_beside_decoding() -> None:
    world = World(
        num_blocks=20, block_size=4, limits=SchedulerLimits(max_length=64, max_tokens_per_step=6, max_running=4)
    )
    world.scheduler.add(Request("short", [1, 2], SamplingParams(max_tokens=30)))
    world.step()
    world.scheduler.add(Request("long", [3] * 22, SamplingParams(max_tokens=2)))
    chunks = []
    while "long" not in world.first_tokens:
        plan = world.scheduler.plan()
        assert plan.work[0].request.request_id == "short" and plan.work[0].samples  # never waits
        chunks.append(len(plan.work[1].tokens))
        for progress in world.scheduler.update(plan, world.compute(plan)):
            world.first_tokens.append(progress.request.request_id)
    assert chunks == [5, 5, 5, 5, 2]


def test_a_known_prefix_is_not_computed_again() -> None:
    world = World(
        num_blocks=20, block_size=4, limits=SchedulerLimits(max_length=64, max_tokens_per_step=64, max_running=4)
    )
    text = [1, 2, 3, 4, 1, 1, 2, 2, 3, 3]
    world.scheduler.add(Request("a", text, SamplingParams(max_tokens=1)))
    world.finish_all()
    again = Request("b", text, SamplingParams(max_tokens=1))
    other = Request("c", text, SamplingParams(max_tokens=1), cache_salt=b"another tenant")
    whole = Request("d", text[:8], SamplingParams(max_tokens=1))  # its last token must be computed all the same
    for request in (again, other, whole):
        world.scheduler.add(request)
    plan = world.scheduler.plan()
    assert [work.start for work in plan.work] == [8, 0, 4] == [again.num_cached, other.num_cached, whole.num_cached]
    world.scheduler.update(plan, world.compute(plan))
    assert world.scheduler.num_cached_tokens == 12


def test_a_fork_shares_the_prompt_and_copies_what_it_writes() -> None:
    world = World(
        num_blocks=20, block_size=4, limits=SchedulerLimits(max_length=64, max_tokens_per_step=64, max_running=4)
    )
    parent = Request("a", [1, 2, 3, 4, 1, 2], SamplingParams(max_tokens=6))
    world.scheduler.add(parent)
    world.step()
    child = Request("b", [1, 2, 3, 4, 1, 2], SamplingParams(max_tokens=6))
    assert world.scheduler.fork("a", child)
    assert child.num_computed == 5 and child.block_table == parent.block_table
    plan = world.scheduler.plan()
    assert [len(work.tokens) for work in plan.work] == [1, 1] and len(plan.copies) == 1
    assert child.block_table[0] == parent.block_table[0] and child.block_table[1] != parent.block_table[1]
    world.scheduler.update(plan, world.compute(plan))
    world.finish_all()
    with pytest.raises(RequestError, match="'c' cannot be forked from 'a'"):
        world.scheduler.fork("a", Request("c", [1, 2]))


def test_the_copy_of_a_shared_block_is_counted() -> None:
    """A branch of a prompt half read: one block is free, and the copy takes it."""
    limits = SchedulerLimits(max_length=16, max_tokens_per_step=9, max_running=2)
    world = World(num_blocks=4, block_size=4, limits=limits)
    prompt = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3]
    world.scheduler.add(Request("a", prompt, SamplingParams(max_tokens=1)))
    world.step()
    assert world.scheduler.fork("a", Request("b", prompt, SamplingParams(max_tokens=1)))
    world.finish_all()
    assert world.made["a"] == world.made["b"]


def test_the_oldest_is_never_preempted() -> None:
    world = World(
        num_blocks=4, block_size=4, limits=SchedulerLimits(max_length=16, max_tokens_per_step=4, max_running=4)
    )
    requests = [Request(str(number), [1], SamplingParams(max_tokens=15)) for number in range(4)]
    for request in requests:
        world.scheduler.add(request)
    world.finish_all()
    assert requests[0].num_preemptions == 0 and sum(request.num_preemptions for request in requests) > 0
    assert all(request.finish_reason == "length" and request.num_output == 15 for request in requests)


def test_what_can_never_be_served_is_refused() -> None:
    world = World(num_blocks=4, block_size=4)
    with pytest.raises(RequestError, match=r"prompt of 16 tokens; expected at most 15 .the size of the cache is 16"):
        world.scheduler.add(Request("a", [1] * 16))
    with pytest.raises(RequestError, match=r"asks for 9 tokens after a prompt of 8; .*at most 8"):
        world.scheduler.add(Request("a", [1] * 8, SamplingParams(max_tokens=9)))
    request = Request("a", [1])
    world.scheduler.add(request)
    assert request.max_length == 16
    with pytest.raises(RequestError, match="'a' is there already"):
        world.scheduler.add(Request("a", [1]))
    with pytest.raises(RequestError, match=r"prompt of 9 tokens; expected at most 7 .the model's length"):
        World(limits=SchedulerLimits(max_length=8)).scheduler.add(Request("b", [1] * 9))


def test_the_queue_has_limits() -> None:
    limits = SchedulerLimits(max_length=32, max_tokens_per_step=8, max_running=1, max_queued=2, max_queued_tokens=10)
    world = World(limits=limits)
    world.scheduler.add(Request("a", [1] * 20))  # too much, but alone
    with pytest.raises(CapacityError, match="21 tokens would be waiting"):
        world.scheduler.add(Request("b", [1]))
    world.step()
    world.scheduler.add(Request("b", [1] * 5))
    world.scheduler.add(Request("c", [1] * 5))
    with pytest.raises(CapacityError, match="2 requests are waiting"):
        world.scheduler.add(Request("d", [1]))
    world.finish_all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_length", 1), ("max_running", 0), ("max_tokens_per_step", 63), ("max_queued", 0), ("max_queued_tokens", 0)],
)
def test_limits_are_checked(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; expected at least"):
        SchedulerLimits(**{"max_length": 8, name: value})


def test_plans_are_carried_out_one_by_one() -> None:
    world = World()
    world.scheduler.add(Request("a", [1, 2]))
    plan = world.scheduler.plan()
    with pytest.raises(RuntimeError, match="was not carried out"):
        world.scheduler.plan()
    with pytest.raises(ValueError, match="0 sampled tokens; expected 1"):
        world.scheduler.update(plan, [])
    world.scheduler.update(plan, world.compute(plan))
    with pytest.raises(RuntimeError, match="not the last one made"):
        world.scheduler.update(plan, [1])


def test_a_request_may_end_while_its_step_runs() -> None:
    world = World()
    for name in "ab":
        world.scheduler.add(Request(name, [1, 2]))
    plan = world.scheduler.plan()
    sampled = world.compute(plan)
    world.scheduler.finish("a")
    world.scheduler.finish("nobody")
    assert [progress.request.request_id for progress in world.scheduler.update(plan, sampled)] == ["b"]
    world.check()
    world.finish_all()


def test_a_step_that_failed_costs_no_token() -> None:
    world = World()
    request = Request("a", [1, 2, 3], SamplingParams(max_tokens=6))
    world.scheduler.add(request)
    world.step()
    world.scheduler.plan()
    world.scheduler.restart()
    world.check()
    assert request.state is RequestState.WAITING and request.num_output == 1
    world.finish_all()
    assert world.made["a"] == alone([1, 2, 3], request.params, (), 32, 0)


def calls_of(function: Callable[[], object]) -> int:
    """Calls made in `function`, of Python's and of C's: a measure of work that no clock disturbs."""
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_a_token_costs_the_same_at_any_length() -> None:
    limits = SchedulerLimits(max_length=4096, max_tokens_per_step=4096, max_running=8)
    world = World(num_blocks=1024, block_size=16, limits=limits)
    for number in range(8):
        world.scheduler.add(Request(str(number), [1 + number % 4] * (16 * number + 1)))
    costs = []
    for _ in range(1500):
        plans: list[StepPlan] = []
        costs.append(calls_of(lambda plans=plans: plans.append(world.scheduler.plan())))  # type: ignore[misc]
        tokens = [1] * len(plans[0].sampling)
        costs[-1] += calls_of(lambda plan=plans[0], tokens=tokens: world.scheduler.update(plan, tokens))  # type: ignore[misc]
    assert max(costs[1000:]) <= max(costs[100:200])
