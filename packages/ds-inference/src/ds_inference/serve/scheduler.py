"""Continuous batching: which tokens of which requests the next step computes, as data. No tensors here.

A **step** is one pass of the model over a ragged batch. `plan` makes it, `update` takes what was sampled. A step has a
budget of tokens: first every decoding request gets its one token, then prompts are read in **chunks** with what is left
(split prefill), so that a long prompt neither waits for the others nor makes them wait. New requests are admitted in
order of arrival, once the cache has room for their whole text so far and one block for each that runs.

When blocks run out, the youngest running request is **preempted** by an older one: it lets go of its blocks and later
computes its tokens again (of which the prefix cache may still hold most); tokens that were generated stay.

Invariants: everything that runs arrived before everything that waits, and both are in order of arrival; so the oldest
request is never preempted and always advances, and every request finishes. A request never writes a block that another
one shares. A plan that was made is carried out whole: nothing in it is taken back. The work per planned token is O(1).
Sources: Yu et al. 2022 (Orca); Kwon et al. 2023 (arXiv:2309.06180); Holmes et al. 2024, "DeepSpeed-FastGen"
(arXiv:2401.08671) for split prefill.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ds_inference.errors import CapacityError, RequestError
from ds_inference.serve.blocks import BlockManager
from ds_inference.serve.request import FinishReason, Request, RequestState

__all__ = ["Progress", "Scheduler", "SchedulerLimits", "StepPlan", "Work"]


@dataclass(frozen=True)
class SchedulerLimits:
    """What a scheduler may have on its hands at a time."""

    max_length: int
    """Tokens of a request, prompt and answer together: the model's length."""
    max_tokens_per_step: int = 512
    """Budget of a step; at least `max_running`, so that everything that runs can advance."""
    max_running: int = 64
    """Requests in a step."""
    max_queued: int = 1024
    """Requests waiting; more are refused by CapacityError."""
    max_queued_tokens: int = 1 << 22
    """Tokens of all waiting requests together."""

    def __post_init__(self) -> None:
        for name, value, low in (
            ("max_length", self.max_length, 2),
            ("max_running", self.max_running, 1),
            ("max_tokens_per_step", self.max_tokens_per_step, self.max_running),
            ("max_queued", self.max_queued, 1),
            ("max_queued_tokens", self.max_queued_tokens, 1),
        ):
            if value < low:
                beside = " (max_running)" if name == "max_tokens_per_step" else ""
                raise ValueError(f"{name} is {value}; expected at least {low}{beside}")


