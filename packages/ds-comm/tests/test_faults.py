"""Death, departure, full memory, taken ports: no rank hangs, nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from test_divergence import caught

import ds_comm
from ds_comm.testing import Died, run_ranks

TRANSPORTS = ["shm", "gloo"]


def shared_files() -> set[str]:
    return set(os.listdir("/dev/shm"))


def one_dies(how: str) -> str:
    comm = ds_comm.communicator()
    window = comm.reduce_window(6, torch.bfloat16, label="layers.3")
    comm.barrier(label="all alive")
    if comm.rank == 1:
        time.sleep(0.2)
        if how == "exit":
            os._exit(7)
        os.kill(os.getpid(), signal.SIGKILL)
    return caught(lambda: window.reduce_scatter(torch.empty(6 // comm.size)).wait())


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("how", "code"), [("exit", 7), ("kill", -9)])
def test_a_rank_dies(transport: str, how: str, code: int) -> None:
    results = run_ranks(one_dies, 3, how, transport=transport, expect_death=[1])
    assert results[1] == Died(code)
    for text in (results[0], results[2]):
        assert text.startswith("RankMissingError: reduce_scatter layers.3")
        assert "rank 1 has died" in text


def one_leaves() -> str:
    comm = ds_comm.communicator()
    comm.barrier()
    if comm.rank == 1:
        comm.close()
        return caught(comm.barrier)
    return caught(lambda: comm.barrier(label="the end"))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_leaves(transport: str) -> None:
    waits, left = run_ranks(one_leaves, 2, transport=transport)
    assert waits.startswith("RankMissingError: barrier the end: rank 1 has left the group")
    assert left.startswith("CommError: this communicator is closed")


def receives_from_the_dead() -> str:
    if ds_comm.get_rank() == 1:
        time.sleep(0.2)
        os._exit(3)
    return caught(lambda: ds_comm.recv(torch.empty(2), 1, label="activations"))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_message_from_a_rank_that_dies(transport: str) -> None:
    text, _ = run_ranks(receives_from_the_dead, 2, transport=transport, expect_death=[1])
    assert text.startswith("RankMissingError: recv activations") and "rank 1 has died" in text


def use_everything() -> None:
    comm = ds_comm.communicator()
    gather = comm.gather_window(1024 * comm.size, torch.float32, label="g")
    reduce = comm.reduce_window(1024 * comm.size, torch.float32, label="r")
    gather.publish()
    reduce.reduce_scatter(torch.empty(1024)).wait()
    comm.all_reduce(torch.ones(10))


def use_and_die() -> None:
    use_everything()
    if ds_comm.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)


def test_nothing_is_left_in_shared_memory() -> None:
    before = shared_files()
    run_ranks(use_everything, 2, transport="shm")
    run_ranks(use_and_die, 2, transport="shm", expect_death=[0])
    assert shared_files() <= before


def windows_and_warnings(numel: int) -> tuple[list[bool], list[str]]:
    import logging

    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    handler = Keep()
    logging.getLogger("ds_comm").addHandler(handler)
    try:
        comm = ds_comm.communicator()
        small = comm.gather_window(2 * comm.size, torch.float32, label="small")
        large = comm.reduce_window(numel, torch.float32, label="large")
        large.local.fill_(comm.rank + 1.0)
        out = torch.empty(numel // comm.size)
        large.reduce_scatter(out).wait()
        assert bool((out == 3.0).all())
        params = comm.gather_window(numel, torch.float32, label="params")
        params.shard.fill_(comm.rank)
        params.publish()
        params.gather()
        assert params.full[0].item() == 0 and params.full[-1].item() == 1
        comm.all_reduce(out)
        assert bool((out == 6.0).all())
        comm.barrier()
        return [type(w).__name__.startswith("Shm") for w in (small, large, params)], records
    finally:
        logging.getLogger("ds_comm").removeHandler(handler)


def test_too_little_shared_memory_falls_back_and_says_so() -> None:
    kinds, records = run_ranks(windows_and_warnings, 2, 1 << 20, env={"DS_COMM_SHM_LIMIT": "1000000"})[0]
    assert kinds == [True, False, False]
    assert any("reduce_window large" in r and "gloo instead of shared memory" in r for r in records)
    assert any("are needed" in r and "DS_COMM_SHM_LIMIT" in r for r in records)


def kind_of_world() -> str:
    comm = ds_comm.communicator()
    comm.all_reduce(torch.ones(3))
    return comm.kind


def test_no_usable_shared_memory_at_all(tmp_path: Path) -> None:
    assert run_ranks(kind_of_world, 2, env={"DS_COMM_SHM_LIMIT": "1000"}) == ["gloo", "gloo"]
    assert run_ranks(kind_of_world, 2, env={"DS_COMM_SHM_DIR": str(tmp_path / "none")}) == ["gloo", "gloo"]
    assert run_ranks(kind_of_world, 2, env={"DS_COMM_SHM_DIR": str(tmp_path)}) == ["shm", "shm"]


def test_an_unknown_transport() -> None:
    from ds_comm.testing import RankFailure

    with pytest.raises(RankFailure, match="DS_COMM_TRANSPORT='mpi': expected one of shm, gloo, torch"):
        run_ranks(kind_of_world, 2, env={"DS_COMM_TRANSPORT": "mpi"})


def test_port_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = subprocess.run(
            [sys.executable, "-c", "import ds_comm; ds_comm.init_distributed('gloo', timeout=20)"],
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode != 0
    assert f"port {port} on 127.0.0.1 is taken" in done.stderr and "MASTER_PORT" in done.stderr


SCRIPT = """
import signal, torch, ds_comm
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
ds_comm.init_distributed("gloo", timeout=30)
comm = ds_comm.communicator()
window = comm.reduce_window(1 << 20, torch.bfloat16, label="w")
print("ready", flush=True)
while True:
    window.wait_reusable()
    window.reduce_scatter(torch.empty((1 << 20) // comm.size)).wait()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_every_rank_and_leave_nothing(number: int, tmp_path: Path) -> None:
    before = shared_files()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    ranks = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(script)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        for rank in ranks:
            assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
        ranks[1].send_signal(number)
        _, complaint = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode not in (0, None)
        assert "RankMissingError" in complaint and "rank 1 has" in complaint
        ranks[1].communicate(timeout=60)
        assert ranks[1].returncode != 0
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.communicate()
    assert shared_files() <= before


def forks_a_child() -> str:
    comm = ds_comm.communicator()
    if comm.rank == 1:
        child = os.fork()
        if child == 0:
            import atexit

            atexit._run_exitfuncs()  # what a child that ends by sys.exit runs
            os._exit(0)
        os.waitpid(child, 0)
    return caught(lambda: [comm.barrier() for _ in range(3)])


def test_the_end_of_a_forked_child_is_not_the_end_of_its_rank() -> None:
    assert run_ranks(forks_a_child, 2, transport="shm") == ["nothing raised"] * 2


def test_import_starts_nothing() -> None:
    code = (
        "import threading, sys, ds_comm;"
        "assert threading.active_count() == 1;"
        "assert not {'numba', 'rich.table'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
