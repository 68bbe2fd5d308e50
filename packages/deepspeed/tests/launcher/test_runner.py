"""Launches over several hosts, all of them this one: a stand-in for pdsh starts each host's command here."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from launching import environment, is_alive, launch, start, wait_until, written

PDSH = """
    import subprocess, sys
    options, command = sys.argv[1:-1], sys.argv[-1]
    hosts = options[options.index("-w") + 1].split(",")
    def at(number):
        text = command.replace("%%", "\\0").replace("%n", str(number)).replace("\\0", "%")
        return subprocess.Popen(["/bin/sh", "-c", text])
    if "pkill" in command:
        # The real one ends the launchers of this user on those hosts; here that would be all on this machine.
        open("killed", "w").write(command)
        sys.exit(0)
    running = [at(number) for number in range(len(hosts))]
    sys.exit(max(process.wait() for process in running))
"""

ADDRESS = ("--master_addr", "127.0.0.1")


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with a hostfile of two hosts, and pdsh on the path."""
    tools = tmp_path / "tools"
    tools.mkdir()
    pdsh = tools / "pdsh"
    pdsh.write_text(f"#!{sys.executable}\n" + textwrap.dedent(PDSH))
    pdsh.chmod(pdsh.stat().st_mode | stat.S_IEXEC)
    (tmp_path / "hosts").write_text("h1 slots=2\nh2 slots=1\n")
    return tmp_path


def script(cluster: Path, text: str) -> str:
    (cluster / "script.py").write_text(textwrap.dedent(text))
    return "script.py"


def with_tools(cluster: Path) -> dict[str, str]:
    return {"PATH": f"{cluster / 'tools'}:{environment()['PATH']}"}


def free_port() -> str:
    code = "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_ranks_of_two_hosts_run_and_end_together(cluster):
    name = script(
        cluster,
        """
        import os, sys, time
        rank = os.environ["RANK"]
        keys = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "GREETING", "WANDB_NOTES")
        open(f"rank.{rank}", "w").write("|".join([*(os.environ[key] for key in keys), *sys.argv[1:]]))
        time.sleep(0.5 * int(rank))
        """,
    )
    (cluster / ".deepspeed_env").write_text("GREETING=it's %n o'clock\n")
    options = ["-H", "hosts", *ADDRESS, "--master_port", free_port(), "--no_local_rank"]
    done = launch(cluster, *options, name, "a b", "%h", **with_tools(cluster), WANDB_NOTES="x;y")
    assert done.returncode == 0, done.stderr
    found = [(cluster / f"rank.{rank}").read_text().split("|") for rank in range(3)]
    common = ["it's %n o'clock", "x;y", "a b", "%h"]
    assert found == [
        ["0", "3", "2", "0", "2", *common],
        ["1", "3", "2", "0", "2", *common],
        ["0", "3", "1", "1", "2", *common],
    ]


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_on_one_host_ends_the_ranks_of_the_other(cluster, failing):
    name = script(
        cluster,
        f"""
        import os, sys, time
        from pathlib import Path
        rank = os.environ["RANK"]
        Path(f"pids.{{rank}}").write_text(f"{{os.getpid()}}\\n")
        while not all(Path(f"pids.{{other}}").exists() for other in range(3)):
            time.sleep(0.01)
        if rank == "{failing}":
            sys.exit(9)
        time.sleep(600)
        """,
    )
    done = launch(cluster, "-H", "hosts", *ADDRESS, "--master_port", free_port(), name, **with_tools(cluster))
    assert done.returncode == 9
    assert f"rank {failing} failed first: exit code 9" in done.stderr
    host = "h1" if failing < 2 else "h2"
    assert f"rank {failing} on {host} failed first: exit code 9; the ranks of this host were stopped" in done.stderr
    assert not [pid for pid in written(cluster / "pids", 3) if is_alive(pid)]


def test_no_ssh_starts_one_host_each(cluster):
    name = script(cluster, "import os\nopen('rank.' + os.environ['RANK'], 'w').close()\n")
    options = ["-H", "hosts", *ADDRESS, "--master_port", free_port(), "--no_ssh"]
    second = start(cluster, *options, "--node_rank", "1", name)
    first = launch(cluster, *options, "--node_rank", "0", name)
    _, err = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + err
    assert sorted(path.name for path in cluster.glob("rank.*")) == ["rank.0", "rank.1", "rank.2"]


def test_waiting_for_the_other_host_can_be_interrupted(cluster):
    name = script(cluster, "")
    options = ["-H", "hosts", *ADDRESS, "--master_port", free_port(), "--no_ssh", "--node_rank", "0"]
    process = start(cluster, *options, "--log_level", "info", name)
    assert process.stderr is not None
    assert "2 of 3 ranks here" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (143, -signal.SIGTERM)  # the latter: while torch was still being imported


def test_an_interrupt_reaches_the_hosts(cluster):
    name = script(
        cluster,
        """
        import os, time
        open(f"pids.{os.environ['RANK']}", "w").write(f"{os.getpid()}\\n")
        time.sleep(600)
        """,
    )
    process = start(cluster, "-H", "hosts", *ADDRESS, "--master_port", free_port(), name, **with_tools(cluster))
    wait_until(lambda: written(cluster / "pids", 3), "all ranks run")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert "[d]eepspeed.launcher.launch --world_info=" in (cluster / "killed").read_text()
    wait_until(lambda: not [pid for pid in written(cluster / "pids", 3) if is_alive(pid)], "all ranks are gone")


def test_a_missing_tool_is_named(cluster):
    name = script(cluster, "")
    for launcher, tool in (("pdsh", "pdsh"), ("openmpi", "mpirun"), ("slurm", "srun")):
        done = launch(cluster, "-H", "hosts", *ADDRESS, "--launcher", launcher, name, PATH=str(cluster))
        assert done.returncode == 2
        assert f"--launcher {launcher} needs '{tool}', not on PATH" in done.stderr


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpich", "impi", "mvapich", "slurm"])
def test_dry_run_shows_command_and_ranks_without_the_tool(cluster, launcher):
    (cluster / "even").write_text("h1 slots=2\nh2 slots=2\n")
    done = launch(cluster, "--dry-run", "-H", "even", "--launcher", launcher, "train.py", "x")
    assert done.returncode == 0, done.stderr
    tool = {"pdsh": "pdsh -S", "slurm": "srun -n 4"}.get(launcher, "mpirun ")
    assert tool in done.stdout
    for rank in range(4):
        assert f"RANK={rank} LOCAL_RANK={rank % 2} WORLD_SIZE=4" in done.stdout
    assert done.stdout.count("MASTER_ADDR=h1 MASTER_PORT=29500 CROSS_RANK=") == 4
    assert done.stdout.count("deepspeed.launcher.launch ") == (3 if launcher == "pdsh" else 0)