@dataclass(frozen=True)
class Work:
    """What a step computes for one request: tokens start .. start + len(tokens) - 1 of its text."""

    request: Request
    start: int
    tokens: tuple[int, ...]
    block_table: Sequence[int]
    """The blocks of the request's text in order, as many as hold `context` tokens. The request's own list: it only
    grows while the request runs, and the request takes another one when it stops running."""
    slots: tuple[int, ...]
    """Where each token's key and value are written: block * block_size + place in the block."""
    samples: bool
    """Whether the last of the tokens is followed by a new one, to be sampled."""

    @property
    def scored(self) -> int:
        """How many of the tokens, from the first on, are followed by one of the prompt whose probability is wanted."""
        if self.request.params.prompt_logprobs is None:
            return 0
        return max(0, min(len(self.tokens), self.request.num_prompt - 1 - self.start))

    @property
    def context(self) -> int:
        """Keys that the last token sees, its own included."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class StepPlan:
    """One step: its work, decoding requests first."""

    work: tuple[Work, ...]
    copies: tuple[tuple[int, int], ...]
    """Blocks to copy, (from, to) in this order, before anything is written."""
    preempted: tuple[Request, ...]
    """Requests that lost their blocks while this plan was made."""

    @property
    def num_tokens(self) -> int:
        return sum(len(work.tokens) for work in self.work)

    @property
    def sampling(self) -> tuple[Work, ...]:
        """The work that samples, in the order in which `update` takes the tokens."""
        return tuple(work for work in self.work if work.samples)


@dataclass(frozen=True)
class Progress:
    """One new token of a request, and why the request has ended, if it has."""

    request: Request
    token: int
    finish_reason: FinishReason | None


class Scheduler:
    """Queue, running requests and their blocks. Not thread-safe: one thread plans and updates.

    Nothing but the scheduler may hold blocks of `blocks`.
    """

    def __init__(self, blocks: BlockManager, limits: SchedulerLimits) -> None:
        self.blocks = blocks
        self.limits = limits
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        """Prompt tokens that were found in the cache and not computed, since the start."""
        self._requests: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._num_arrived = 0
        self._num_queued_tokens = 0
        self._planned: StepPlan | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Queue a new request.

        RequestError when it could never be served (too long for the model or the cache, a number that is taken),
        CapacityError when the queue is full.
        """
        self._check_new(request)
        if self.num_waiting >= self.limits.max_queued:
            raise CapacityError(f"{self.num_waiting} requests are waiting, the limit (max_queued); try again later")
        queued = self._num_queued_tokens + request.num_prompt
        if queued > self.limits.max_queued_tokens and self._waiting:
            raise CapacityError(
                f"{queued} tokens would be waiting, the limit (max_queued_tokens) is {self.limits.max_queued_tokens}; "
                "try again later"
            )
        request.order = (self._num_arrived, 0)
        self._num_arrived += 1
        self._requests[request.request_id] = request
        self._waiting.append(request)
        self._num_queued_tokens = queued

    def check_size(self, num_prompt: int, max_tokens: int | None, who: str = "the request") -> None:
        """RequestError when a prompt of this length and its answer could never be served. Any thread may ask."""
        room, whose = self._room
        if num_prompt >= room:
            raise RequestError(
                f"{who} has a prompt of {num_prompt} tokens; expected at most {room - 1} "
                f"({whose} is {room}, and the answer needs one)"
            )
        if max_tokens is not None and num_prompt + max_tokens > room:
            raise RequestError(
                f"{who} asks for {max_tokens} tokens after a prompt of {num_prompt}; {whose} is {room}: "
                f"ask for at most {room - num_prompt}, or for None"
            )

    @property
    def _room(self) -> tuple[int, str]:
        """Tokens of the longest request, and what sets this limit."""
        cache = self.blocks.num_blocks * self.blocks.block_size
        if self.limits.max_length <= cache:
            return self.limits.max_length, "the model's length"
        return cache, "the size of the cache"

    def fork(self, parent_id: str, child: Request) -> bool:
        """Add a request with the prompt of one that runs: it shares the blocks of what is computed of that prompt.

        It runs at once, beside its parent. When that is not possible (the parent does not run or has computed nothing,
        max_running is reached, an older branch was preempted and waits), it is queued like any other; the return value
        says whether it shares.
        """
        parent = self._requests.get(parent_id)
        if parent is None or parent.prompt != child.prompt or parent.cache_salt != child.cache_salt:
            raise RequestError(f"request {child.request_id!r} cannot be forked from {parent_id!r}; expected a request "
                               "of the same prompt and salt that has not finished")  # fmt: skip
        # The last token is computed by each: its logits are what the answer starts from.
        num_shared = min(parent.num_computed, parent.num_prompt - 1)
        branches = (one.order[1] for one in self._requests.values() if one.order[0] == parent.order[0])
        order = (parent.order[0], max(branches) + 1)
        overtakes = bool(self._waiting) and self._waiting[0].order < order
        if num_shared == 0 or overtakes or self.num_running >= self.limits.max_running:
            self.add(child)
            return False
        self._check_new(child)
        table = parent.block_table[: self.blocks.blocks_for(num_shared)]
        for block in table:
            self.blocks.hold(block)
        child.order, child.state = order, RequestState.RUNNING
        child.num_computed, child.block_table = num_shared, table
        child.num_cached = num_shared
        self.num_cached_tokens += num_shared
        self._requests[child.request_id] = child
        insort(self._running, child, key=_order)
        return True

    def plan(self) -> StepPlan:
        """The next step; its work is empty only when there is nothing to do. `update` (or `restart`) must follow."""
        if self._planned is not None:
            raise RuntimeError("the last plan was not carried out; call update with its tokens, or restart, first")
        step = _Step(self.limits.max_tokens_per_step)
        running = list(self._running)
        for request in running:
            if request.num_pending == 1:
                self._advance(request, step)
        for request in running:
            if request.num_pending > 1 and step.budget:
                self._advance(request, step)
        while self._waiting and step.budget and not step.short and self._admit(self._waiting[0], step):
            pass
        self._planned = StepPlan(tuple(step.work.values()), tuple(step.copies), tuple(step.preempted))
        return self._planned

    def update(self, plan: StepPlan, sampled: Sequence[int]) -> list[Progress]:
        """The step is done: `sampled` has a token for each of `plan.sampling`, in its order.

        Returns what each request got, without those that were finished from outside meanwhile.
        """
        if plan is not self._planned:
            raise RuntimeError("update got a plan that is not the last one made; plans are carried out one by one")
        sampling = plan.sampling
        if len(sampled) != len(sampling):
            raise ValueError(f"{len(sampled)} sampled tokens; expected {len(sampling)}, one per work that samples")
        self._planned = None
        for work in plan.work:
            if work.request.state is RequestState.RUNNING:
                self._computed(work.request, work.context)
        made = []
        for work, token in zip(sampling, sampled, strict=True):
            request = work.request
            if request.state is RequestState.RUNNING:
                reason = request.append(token)
                if reason is not None:
                    self._finish(request, reason)
                made.append(Progress(request, token, reason))
        return made

    def finish(self, request_id: str, reason: FinishReason = "abort") -> None:
        """End a request from outside, at any time: a stop string was seen, or the caller gave up. Unknown ones pass."""
        if request_id in self._requests:
            self._finish(self._requests[request_id], reason)

    def restart(self) -> None:
        """Drop a plan that failed: everything that runs waits again and is computed anew. No token is lost.

        The cache's content is to be forgotten too (`blocks.clear_cache`) when it is the weights that have changed.
        """
        self._planned = None
        while self._running:
            self._preempt(self._running[-1])

    def _check_new(self, request: Request) -> None:
        name = request.request_id
        if request.state is not RequestState.WAITING or name in self._requests:
            raise RequestError(
                f"request {name!r} is there already; expected an id that is not in use, and a new Request"
            )
        wanted = request.params.max_tokens
        self.check_size(request.num_prompt, wanted, f"request {name!r}")
        request.max_length = self._room[0] if wanted is None else request.num_prompt + wanted

    def _advance(self, request: Request, step: _Step) -> None:
        """Plan as many of a running request's tokens as fit, preempting younger ones when not even one does."""
        while request.state is RequestState.RUNNING:
            if num_tokens := self._fitting(request, step.budget):
                step.short = step.short or num_tokens < min(request.num_pending, step.budget)
                self._take(request, num_tokens, step)
                return
            step.short = True
            youngest = self._running[-1]
            if youngest is request or youngest.request_id in step.work:
                return  # wait: room comes when those planned end, and nobody new is admitted until then
            self._preempt(youngest)
            step.preempted.append(youngest)

    def _admit(self, request: Request, step: _Step) -> bool:
        """Start the first of the queue if there is room for all of its text so far."""
        if self.num_running >= self.limits.max_running:
            return False
        known = self._known_prefix(request)
        promised = sum(self.blocks.blocks_for(len(one.tokens)) - len(one.block_table) for one in self._running)
        needed = self.blocks.blocks_for(len(request.tokens)) - sum(self.blocks.count(block) > 0 for block in known)
        if self._running and needed + promised + self.num_running > self.blocks.num_free:
            return False
        self._waiting.popleft()
        self._num_queued_tokens -= len(request.tokens)
        for block in known:
            self.blocks.hold(block)
        request.state, request.block_table = RequestState.RUNNING, known
        request.num_computed = len(known) * self.blocks.block_size
        if request.num_preemptions == 0:
            request.num_cached = request.num_computed
            self.num_cached_tokens += request.num_computed
        self._running.append(request)
        self._take(request, self._fitting(request, step.budget), step)
        return True

    def _known_prefix(self, request: Request) -> list[int]:
        """The longest run of full blocks that the cache knows, short of the last token, which has to be computed."""
        known: list[int] = []
        if self.blocks.prefix_caching and request.params.prompt_logprobs is None:
            for index in range((len(request.tokens) - 1) // self.blocks.block_size):
                block = self.blocks.find(request.digest(index, self.blocks.block_size))
                if block is None:
                    break
                known.append(block)
        return known

    def _fitting(self, request: Request, budget: int) -> int:
        """How many pending tokens there are blocks and budget for."""
        free = self.blocks.num_free
        begun = len(request.block_table) * self.blocks.block_size - request.num_computed
        if begun and self.blocks.count(request.block_table[-1]) > 1:
            if free == 0:
                return 0
            free -= 1  # for the copy
        return min(request.num_pending, budget, begun + free * self.blocks.block_size)

    def _take(self, request: Request, num_tokens: int, step: _Step) -> None:
        """Give a request the blocks for its next tokens and put them into the step."""
        start, size, table = request.num_computed, self.blocks.block_size, request.block_table
        end = start + num_tokens
        if start < len(table) * size:
            shared = table[-1]
            table[-1] = self.blocks.make_writable(shared)
            if table[-1] != shared:
                step.copies.append((shared, table[-1]))
        while len(table) * size < end:
            table.append(self.blocks.allocate())
        slots = tuple(table[at // size] * size + at % size for at in range(start, end))
        samples = end == len(request.tokens)
        step.work[request.request_id] = Work(request, start, tuple(request.tokens[start:end]), table, slots, samples)
        step.budget -= num_tokens

    def _computed(self, request: Request, end: int) -> None:
        size, first = self.blocks.block_size, request.num_computed // self.blocks.block_size
        request.num_computed = end
        if self.blocks.prefix_caching:
            for index in range(first, end // size):
                self.blocks.register(request.block_table[index], request.digest(index, size))

    def _preempt(self, request: Request) -> None:
        self._let_go(request)
        request.state = RequestState.WAITING
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.appendleft(request)
        self._num_queued_tokens += len(request.tokens)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.state is RequestState.RUNNING:
            self._let_go(request)
        else:
            self._waiting.remove(request)
            self._num_queued_tokens -= len(request.tokens)
        request.state, request.finish_reason = RequestState.FINISHED, reason
        del self._requests[request.request_id]

    def _let_go(self, request: Request) -> None:
        """A running request gives back its blocks."""
        self._running.remove(request)
        self.blocks.release(request.block_table)
        request.block_table, request.num_computed = [], 0


class _Step:
    """A plan while it is made."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.work: dict[str, Work] = {}
        self.copies: list[tuple[int, int]] = []
        self.preempted: list[Request] = []
        self.short = False
        """Blocks have run out: nobody is admitted."""


def _order(request: Request) -> tuple[int, int]:
    return request.order
