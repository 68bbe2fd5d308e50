"""The least time of any schedule under a memory bound, by exhaustive search in unit time; for small p and m only.

Micro-batches are alike, so a state is how many F, I and W each virtual stage has done (ascending order loses nothing)
and, where a backward is whole, whether a stage is in its second unit of B. At each tick every stage does one unit of
something it may do, or waits: all combinations are followed, breadth first, so the first time at which all is done is
the optimum. A state that another reached at the same tick dominates (everywhere at least as far, memory no tighter)
is kept all the same: the search is meant to be obviously right.
"""

from __future__ import annotations

from itertools import product

State = tuple[tuple[int, ...], ...]


def optimum(placement: tuple[int, ...], num_micro_batches: int, bound: tuple[int, ...], *, split: bool) -> int:
    """Ticks of the fastest schedule with F = I = W = 1 (B = 2 when not `split`) and at most `bound[s]` live on stage s.

    `split`: backward is I and W, else B: its gradient counts as done after both of its units.
    """
    num_virtual, num_stages = len(placement), max(placement) + 1
    held = [[k for k in range(num_virtual) if placement[k] == s] for s in range(num_stages)]
    goal: State = tuple((num_micro_batches,) * 3 for _ in range(num_virtual))
    states: set[State] = {tuple((0, 0, 0) for _ in range(num_virtual))}
    ticks = 0
    while goal not in states:
        assert states, "the bound leaves no schedule at all"
        following: set[State] = set()
        for state in states:
            options = [_options(state, s, held[s], num_micro_batches, bound[s], split) for s in range(num_stages)]
            for moves in product(*options):
                after = [list(counts) for counts in state]
                for move in moves:
                    if move is not None:
                        after[move[0]][move[1]] += 1
                following.add(tuple(map(tuple, after)))
        states = following
        ticks += 1
    return ticks


def _options(
    state: State, stage: int, held: list[int], num_micro_batches: int, bound: int, split: bool
) -> list[tuple[int, int] | None]:
    """What `stage` can do for one tick: (virtual stage, 0 for F, 1 for I, 2 for W), or None for waiting."""
    arrived = 1 if split else 2
    options: list[tuple[int, int] | None] = []
    for k in held:
        done_f, done_i, done_w = state[k]
        if not split and done_i > done_w:
            return [(k, 2)]  # in the middle of a B: it goes on
        if (
            done_f < num_micro_batches
            and (k == 0 or state[k - 1][0] > done_f)
            and sum(state[j][0] - state[j][2] for j in held) < bound
        ):
            options.append((k, 0))
        if done_i < done_f and (k + 1 == len(state) or state[k + 1][arrived] > done_i):
            options.append((k, 1))
        if split and done_w < done_i:
            options.append((k, 2))
    # Waiting is always allowed; with the last of its work left a stage may as well be early, but that is not assumed.
    return [*options, None]
