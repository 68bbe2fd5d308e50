"""Finding one's place from the variables of launchers."""

from __future__ import annotations

import pytest

from ds_comm._environment import Launch, discover
from ds_comm.errors import CommArgumentError, CommError


def test_nothing_is_a_world_of_one() -> None:
    assert discover(env={}) == Launch(0, 1)


def test_torchrun() -> None:
    env = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    launch = discover(env=env)
    assert launch == Launch(3, 8, 1, "head", 1234)
    assert launch.variables() == env


def test_arguments_win() -> None:
    assert discover(1, 2, 4000, env={"RANK": "5", "WORLD_SIZE": "6"}) == Launch(1, 2, 1, "127.0.0.1", 4000)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (
            {
                "OMPI_COMM_WORLD_RANK": "2",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "2",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
            },
            Launch(2, 4, 2),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MASTER_ADDR": "a", "MASTER_PORT": "7"},
            Launch(1, 2, 0, "a", 7),
        ),
        (
            {
                "MV2_COMM_WORLD_RANK": "1",
                "MV2_COMM_WORLD_SIZE": "2",
                "MV2_COMM_WORLD_LOCAL_RANK": "1",
                "MV2_COMM_WORLD_LOCAL_SIZE": "2",
            },
            Launch(1, 2, 1),
        ),
        (
            {
                "SLURM_PROCID": "5",
                "SLURM_NTASKS": "8",
                "SLURM_STEP_NUM_TASKS": "6",
                "SLURM_LOCALID": "1",
                "SLURM_JOB_NODELIST": "gpu[007-009,12],other",
            },
            Launch(5, 6, 1, "gpu007"),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n1,n2"}, Launch(0, 2, 0, "n1")),
    ],
)
def test_mpi_and_slurm(env: dict[str, str], expected: Launch) -> None:
    assert discover(env=env) == expected
    assert discover(env=env, mpi=False).world_size == 1


@pytest.mark.parametrize(
    ("env", "match"),
    [
        ({"RANK": "0"}, "no WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "no RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "rank 2 is not in a world of 2"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK='x'"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, "started by Open MPI .* MASTER_ADDR"),
    ],
)
def test_contradictions(env: dict[str, str], match: str) -> None:
    with pytest.raises(CommError, match=match):
        discover(env=env)


def test_half_of_the_arguments() -> None:
    with pytest.raises(CommArgumentError, match="give both or neither"):
        discover(rank=1, env={})
