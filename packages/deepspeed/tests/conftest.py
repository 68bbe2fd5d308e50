"""What holds for every test of this package."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import ds_comm


@pytest.fixture(autouse=True, scope="module")
def no_world_left() -> Iterator[None]:
    """A module's tests may make this process a world of one; the next module's begin without a world."""
    yield
    if ds_comm.is_initialized():
        ds_comm.destroy_process_group()
