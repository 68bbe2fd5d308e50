"""The command lines for many hosts, and what MPI's and Slurm's ranks make of their environment."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from launching import environment

from deepspeed.launcher.launch import spec_from_arguments
from deepspeed.launcher.launcher_helper import IDENTITIES, identity_from
from deepspeed.launcher.multinode import multinode_command
from deepspeed.launcher.spec import LaunchSpec, Program, Transport, launch_arguments

EXPORTS = {"NCCL_DEBUG": "INFO", "PYTHONPATH": "/job dir", "WANDB_TAGS": "a,b;'c' %h $x"}


def spec_for(launcher: str, world: dict[str, list[int]] | None = None, **transport: object) -> LaunchSpec:
    return LaunchSpec(
        world=world or {"h1": [0, 1], "h2": [0, 1]},
        program=Program("train.py", ("--name", "x y", "100%n", "$HOME"), module=False, no_local_rank=True),
        master_addr="10.0.0.1",
        master_port=4711,
        transport=Transport(launcher=launcher, hostfile="/etc/hosts.ds", cwd="/job dir", exports=EXPORTS, **transport),
    )


def test_pdsh():
    spec = spec_for("pdsh", args=("-t", "5"), venv_script="/env/bin/activate", ssh_port=2222)
    command = multinode_command(spec)
    assert command.argv[:8] == ("pdsh", "-S", "-f", "1024", "-w", "h1,h2", "-t", "5")
    assert len(command.argv) == 9
    assert command.env["PDSH_RCMD_TYPE"] == "ssh"
    pattern = shlex.split(command.kill[-1])[-1]
    for node_rank in range(2):  # it ends this launch on every host, no other launch, and not itself
        assert re.search(pattern, " ".join(launch_arguments(spec, str(node_rank))))
    assert not re.search(pattern, " ".join(launch_arguments(dataclasses.replace(spec, master_port=1), "0")))
    assert not re.search(pattern, command.kill[-1])
    for node_rank in range(2):
        # What pdsh replaces, then what the remote shell reads: it must be the per-host command with the same spec.
        text = command.argv[8].replace("%%", "\0").replace("%n", str(node_rank)).replace("\0", "%")
        words = shlex.split(text)
        assert words[:2] == ["source", "/env/bin/activate;"]
        assert [f"{name}={value};" for name, value in EXPORTS.items()] == [
            words[number + 1] for number, word in enumerate(words) if word == "export"
        ]
        start = words.index(sys.executable)
        assert words[start - 2 : start] == ["cd", "/job dir;"]
        assert words[start:] == launch_arguments(spec, str(node_rank))
        remote = spec_from_arguments(words[start + 4 :])
        assert remote == dataclasses.replace(spec, node_rank=node_rank, transport=Transport())


def test_pdsh_keeps_the_users_ssh_arguments(monkeypatch):
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-i key")
    assert multinode_command(spec_for("pdsh", ssh_port=22)).env["PDSH_SSH_ARGS_APPEND"] == "-i key -p 22"
    assert "PDSH_SSH_ARGS_APPEND" not in multinode_command(spec_for("pdsh")).env  # inherited unchanged


def helper_tail(launcher: str) -> list[str]:
    program = ["--no_local_rank", "train.py", "--name", "x y", "100%n", "$HOME"]
    return [sys.executable, "-u", "-m", "deepspeed.launcher.launcher_helper", "--launcher", launcher, *program]


def test_openmpi():
    argv = list(multinode_command(spec_for("openmpi", args=("--bind-to", "none"))).argv)
    assert argv[:5] == ["mpirun", "-n", "4", "-hostfile", "/etc/hosts.ds"]
    assert argv[5:13] == ["--mca", "btl", "^openib", "--mca", "btl_tcp_if_include", "eth0", "--bind-to", "none"]
    exported = [argv[number + 1] for number, word in enumerate(argv) if word == "-x"]
    expected = {"UCX_TLS": "tcp", **EXPORTS, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"}
    assert exported == [f"{name}={value}" for name, value in expected.items()]
    assert argv[-len(helper_tail("openmpi")) :] == helper_tail("openmpi")
    own = multinode_command(spec_for("openmpi", args=("--mca", "btl_tcp_if_include", "ib0"))).argv
    assert "eth0" not in own


def test_mpich_and_mvapich():
    argv = list(multinode_command(spec_for("mpich")).argv)
    assert argv[:5] == ["mpirun", "-n", "4", "-ppn", "2"]
    assert argv[argv.index("-hosts") + 1] == "h1,h2"
    pairs = {argv[number + 1]: argv[number + 2] for number, word in enumerate(argv) if word == "-genv"}
    assert pairs == {**EXPORTS, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"}
    assert argv[-len(helper_tail("mpich")) :] == helper_tail("mpich")

    command = multinode_command(spec_for("mvapich"))
    argv = list(command.argv)
    (path,) = command.files
    assert argv[:7] == ["mpirun", "-np", "4", "-ppn", "2", "--hostfile", path]
    assert command.files[path] == "h1\nh2\n"
    assert f"WANDB_TAGS={EXPORTS['WANDB_TAGS']}" in argv
    assert argv[-len(helper_tail("mvapich")) :] == helper_tail("mvapich")


def test_impi_names_each_rank():
    argv = list(multinode_command(spec_for("impi")).argv)
    head, *sections = " ".join(argv).split("-n 1 ")
    assert head.startswith("mpirun -ppn 2 ")
    assert "-genv WORLD_SIZE 4 -genv LOCAL_WORLD_SIZE 2" in head
    assert head.rstrip().endswith("-hosts h1,h2")
    ranks = [(rank, rank % 2, rank // 2) for rank in range(4)]
    assert len(sections) == 4
    for section, (rank, local_rank, node) in zip(sections, ranks, strict=True):
        assert section.startswith(
            f"-env RANK {rank} -env LOCAL_RANK {local_rank} -env CROSS_RANK {node} {sys.executable} -u train.py"
        )


def test_slurm():
    command = multinode_command(spec_for("slurm", num_slots=2, args=("--comment", "x")))
    argv = list(command.argv)
    assert argv[:6] == ["srun", "-n", "4", "--nodes=2", "--nodelist=h1,h2", "--ntasks-per-node=2"]
    assert argv[6:9] == ["--gpus-per-node=2", "--comment", "x"]
    assert argv[9].startswith("--export=ALL,NCCL_DEBUG=INFO,")
    assert "WANDB_TAGS" not in argv[9]  # its comma would end the value: it travels with ALL
    assert command.env["WANDB_TAGS"] == EXPORTS["WANDB_TAGS"]
    assert argv[-len(helper_tail("slurm")) :] == helper_tail("slurm")


@pytest.mark.parametrize("launcher", ["openmpi", "mpich", "impi", "mvapich"])
def test_mpi_rejects_a_narrowed_hostfile(launcher):
    with pytest.raises(ValueError, match=f"--launcher {launcher} takes its hosts from the hostfile"):
        multinode_command(spec_for(launcher, filtered=True))


@pytest.mark.parametrize("launcher", ["mpich", "impi", "mvapich", "slurm"])
def test_unequal_slots_are_rejected(launcher):
    with pytest.raises(ValueError, match="h1: 2, h2: 1"):
        multinode_command(spec_for(launcher, world={"h1": [0, 1], "h2": [0]}))


@pytest.mark.parametrize("launcher", ["openmpi", "mpich", "impi", "mvapich", "slurm"])
def test_options_of_the_per_host_launcher_are_not_dropped_silently(launcher):
    for change in ({"log_dir": "logs"}, {"bind_cores": True}, {"save_pid": 3}):
        with pytest.raises(ValueError, match=f"--launcher {launcher} does not support"):
            multinode_command(dataclasses.replace(spec_for(launcher), **change))
    with pytest.raises(ValueError, match="--ssh_port"):
        multinode_command(spec_for(launcher, ssh_port=22))


@pytest.mark.parametrize("launcher", sorted(IDENTITIES))
def test_helper_translates_the_identity_and_becomes_the_program(tmp_path, launcher):
    values = dict(zip(IDENTITIES[launcher], ("5", "1", "8", "4"), strict=True))
    script = tmp_path / "show.py"
    script.write_text(
        "import json, os, sys\nassert '--local_rank=1' in sys.argv\n"
        "print(json.dumps([os.getpid(), sys.argv[1:], dict(os.environ)]))\nsys.exit(3)\n"
    )
    arguments = ["--launcher", launcher, str(script), "--launcher", "x y"]
    process = subprocess.Popen(
        [sys.executable, "-m", "deepspeed.launcher.launcher_helper", *arguments],
        env=environment(**values),
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = process.communicate(timeout=60)
    pid, argv, environ = json.loads(out)
    assert (pid, process.returncode) == (process.pid, 3)  # exec, not a child
    assert argv == ["--local_rank=1", "--launcher", "x y"]
    expected = {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "CROSS_RANK": "1",
        "CROSS_SIZE": "2",
    }
    assert {name: environ[name] for name in expected} == expected


def test_helper_outside_of_its_launcher_says_so():
    with pytest.raises(RuntimeError, match="OMPI_COMM_WORLD_RANK is not set"):
        identity_from("openmpi", {name: value for name, value in os.environ.items() if not name.startswith("OMPI_")})
