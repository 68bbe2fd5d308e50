"""Backends as a parameter: every test of an operation runs on each backend that this process has.

pytest                                  cpu (with or without numba, as installed)
pytest -m cpu_extra                     the same tests, chosen where numba is installed
TRITON_INTERPRET=1 pytest -m interpreter   triton's interpreter, in a process of its own
pytest -m aot                           ahead-of-time builds for GPUs (triton installed, interpreter off)
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ds_kernels import available_backends, use_backend
from ds_kernels._dispatch import HAS_TRITON, interpreting


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("interpreter") and not (HAS_TRITON and interpreting()):
            item.add_marker(pytest.mark.skip(reason="needs triton and TRITON_INTERPRET=1"))
        if item.get_closest_marker("aot") and (interpreting() or not HAS_TRITON):
            item.add_marker(pytest.mark.skip(reason="needs triton, without TRITON_INTERPRET"))


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.cpu_extra),
        pytest.param("triton", marks=pytest.mark.interpreter),
    ]
)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once per backend, inside `use_backend`."""
    assert request.param in available_backends()
    torch.manual_seed(0)
    with use_backend(request.param):
        yield request.param
