"""From options to the spec, and from the spec to the per-host command and back, over all flags."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from deepspeed.launcher.devices import Devices
from deepspeed.launcher.launch import spec_from_arguments
from deepspeed.launcher.options import build_parser, is_multinode, parse_args, resolve
from deepspeed.launcher.spec import LaunchSpec, Transport, launch_arguments, plan_node

CPU = Devices("cpu", 4)
CUDA = Devices("cuda", 4)


@pytest.fixture
def hostfile(tmp_path: Path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("h1 slots=2\nh2 slots=2\nh3 slots=1\n")
    return "hosts"


def spec_of(*args: str, devices: Devices = CPU) -> LaunchSpec:
    return resolve(parse_args(list(args)), {}, devices)


def test_local_defaults():
    spec = spec_of("train.py", "--lr", "3", "--num_gpus", "9")
    assert spec.world == {"localhost": [0, 1, 2, 3]}
    assert (spec.master_addr, spec.master_port) == ("127.0.0.1", 0)  # 0: a free port
    assert spec.program.args == ("--lr", "3", "--num_gpus", "9")  # everything after the script is the script's
    assert spec_of("--num_accelerators", "6", "t.py").world == {"localhost": [0, 1, 2, 3, 4, 5]}  # CPU slots only count
    assert spec_of("-i", "localhost:1,3", "t.py").world == {"localhost": [1, 3]}
    assert spec_of("-e", "localhost:0", "t.py").world == {"localhost": [1, 2, 3]}


def test_local_devices_and_their_visibility(monkeypatch, caplog):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert spec_of("t.py", devices=CUDA).world == {"localhost": [0, 1, 2, 3]}
    with pytest.raises(ValueError, match=r"--num_gpus 5: this host has 4 cuda devices"):
        spec_of("--num_gpus", "5", "t.py", devices=CUDA)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert spec_of("t.py", devices=Devices("cuda", 2)).world == {"localhost": [2, 3]}  # an implicit --include
    two = Devices("cuda", 2)
    assert spec_of("--include", "localhost:1", "t.py", devices=two).world == {"localhost": [1]}
    assert spec_of("t.py", devices=CPU).world == {"localhost": [0, 1, 2, 3]}  # means nothing without devices


def test_hostfile_limits_and_filters(hostfile):
    def world(*args: str) -> dict[str, list[int]]:
        return dict(spec_of("-H", hostfile, *args, "t.py").world)

    assert world() == {"h1": [0, 1], "h2": [0, 1], "h3": [0]}
    assert world("--num_nodes", "2") == {"h1": [0, 1], "h2": [0, 1]}
    assert world("--num_gpus", "3") == {"h1": [0, 1, 2], "h2": [0, 1, 2], "h3": [0, 1, 2]}
    assert world("--include", "h3@h1:1") == {"h1": [1], "h3": [0]}
    assert world("--exclude", "h2@h1:0") == {"h1": [1], "h3": [0]}
    many = spec_of("-H", hostfile, "t.py")
    assert (many.master_port, many.master_addr) == (29500, "")  # the address is asked from the first host
    assert is_multinode(many, parse_args(["t.py"]))
    one = spec_of("-H", hostfile, "--num_nodes", "1", "t.py")
    assert one.master_port == 0
    assert not is_multinode(one, parse_args(["t.py"]))
    assert is_multinode(one, parse_args(["--force_multi", "t.py"]))


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["--num_gpus", "2", "--include", "localhost:0", "t.py"], "one kind only"),
        (["--num_nodes", "1", "--exclude", "localhost:0", "t.py"], "one kind only"),
        (["--include", "localhost:0", "--exclude", "localhost:1", "t.py"], "exclude each other"),
        (["--include", "localhost:9", "t.py"], "no slot 9"),
        (["--include", "elsewhere", "t.py"], "unknown host 'elsewhere'"),
        (["--num_nodes", "2", "t.py"], "--num_nodes 2: expected 1 to 1"),
        (["--num_gpus", "0", "t.py"], "--num_gpus 0"),
        (["-H", "missing-hosts", "t.py"], "missing-hosts: no such file"),
        (["--node_rank", "1", "t.py"], "only with --no_ssh"),
        (["--module", "--no_python", "t"], "--module and --no_python"),
        (["-H", "hosts", "--no_ssh", "--master_addr", "a", "t.py"], "--node_rank -1: with --no_ssh expected 0 to 2"),
        (["-H", "hosts", "--no_ssh", "--node_rank", "3", "--master_addr", "a", "t.py"], "--node_rank 3"),
        (["-H", "hosts", "--no_ssh", "--node_rank", "1", "t.py"], "needs --master_addr"),
    ],
)
def test_what_cannot_be_met(hostfile, args, what):
    with pytest.raises(ValueError, match=what):
        spec_of(*args)


def test_no_ssh_and_nossh_are_one(hostfile):
    base = ["-H", hostfile, "--node_rank", "1", "--master_addr", "10.0.0.1", "--master_port", "1234"]
    first, second = spec_of(*base, "--no_ssh", "t.py"), spec_of(*base, "--launcher", "nossh", "t.py")
    assert first == second
    assert (first.node_rank, first.first_rank(1), first.world_size) == (1, 2, 5)
    assert not is_multinode(first, parse_args(["t.py"]))


def test_accelerate_sends_none_for_no_hostfile():
    assert spec_of("--hostfile", "None", "--num_gpus", "1", "t.py").world == {"localhost": [0]}


@pytest.mark.parametrize("args", [["--autotuning", "run"], ["--elastic_training"], ["--min_elastic_nodes", "1"]])
def test_known_but_unsupported_options_say_so(args, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_args([*args, "t.py"])
    assert f"not supported yet: {args[0]}" in capsys.readouterr().err


NODE_FLAGS: dict[str, tuple[list[str], str, object]] = {
    "--module": (["--module"], "program.module", True),
    "--no_python": (["--no_python"], "program.no_python", True),
    "--no_local_rank": (["--no_local_rank"], "program.no_local_rank", True),
    "--enable_each_rank_log": (["--enable_each_rank_log", "my logs"], "log_dir", "my logs"),
    "--bind_cores_to_rank": (["--bind_cores_to_rank"], "bind_cores", True),
    "--bind_core_list": (["--bind_core_list", "0,2-3"], "bind_core_list", "0,2-3"),
    "--log_level": (["--log_level", "DEBUG"], "log_level", "debug"),
    "--quiet": (["-q"], "quiet", True),
    "--save_pid": (["--save_pid"], "save_pid", os.getpid()),
    "--master_addr": (["--master_addr", "10.1.2.3"], "master_addr", "10.1.2.3"),
    "--master_port": (["--master_port", "4711"], "master_port", 4711),
}
"""Every option that a host's own launcher must learn: flag -> arguments, where it lands in the spec, value there."""

