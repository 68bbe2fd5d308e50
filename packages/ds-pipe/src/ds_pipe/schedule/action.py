"""The words of a schedule: `Action`, `Schedule`, and where chunks of the model live.

Vocabulary. The model is cut into *virtual stages* 0 .. num_stages x num_chunks - 1, in model order. A *stage* is one
rank of the pipeline and holds `num_chunks` of them; *chunk* c of a stage is its c-th virtual stage in model order.
`placement[k]` is the stage that holds virtual stage k. The kinds of work on one micro-batch and one chunk:

    F  forward                 B  whole backward (input and weight gradients together)
    I  input gradient          W  weight gradient (any time after its I)

Invariants. A training schedule has, for each micro-batch and chunk, either {F, B} or {F, I, W}; a forward-only one has
{F}. Weight gradients (B or W) of a chunk come in ascending order of micro-batches, so that accumulation adds in the
order of the unsplit model. An activation is *live* from the start of its F to the end of its B or W (forward only: of
its F). Everything here is plain data: no torch, no ranks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from ds_pipe.errors import ScheduleError

__all__ = ["Action", "Kind", "Schedule", "check_sizes", "looped_placement"]

Kind = Literal["F", "B", "I", "W"]

_CODE = re.compile(r"(?P<stage>\d+)(?P<kind>[FBIW])(?P<micro_batch>\d+)(?:/(?P<chunk>\d+))?")


class Action(NamedTuple):
    """One piece of work: `kind` on `micro_batch` with the stage's `chunk`.

    Prints as a code: `2F0` is stage 2, forward, micro-batch 0, chunk 0; `2F0/1` the same for chunk 1.
    """

    kind: Kind
    stage: int
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}" + (f"/{self.chunk}" if self.chunk else "")

    @classmethod
    def parse(cls, code: str) -> Action:
        """The action that prints as `code`; ScheduleError when there is none."""
        found = _CODE.fullmatch(code)
        if found is None:
            raise ScheduleError(f"{code!r} is no action; expected stage, kind and micro-batch such as 2F0, or 2F0/1")
        kind: Kind = found["kind"]  # type: ignore[assignment]  # one of the four by the pattern
        return cls(kind, int(found["stage"]), int(found["micro_batch"]), int(found["chunk"] or 0))


@dataclass(frozen=True)
class Schedule:
    """Who does what in which order: one tuple of actions per stage, and what the generator claims of it.

    `placement[k]` is the stage of virtual stage k (len = num_stages x num_chunks). `peak_live[s]` is the claim: the
    most activations, counted in (micro-batch, chunk) pairs, that stage s ever holds at once; `validate` proves it.
    """

    name: str
    num_stages: int
    num_micro_batches: int
    num_chunks: int
    placement: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]
    peak_live: tuple[int, ...]

    @property
    def num_virtual_stages(self) -> int:
        return self.num_stages * self.num_chunks

    @property
    def num_actions(self) -> int:
        return sum(map(len, self.actions))

    @cached_property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """Per stage, the virtual stages of its chunks 0, 1, ... in model order."""
        held: list[list[int]] = [[] for _ in range(self.num_stages)]
        for virtual, stage in enumerate(self.placement):
            held[stage].append(virtual)
        return tuple(map(tuple, held))

    @cached_property
    def splits_backward(self) -> bool:
        """Whether backward comes as I and W instead of B."""
        return any(action.kind == "I" for action in self.actions[0])

    @cached_property
    def forward_only(self) -> bool:
        return all(action.kind == "F" for action in self.actions[0])

    def __str__(self) -> str:
        head = f"{self.name}: {self.num_stages} stages, {self.num_micro_batches} micro-batches"
        return "\n".join([head, *(" ".join(map(str, actions)) for actions in self.actions)])


def looped_placement(num_stages: int, num_chunks: int = 1) -> tuple[int, ...]:
    """Virtual stages dealt to the stages in turn: 0 1 .. p-1 0 1 .. p-1."""
    return tuple(range(num_stages)) * num_chunks


def check_sizes(name: str, num_stages: int, num_micro_batches: int) -> None:
    """ScheduleError unless there is at least one stage and one micro-batch."""
    for what, value in (("num_stages", num_stages), ("num_micro_batches", num_micro_batches)):
        if value < 1:
            raise ScheduleError(f"{name}: {what} is {value}; expected at least 1")
