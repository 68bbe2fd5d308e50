"""Real launches of tiny scripts on two ranks."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from launching import command, environment, is_alive, launch, start, wait_until, written

HANG = """
    import os, subprocess, sys, time
    from pathlib import Path
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(f"pids.{os.environ['RANK']}").write_text(f"{os.getpid()} {child.pid}\\n")
    time.sleep(600)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


def script(place: Path, text: str, name: str = "script.py") -> str:
    (place / name).write_text(textwrap.dedent(text))
    return name


def test_ranks_get_their_identity_and_arguments(place):
    name = script(
        place,
        """
        import json, os, sys
        keys = [key for key in os.environ if key.startswith(("TORCHELASTIC_", "CROSS_", "LOCAL_", "GROUP_", "MASTER_"))]
        keys += ["RANK", "WORLD_SIZE", "OMP_NUM_THREADS"]
        shown = {"argv": sys.argv[1:], "cuda": os.environ.get("CUDA_VISIBLE_DEVICES")}
        shown.update((key, os.environ[key]) for key in keys)
        open(f"env.{os.environ['RANK']}", "w").write(json.dumps(shown))
        """,
    )
    done = launch(place, "--num_gpus", "2", name, "--lr", "a b")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    ranks = [json.loads((place / f"env.{rank}").read_text()) for rank in range(2)]
    for rank, found in enumerate(ranks):
        assert found["argv"] == ["--lr", "a b"]  # the script does not parse --local_rank
        assert (found["RANK"], found["LOCAL_RANK"], found["cuda"]) == (str(rank), str(rank), None)
        assert {found[key] for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")} == {"2"}
        assert (found["CROSS_RANK"], found["CROSS_SIZE"], found["GROUP_RANK"]) == ("0", "1", "0")
        assert (found["MASTER_ADDR"], found["TORCHELASTIC_USE_AGENT_STORE"]) == ("127.0.0.1", "True")
        assert int(found["OMP_NUM_THREADS"]) >= 1
        assert 0 < int(found["MASTER_PORT"]) < 65536
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]


def test_ranks_meet_through_the_published_port(place):
    name = script(
        place,
        """
        import datetime, os
        import torch, torch.distributed as dist
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
        value = torch.tensor([dist.get_rank() + 1.0])
        dist.all_reduce(value)
        open(f"sum.{dist.get_rank()}", "w").write(str(value.item()))
        dist.destroy_process_group()
        """,
    )
    done = launch(place, "--num_gpus", "2", "--no_local_rank", name)
    assert done.returncode == 0, done.stderr
    assert [(place / f"sum.{rank}").read_text() for rank in range(2)] == ["3.0", "3.0"]


def test_exit_code_of_the_first_failure_and_no_other_traceback(place):
    name = script(
        place,
        """
        import atexit, logging, os, sys, time
        from pathlib import Path
        rank = os.environ["RANK"]
        try:
            1 / 0
        except ZeroDivisionError:
            logging.exception("handled by rank " + rank)
        if rank == "1":  # fails first, ends later
            atexit.register(lambda: (time.sleep(0.4), os._exit(7)))
            Path("failed").touch()
            raise ValueError("the real cause")
        while not Path("failed").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        print("a victim's noise", file=sys.stderr)
        raise ConnectionError("lost a peer")
        """,
    )
    done = launch(place, "-q", "--num_gpus", "2", name)
    assert done.returncode == 7
    report = done.stderr[done.stderr.index("rank 1 failed first: exit code 7") :]
    assert "ValueError: the real cause" in report
    assert "rank 0: exit code 1: ConnectionError: lost a peer" in report
    assert done.stderr.rstrip().endswith("====")  # nothing after the report
    before = done.stderr[: done.stderr.index("rank 1 failed first")]
    assert "the real cause" not in before
    assert "lost a peer" not in before
    assert before.count("ZeroDivisionError: division by zero") == 2  # what was handled is not lost