RUNNER_ONLY = {
    *("--help", "--version", "--dry-run", "--hostfile", "--include", "--exclude", "--num_nodes", "--num_gpus"),
    *("--launcher", "--launcher_args", "--force_multi", "--no_ssh", "--node_rank", "--no_ssh_check", "--ssh_port"),
    *("--venv_script", "--autotuning", "--elastic_training", "--min_elastic_nodes", "--max_elastic_nodes"),
}
"""Options that are spent in the runner: they choose the world and the way to it."""


def test_every_option_is_accounted_for():
    flags = {
        next(option for option in action.option_strings if option.startswith("--"))
        for action in build_parser()._actions
        if action.option_strings
    }
    assert flags == set(NODE_FLAGS) | RUNNER_ONLY


def crossed(spec: LaunchSpec) -> LaunchSpec:
    """The spec after the journey through the per-host command line, without what stays in the runner."""
    _python, _unbuffered, _m, module, *arguments = launch_arguments(spec, str(spec.node_rank))
    assert module == "deepspeed.launcher.launch"
    return spec_from_arguments(arguments)


@pytest.mark.parametrize("flag", sorted(NODE_FLAGS))
def test_each_flag_survives_the_journey_to_the_host(hostfile, flag):
    args, path, value = NODE_FLAGS[flag]
    spec = spec_of("-H", hostfile, *args, "prog", "--x", "a b", "--module", "$HOME", "%n")
    for journey in (spec, crossed(spec)):
        found: object = journey
        for name in path.split("."):
            found = getattr(found, name)
        assert found == value
    assert crossed(spec) == dataclasses.replace(spec, transport=Transport())


def test_all_flags_together_survive(hostfile):
    args = [part for flag, (parts, *_) in NODE_FLAGS.items() if flag != "--no_python" for part in parts]
    spec = spec_of("-H", hostfile, *args, "prog", "1")
    for node_rank in range(3):
        there = dataclasses.replace(spec, node_rank=node_rank)
        assert crossed(there) == dataclasses.replace(there, transport=Transport())


def test_rank_plans(hostfile):
    spec = dataclasses.replace(spec_of("-H", hostfile, "t.py", "x"), master_addr="m", master_port=7)
    plans = [plan for node_rank in range(3) for plan in plan_node(spec, node_rank, CPU, {})]
    assert [(plan.host, plan.rank, plan.local_rank) for plan in plans] == [
        *(("h1", 0, 0), ("h1", 1, 1), ("h2", 2, 0), ("h2", 3, 1), ("h3", 4, 0)),
    ]
    fixed = {"WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "m", "MASTER_PORT": "7"}
    expected = {**fixed, "RANK": "3", "LOCAL_RANK": "1", "CROSS_RANK": "1", "CROSS_SIZE": "3"}
    assert {name: value for name, value in plans[3].env.items() if name != "OMP_NUM_THREADS"} == expected
    assert plans[3].command[1:] == ("-u", "t.py", "--local_rank=1", "x")


def test_devices_and_threads_in_the_plan():
    spec = spec_of("--include", "localhost:1,3", "t.py", devices=CUDA)
    on_cuda = plan_node(spec, 0, CUDA, {})
    assert [plan.env["CUDA_VISIBLE_DEVICES"] for plan in on_cuda] == ["1,3", "1,3"]
    assert [plan.env["LOCAL_RANK"] for plan in on_cuda] == ["0", "1"]
    assert "OMP_NUM_THREADS" not in on_cuda[0].env
    on_cpu = plan_node(spec, 0, CPU, {})
    assert int(on_cpu[0].env["OMP_NUM_THREADS"]) >= 1
    assert "CUDA_VISIBLE_DEVICES" not in on_cpu[0].env
    assert "OMP_NUM_THREADS" not in plan_node(spec, 0, CPU, {"OMP_NUM_THREADS": "5"})[0].env


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], ["PYTHON", "-u", "prog", "--local_rank=0", "a"]),
        (["--module"], ["PYTHON", "-u", "-m", "prog", "--local_rank=0", "a"]),
        (["--no_python"], ["prog", "--local_rank=0", "a"]),
        (["--no_python", "--no_local_rank"], ["prog", "a"]),
    ],
)
def test_commands_of_a_rank(args, expected):
    command = spec_of("--num_gpus", "1", *args, "prog", "a").program.command(0)
    assert [part if "python" not in part else "PYTHON" for part in command] == expected
