"""The rank pool: worlds, arguments, failures of every kind, and that it is whole again afterwards."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

import ds_comm
from ds_comm.testing import Died, RankFailure, RankPool, run_ranks


@dataclass
class Point:
    x: int


def sum_of_ranks(start: float) -> tuple[int, int, float]:
    total = torch.full((3,), start + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total[0].item()


def process_id() -> int:
    return os.getpid()


def echo(*args: object, **kwargs: object) -> object:
    return args, kwargs


def read_environment(*names: str) -> list[str | None]:
    return [os.environ.get(name) for name in names]


def dirty_the_process() -> None:
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)


def process_state() -> tuple[str | None, str, torch.dtype, int, bool]:
    return (
        os.environ.get("LEFT_BEHIND"),
        os.getcwd(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
    )


def draw() -> tuple[float, float]:
    return random.random(), torch.rand(()).item()


def small_view_of_large_tensor() -> torch.Tensor:
    return torch.arange(1_000_000)[10:13]


def echo_then_fail() -> None:
    if dist.get_rank() == 0:
        dist.recv(torch.zeros(1), src=1)
        time.sleep(0.2)
    else:
        dist.send(torch.zeros(1), dst=0)
    print(f"rank {dist.get_rank()} says so")
    raise KeyError(f"no key on rank {dist.get_rank()}")


def raise_on_rank(rank: int) -> int:
    if dist.get_rank() == rank:
        raise ValueError(f"boom on {rank}")
    return dist.get_rank()


def hang_on_rank(rank: int) -> None:
    if dist.get_rank() == rank:
        sleep_in_a_named_function()


def sleep_in_a_named_function() -> None:
    time.sleep(600)


def die_on_rank(rank: int, how: str) -> int:
    if dist.get_rank() == rank:
        if how == "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(7)
    return dist.get_rank()


def wait_until_dead(victim: int, pid_file: str) -> bool:
    """Rank `victim` dies; the other one sees its process id vanish (a zombie's would stay)."""
    if dist.get_rank() == victim:
        Path(pid_file + ".part").write_text(str(os.getpid()))
        os.rename(pid_file + ".part", pid_file)
        os._exit(0)
    while not os.path.exists(pid_file):
        time.sleep(0.01)
    pid = int(Path(pid_file).read_text())
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)


def exit_with_code() -> None:
    sys.exit(3)


def leave_world_early() -> bool:
    dist.destroy_process_group()
    return dist.is_initialized()


def break_the_exit() -> None:
    def broken(group: object = None) -> None:
        raise OSError("no way out")

    ds_comm.destroy_process_group = broken  # type: ignore[assignment]


def return_unpicklable() -> object:
    return lambda: None


@pytest.mark.parametrize("world_size", [1, 3, 2])
def test_each_call_has_a_world_of_its_size(world_size: int) -> None:
    total = world_size * 10.0 + sum(range(world_size))
    assert run_ranks(sum_of_ranks, world_size, 10.0) == [(rank, world_size, total) for rank in range(world_size)]


def test_processes_are_reused_and_are_not_this_one() -> None:
    first, second = run_ranks(process_id, 2), run_ranks(process_id, 2)
    assert first == second
    assert len({os.getpid(), *first}) == 3


def test_arguments_and_results_travel_by_value() -> None:
    tensor = torch.arange(4.0, requires_grad=True)
    (result,) = run_ranks(echo, 1, Point(3), tensor, name="n", many=[1, 2])
    (point, copy), kwargs = result
    assert point == Point(3)
    assert kwargs == {"name": "n", "many": [1, 2]}
    assert torch.equal(copy, tensor)
    assert copy.requires_grad
    assert copy.data_ptr() != tensor.data_ptr()


def test_a_view_is_sent_without_the_storage_behind_it() -> None:
    (view,) = run_ranks(small_view_of_large_tensor, 1)
    assert view.tolist() == [10, 11, 12]
    assert view.untyped_storage().nbytes() == 3 * 8


def test_environment_of_a_rank() -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "EXTRA")
    assert run_ranks(read_environment, 2, *names, env={"EXTRA": "yes"}) == [
        ["0", "2", "0", "2", "yes"],
        ["1", "2", "1", "2", "yes"],
    ]
    assert run_ranks(read_environment, 1, "EXTRA", "RANK") == [[None, "0"]]
    assert run_ranks(read_environment, 1, "DS_COMM_TRANSPORT", transport="gloo") == [["gloo"]]


def test_a_call_leaves_no_trace_in_the_process() -> None:
    before = run_ranks(process_state, 1)
    run_ranks(dirty_the_process, 1)
    assert run_ranks(process_state, 1) == before
    assert before[0][0] is None
    assert before[0][3] == 1


def test_generators_are_seeded_alike_on_all_ranks_and_calls() -> None:
    first, second = run_ranks(draw, 2), run_ranks(draw, 2)
    assert first[0] == first[1] == second[0] == second[1]


def test_a_failing_rank_is_reported_with_its_traceback_and_the_pool_lives_on() -> None:
    with pytest.raises(RankFailure, match=r"1 of 2 .*raise_on_rank; first: rank 1 raised ValueError: boom") as info:
        run_ranks(raise_on_rank, 2, 1)
    (failure,) = info.value.failures
    assert (failure.rank, failure.kind, failure.error, failure.message) == (1, "raised", "ValueError", "boom on 1")
    assert "in raise_on_rank" in failure.traceback
    assert "_worker.py" not in failure.traceback
    assert run_ranks(raise_on_rank, 2, 5) == [0, 1]


