"""A port that is taken is answered with who holds it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from deepspeed.launcher.ports import check_port, port_holder


def test_free_and_any_port():
    check_port(0)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    check_port(port)
    assert port_holder(port) == ""


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc")
@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "")])
def test_taken_port_names_the_process(family, address):
    with socket.socket(family) as holder:
        holder.bind((address, 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(RuntimeError, match=rf"--master_port {port} .*held by process {os.getpid()} \(.+\)"):
            check_port(port)


@pytest.mark.parametrize("port", [-1, 65536])
def test_port_out_of_range(port):
    with pytest.raises(ValueError, match=f"--master_port {port}"):
        check_port(port)
