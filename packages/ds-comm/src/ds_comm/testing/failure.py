"""What a call of the rank pool can end in, besides its results: ranks that fail, and ranks that die as they should.

Kinds of failure: a rank `raised`; it `hung` (no outcome in time: its stacks are dumped, then it is killed); it `died`
without a word; it `survived` although it was to die; or it returned but left an `unclean` world behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Died:
    """Stands in the list of results for a rank that was expected to die; negative codes are signals (-9: SIGKILL)."""

    exit_code: int


@dataclass(frozen=True)
class Failure:
    """What one rank did wrong. `error` is the exception's type name ("" unless raised); `when` a monotonic time."""

    rank: int
    kind: Literal["raised", "hung", "died", "survived", "unclean"]
    when: float
    error: str = ""
    message: str = ""
    traceback: str = ""
    output: str = ""
    exit_code: int | None = None

    def headline(self) -> str:
        """One line: what happened on this rank."""
        if self.kind == "raised":
            return f"rank {self.rank} raised {self.error}: {self.message}"
        if self.kind == "died":
            return f"rank {self.rank} died with exit code {self.exit_code}"
        return f"rank {self.rank} {self.message}"


class RankFailure(RuntimeError):
    """Some ranks failed; `failures` has one `Failure` each, the first to fail first.

    The text has each rank's traceback (or, for one that hung, the stacks of its threads) and what it wrote.
    """

    def __init__(self, function: str, world_size: int, failures: Sequence[Failure]) -> None:
        self.failures = tuple(sorted(failures, key=lambda failure: failure.when))
        first = self.failures[0]
        headline = first.headline().splitlines()[0]
        lines = [f"{len(self.failures)} of {world_size} ranks failed in {function}; first: {headline}"]
        for failure in self.failures:
            lines.append(f"---- {failure.headline()}")
            if failure.traceback:
                lines.append(failure.traceback.rstrip())
            if failure.output:
                lines.append(f"---- rank {failure.rank} wrote\n{failure.output.rstrip()}")
        super().__init__("\n".join(lines))

    def of(self, rank: int) -> Failure:
        """The failure of `rank`; KeyError if it did not fail."""
        for failure in self.failures:
            if failure.rank == rank:
                return failure
        raise KeyError(f"rank {rank} did not fail; ranks {[failure.rank for failure in self.failures]} did")