def test_every_failing_rank_has_its_traceback_and_output() -> None:
    with pytest.raises(RankFailure) as info:
        run_ranks(echo_then_fail, 2)
    text = str(info.value)
    for rank in range(2):
        assert f"no key on rank {rank}" in text
        assert f"rank {rank} says so" in text
        assert info.value.of(rank).error == "KeyError"
    assert [failure.rank for failure in info.value.failures] == [1, 0]  # rank 1 fails first
    with pytest.raises(KeyError, match="rank 7 did not fail"):
        info.value.of(7)


def test_a_hanging_rank_is_shown_with_its_stack_and_replaced() -> None:
    before = run_ranks(process_id, 2)
    with pytest.raises(RankFailure, match="rank 1 hung") as info:
        run_ranks(hang_on_rank, 2, 1, timeout=1)
    assert "sleep_in_a_named_function" in info.value.of(1).output
    assert len(info.value.failures) == 1
    after = run_ranks(process_id, 2)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_a_rank_that_dies_is_a_failure() -> None:
    with pytest.raises(RankFailure, match="rank 0 died with exit code 7"):
        run_ranks(die_on_rank, 2, 0, "exit")
    assert run_ranks(sum_of_ranks, 2, 0.0)[1] == (1, 2, 1.0)


def test_a_rank_that_dies_as_expected() -> None:
    assert run_ranks(die_on_rank, 2, 0, "signal", expect_death=[0]) == [Died(-signal.SIGKILL), 1]
    assert run_ranks(sum_of_ranks, 2, 0.0)[1] == (1, 2, 1.0)


def test_a_rank_that_was_to_die_must_die() -> None:
    with pytest.raises(RankFailure, match="rank 1 was expected to die"):
        run_ranks(process_id, 2, expect_death=[1])


def test_a_dead_rank_is_no_zombie(tmp_path: Path) -> None:
    assert run_ranks(wait_until_dead, 2, 1, str(tmp_path / "pid"), expect_death=[1]) == [True, Died(0)]


def test_sys_exit_is_a_failure_of_the_rank() -> None:
    with pytest.raises(RankFailure, match="raised SystemExit: 3"):
        run_ranks(exit_with_code, 1)


def test_a_function_may_leave_the_world_itself() -> None:
    assert run_ranks(leave_world_early, 2) == [False, False]


def test_a_world_that_cannot_be_left_is_a_failure() -> None:
    with pytest.raises(RankFailure, match=r"returned, but could not leave its world") as info:
        run_ranks(break_the_exit, 1)
    assert "no way out" in info.value.of(0).output
    assert run_ranks(sum_of_ranks, 1, 0.0) == [(0, 1, 0.0)]


def test_results_that_cannot_be_pickled_are_a_failure() -> None:
    with pytest.raises(RankFailure, match="lambda"):
        run_ranks(return_unpicklable, 1)


def test_functions_that_cannot_be_sent() -> None:
    def nested() -> None: ...

    for function in (nested, lambda: None):
        with pytest.raises(ValueError, match="top level of a module"):
            run_ranks(function, 1)
    with pytest.raises(ValueError, match="plain function"):
        run_ranks(Point(1), 1)  # type: ignore[arg-type]


def test_functions_of_a_module_that_is_in_no_package(tmp_path: Path) -> None:
    file = tmp_path / "test_something.py"
    file.write_text("class Thing:\n    pass\n\ndef make(thing):\n    return thing, Thing, __name__\n")
    name = "no_package.at_all.test_something"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    made_up = {"no_package": ModuleType("no_package"), "no_package.at_all": ModuleType("at_all"), name: module}
    sys.modules.update(made_up)
    try:
        spec.loader.exec_module(module)
        ((thing, cls, seen),) = run_ranks(module.make, 1, module.Thing())
        assert type(thing) is cls is module.Thing
        assert seen == name
    finally:
        for made in made_up:
            del sys.modules[made]


def test_bad_sizes() -> None:
    for arguments in ({"world_size": 0}, {"world_size": 2, "expect_death": [2]}):
        with pytest.raises(ValueError, match="world_size="):
            run_ranks(process_id, **arguments)  # type: ignore[arg-type]


def test_a_pool_outlives_a_thread_and_a_close() -> None:
    pool = RankPool()
    before: list[int] = []
    try:
        thread = threading.Thread(target=lambda: before.extend(pool.run(process_id, 1)))
        thread.start()
        thread.join()
        assert pool.run(process_id, 1) == before == pool.process_ids()
        pool.close()
        assert pool.process_ids() == []
        assert not _running(before[0])
        assert pool.run(process_id, 1) != before
    finally:
        pool.close()


SCRIPT = """
    import os
    import sys
    from dataclasses import dataclass
    import torch.distributed as dist
    from ds_comm.testing import run_ranks

    @dataclass
    class Mine:
        pid: int

    def mine(given):
        assert isinstance(given, Mine)
        return Mine(os.getpid())

    if __name__ == "__main__":
        pids = [result.pid for result in run_ranks(mine, 2, Mine(0))]
        print(*pids, flush=True)
        if sys.argv[1:]:
            os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("killed", [False, True])
def test_workers_of_a_script_die_with_it(tmp_path: Path, killed: bool) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, str(script), *(["die"] if killed else [])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == (-9 if killed else 0), done.stderr
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
