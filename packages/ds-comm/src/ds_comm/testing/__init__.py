"""Test helpers for code that runs on many ranks; import it from tests only.

- `run_ranks` runs a module-level function on N real ranks: processes that live as long as the session (`pool`).
- `fake_world` makes this process one rank of a world of any size in which collectives do nothing (`fake`).

Neither opens a port, and importing this package starts nothing: the pool's processes start at the first `run_ranks`.
"""

from __future__ import annotations

from ds_comm.testing.failure import Died, Failure, RankFailure
from ds_comm.testing.fake import fake_world
from ds_comm.testing.pool import RankPool, run_ranks

__all__ = ["Died", "Failure", "RankFailure", "RankPool", "fake_world", "run_ranks"]