def test_plain_exit_code_ends_the_other_rank(place):
    name = script(
        place,
        """
        import os, sys, time
        from pathlib import Path
        Path(f"pids.{os.environ['RANK']}").write_text(f"{os.getpid()}\\n")
        while not Path("pids.1").exists():
            time.sleep(0.01)
        if os.environ["RANK"] == "0":
            sys.exit(7)
        time.sleep(600)
        """,
    )
    done = launch(place, "--num_gpus", "2", name)
    assert done.returncode == 7
    assert "rank 0 failed first: exit code 7" in done.stderr
    assert "rank 1: stopped by the launcher" in done.stderr
    assert not [pid for pid in written(place / "pids", 2) if is_alive(pid)]


def test_a_killed_rank_takes_the_others_along_even_if_they_ignore_sigterm(place):
    name = script(place, "    import signal\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + HANG.lstrip("\n"))
    process = start(place, "--num_gpus", "2", name)
    wait_until(lambda: written(place / "pids", 2), "both ranks run")
    pids = written(place / "pids", 2)
    os.kill(pids[2], signal.SIGKILL)  # rank 1
    _, err = process.communicate(timeout=60)
    assert process.returncode == 137
    assert "rank 1 failed first: killed by SIGKILL (exit code 137)" in err
    assert not [pid for pid in pids if is_alive(pid)]  # their children have gone, too


def test_no_orphans_when_the_launcher_is_killed(place):
    process = start(place, "--num_gpus", "2", script(place, HANG))
    wait_until(lambda: written(place / "pids", 2), "both ranks run")
    pids = written(place / "pids", 2)
    process.kill()
    process.communicate(timeout=60)
    wait_until(lambda: not [pid for pid in pids if is_alive(pid)], "all ranks and their children are gone")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_the_ranks(place, number, code):
    name = script(
        place,
        """
        import os, signal, sys, time
        from pathlib import Path
        rank = os.environ["RANK"]
        def leave(number, frame):
            Path(f"got.{rank}").write_text(str(number))
            if rank == "1":
                raise OSError("no room for the last checkpoint")
            sys.exit(0)
        signal.signal(signal.SIGINT, leave)
        signal.signal(signal.SIGTERM, leave)
        Path(f"pids.{rank}").write_text(f"{os.getpid()}\\n")
        time.sleep(600)
        """,
    )
    process = start(place, "--num_gpus", "2", name)
    wait_until(lambda: written(place / "pids", 2), "both ranks run")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert [(place / f"got.{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2
    assert f"{number.name}: passed on to the ranks" in err
    assert "rank 1: exit code 1: OSError: no room for the last checkpoint" in err
    assert "Traceback" not in err


def test_a_second_signal_ends_ranks_that_do_not_listen(place):
    name = script(place, "    import signal\n    signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + HANG.lstrip("\n"))
    process = start(place, "--num_gpus", "2", name)
    wait_until(lambda: written(place / "pids", 2), "both ranks run")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    for line in process.stderr:
        if "passed on" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)  # well before the grace of 30 s is over
    assert process.returncode == 130
    assert not [pid for pid in written(place / "pids", 2) if is_alive(pid)]


def test_a_taken_port_is_named_with_its_holder(place):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = launch(place, "--num_gpus", "2", "--master_port", str(port), script(place, "open('started', 'w')"))
    assert done.returncode == 2
    assert f"--master_port {port} cannot be used" in done.stderr
    assert f"process {os.getpid()}" in done.stderr
    assert not (place / "started").exists()


def test_module_no_python_and_logs(place):
    package = place / "pack"
    package.mkdir()
    text = """
    import os, sys
    assert "--local_rank=" + os.environ["LOCAL_RANK"] in sys.argv
    print("out", os.environ["RANK"], sys.argv[1:])
    print("err", os.environ["RANK"], file=sys.stderr)
    """
    (package / "__main__.py").write_text(textwrap.dedent(text))
    done = launch(place, "--num_gpus", "2", "--enable_each_rank_log", "logs", "--module", "pack", "x")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    for rank in range(2):
        (log,) = (place / "logs").glob(f"*_rank{rank}.log")
        assert log.read_text() == f"out {rank} ['--local_rank={rank}', 'x']\nerr {rank}\n"

    program = place / "prog.sh"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$*" > "sh.$RANK"\nexit 5\n')
    program.chmod(0o755)
    done = launch(place, "--num_gpus", "1", "--no_python", "--no_local_rank", "./prog.sh", "a", "b")
    assert done.returncode == 5
    assert (place / "sh.0").read_text() == "a b\n"


def test_failure_report_with_rank_logs(place):
    name = script(place, "import os\nassert os.environ['RANK'] == '0', 'rank one is wrong'\n")
    done = launch(place, "--num_gpus", "2", "--enable_each_rank_log", "logs", name)
    assert done.returncode == 1
    assert "rank 1 failed first" in done.stderr
    assert "AssertionError: rank one is wrong" in done.stderr
    (log,) = (place / "logs").glob("*_rank1.log")
    assert "AssertionError: rank one is wrong" in log.read_text()


def test_a_program_that_cannot_start(place):
    done = launch(place, "--num_gpus", "1", "--no_python", "./missing-program")
    assert done.returncode == 2
    assert "cannot start './missing-program'" in done.stderr
    done = launch(place, "--num_gpus", "1", "missing.py")
    assert done.returncode == 2
    assert "no file 'missing.py'" in done.stderr
    assert "Traceback" not in done.stderr


def test_pid_file_lives_as_long_as_the_ranks(place):
    process = start(place, "--num_gpus", "2", "--save_pid", script(place, HANG), TMPDIR=str(place))
    wait_until(lambda: written(place / "pids", 2), "both ranks run")
    file = place / f"{process.pid}.deepspeed"
    wait_until(file.exists, "the process ids are written")
    pids = written(place / "pids", 2)
    assert file.read_text() == f"{pids[0]},{pids[2]}"
    process.terminate()
    process.communicate(timeout=60)
    assert not file.exists()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs CPU affinity")
def test_ranks_are_bound_to_cores(place):
    core = min(os.sched_getaffinity(0))
    name = script(
        place, "import os\nopen('cores', 'w').write(f'{os.sched_getaffinity(0)} {os.environ[\"OMP_NUM_THREADS\"]}')\n"
    )
    done = launch(place, "--num_gpus", "1", "--bind_core_list", str(core), name)
    assert done.returncode == 0, done.stderr
    assert (place / "cores").read_text() == f"{{{core}}} 1"


def test_a_terminal_stays_a_terminal_for_the_ranks(place):
    name = script(place, "import sys\nprint('tty', sys.stderr.isatty(), file=sys.stderr)\nraise SystemExit('bye')\n")
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command("--num_gpus", "1", name), cwd=place, env=environment(), stderr=slave, stdout=slave
    )
    os.close(slave)
    chunks = []
    while True:
        try:
            data = os.read(master, 4096)
        except OSError:
            break
        if not data:
            break
        chunks.append(data)
    assert process.wait(timeout=60) == 1
    text = b"".join(chunks).decode()
    assert "tty True\r\n" in text
    assert "failed first: exit code 1" in text


def test_dry_run_starts_nothing_and_can_be_pasted(place):
    name = script(place, "import os\nopen('started.' + os.environ['RANK'], 'w')\n")
    done = launch(place, "--dry-run", "--num_gpus", "2", name, "--text", "it's $HOME")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith("#")]
    assert len(lines) == 2
    assert not list(place.glob("started.*"))
    for rank, line in enumerate(lines):
        assert f"RANK={rank} LOCAL_RANK={rank} WORLD_SIZE=2" in line
        subprocess.run(["/bin/sh", "-c", line], cwd=place, env=environment(), check=True)
        assert (place / f"started.{rank}").exists()


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["--dry-run", "--num_gpus", "1", "t.py"]])
def test_help_version_and_dry_run_import_no_torch(place, args):
    code = f"""
    import sys
    from deepspeed.cli import main
    try:
        main({args!r})
    except SystemExit:
        pass
    assert "torch" not in sys.modules
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(run, cwd=place, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(("extra", "expected"), [({}, ".deepspeed_env"), ({"DS_ENV_FILE": "other"}, "other")])
def test_clients_import_the_environment_file_name(extra, expected):
    code = """
    import sys
    import deepspeed.launcher.runner
    print(deepspeed.launcher.runner.DEEPSPEED_ENVIRONMENT_NAME)
    assert "torch" not in sys.modules
    """
    clean = {name: value for name, value in environment().items() if name != "DS_ENV_FILE"}
    run = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(run, env={**clean, **extra}, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == expected, done.stderr
