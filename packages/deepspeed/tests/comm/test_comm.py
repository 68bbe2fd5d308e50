"""`deepspeed.comm`: upstream's keywords, initialisation, and the communication log."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from typing import Any

import pytest
import torch

import deepspeed.comm as dist
import ds_comm
from deepspeed.comm import log
from ds_comm.testing import run_ranks


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_signature_of_init_distributed() -> None:
    parameters = inspect.signature(dist.init_distributed).parameters
    expected = "dist_backend auto_mpi_discovery distributed_port verbose timeout init_method dist_init_required config"
    assert list(parameters) == [*expected.split(), "rank", "world_size"]


def test_not_initialised_until_it_adopts_the_users_group() -> None:
    code = """
import torch.distributed as torch_dist, deepspeed.comm as dist
torch_dist.init_process_group("gloo", store=torch_dist.HashStore(), rank=0, world_size=1)
group = torch_dist.group.WORLD
before = dist.is_initialized()
dist.init_distributed(dist_backend=None, auto_mpi_discovery=False, dist_init_required=False)
dist.init_distributed()
print(before, dist.is_initialized(), dist.get_world_group() is group, dist.get_world_size())
"""
    assert python(code) == "False True True 1"


def test_required_but_absent_group_is_an_error() -> None:
    code = """
import deepspeed
try:
    deepspeed.init_distributed(dist_init_required=False)
except RuntimeError as error:
    print(error)
"""
    assert "dist_init_required is False" in python(code)


def test_it_makes_the_logger_visible_once() -> None:
    code = """
import deepspeed
print(len(deepspeed.logger.handlers), deepspeed.logger.level)
deepspeed.logger.setLevel(40)
deepspeed.init_distributed(); deepspeed.init_distributed()
print(len(deepspeed.logger.handlers), deepspeed.logger.level)
"""
    assert python(code) == "0 0\n1 40"


def collectives() -> dict[str, Any]:
    rank, found = dist.get_rank(), {}
    tensor = torch.full((4,), rank + 1.0)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, prof=True, log_name="mine", debug="here")
    found["all_reduce"] = tensor.tolist()
    gathered = torch.empty(4)
    dist.allgather_fn(gathered, torch.full((2,), float(rank)), group=dist.get_world_group())
    found["allgather_fn"] = gathered.tolist()
    reduced = torch.empty(2)
    work = dist.reduce_scatter_fn(reduced, torch.arange(4.0), async_op=True, log_name="scattered")
    work.wait()
    found["reduce_scatter_fn"] = reduced.tolist()
    other = torch.full((1,), float(rank))
    dist.inference_all_reduce(other)
    found["inference_all_reduce"] = other.item()
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, {"rank": rank})
    found["objects"] = objects
    found["labels"] = sorted({entry.label for entry in ds_comm.communicator().ledger.records if entry.label})
    return found


def test_upstreams_keywords_and_aliases() -> None:
    for rank, found in enumerate(run_ranks(collectives, 2)):
        assert found["all_reduce"] == [2.0] * 4
        assert found["allgather_fn"] == [0, 0, 1, 1]
        assert found["reduce_scatter_fn"] == [[0, 2], [4, 6]][rank]
        assert found["inference_all_reduce"] == 1
        assert found["objects"] == [{"rank": 0}, {"rank": 1}]
        assert {"mine", "scattered"} <= set(found["labels"])


def summary() -> tuple[Any, ...]:
    dist.reset_log()
    dist.all_reduce(torch.ones(256))
    untimed = dist.log_summary(return_dict=True)["summary"]["all_reduce"][1024]["total_latency_ms"]
    dist.reset_log()
    empty = (dist.has_comm_data(), dist.get_comm_operation_count(), dist.get_logged_comm_ops())
    dist.configure({"comms_logger": {"enabled": True, "verbose": False}})
    for _ in range(3):
        dist.all_reduce(torch.ones(256), log_name="a")
    dist.all_reduce(torch.ones(256), log_name="b")
    dist.broadcast(torch.ones(2), 0)
    full = (dist.has_comm_data(), dist.get_comm_operation_count(), dist.get_logged_comm_ops())
    result = dist.log_summary(show_straggler=True, return_dict=True)
    dist.configure(prof_all=False, prof_ops=["broadcast"])
    chosen = dist.get_logged_comm_ops()
    dist.configure(enabled=False, prof_all=True)
    off = ds_comm.communicator().ledger.timing
    return untimed, empty, full, result, chosen, off


def test_the_log_reads_the_ledger() -> None:
    for rank, (untimed, empty, full, result, chosen, off) in enumerate(run_ranks(summary, 2)):
        assert untimed == 0.0
        assert empty == (False, 0, [])
        assert full == (True, 5, ["all_reduce", "broadcast"])
        row = result["summary"]["all_reduce"][1024]
        assert row["count"] == 4 and row["msg_size_bytes"] == 1024 and row["msg_size_str"] == "1 KB"
        seconds = row["total_latency_ms"] / 1e3
        assert seconds > 0 and row["avg_latency_ms"] == pytest.approx(row["total_latency_ms"] / 4)
        assert row["tput_avg_gbps"] == pytest.approx(4 * 1024 * 8 / seconds / 1e9)
        assert row["busbw_avg_gbps"] == pytest.approx(row["tput_avg_gbps"])  # 2(N-1)/N = 1 for two ranks
        waited = result["straggler_analysis"]["all_reduce"][1024]
        assert waited["straggler_effect_ms"] == pytest.approx(waited["total_latency_ms"] - waited["min_latency_ms"])
        assert waited["straggler_effect_ms"] >= 0
        assert result["metadata"]["rank"] == rank and result["metadata"]["world_size"] == 2
        assert chosen == ["broadcast"] and off is False


def test_verbose_logs_each_operation(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_settings", log.LogSettings(enabled=True, verbose=True, debug=True))
    monkeypatch.setattr(ds_comm, "get_world_size", lambda group=None: 1)
    from deepspeed.comm.comm import _upstream

    def all_reduce(tensor: torch.Tensor, label: str | None = None) -> str | None:
        return label

    def caller() -> str | None:
        return _upstream(all_reduce)(torch.ones(512), log_name="grads")

    with caplog.at_level(logging.INFO, logger="DeepSpeed"):
        assert caller() == "grads"
    assert "comm op: grads | msg size: 2 KB | caller: caller" in caplog.text


@pytest.mark.parametrize(("nbytes", "text"), [(0, "0 B"), (1536, "1.5 KB"), (3 * 2**30, "3 GB"), (2**41, "2 TB")])
def test_readable_sizes(nbytes: int, text: str) -> None:
    assert log.readable_size(nbytes) == text


def mesh() -> tuple[tuple[int, ...], Any]:
    made = dist.initialize_mesh_device((1, 2), ("dp", "sp"))
    return tuple(made.mesh.shape), made.mesh_dim_names


def test_mesh() -> None:
    assert run_ranks(mesh, 2)[0] == ((1, 2), ("dp", "sp"))
