"""`deepspeed.comm`: upstream's keywords, initialisation, and the communication log."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from datetime import datetime
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
        dist.all_reduce(torch.ones(256))
    dist.all_reduce(torch.ones(256), log_name="mine")
    dist.broadcast(torch.ones(2), 0)
    dist.all_gather_into_tensor(torch.empty(512), torch.ones(256))
    dist.reduce_scatter_tensor(torch.empty(128), torch.ones(256))
    full = (dist.has_comm_data(), dist.get_comm_operation_count(), dist.get_logged_comm_ops())
    result = dist.log_summary(show_straggler=True, return_dict=True)
    dist.configure(prof_all=False, prof_ops=["broadcast"])
    chosen = dist.get_logged_comm_ops()
    dist.configure(enabled=False, prof_all=True)
    off = ds_comm.communicator().ledger.timing
    return untimed, empty, full, result, chosen, off


ROW = {"count", "msg_size_bytes", "msg_size_str"}


def test_the_log_reads_the_ledger() -> None:
    for rank, (untimed, empty, full, result, chosen, off) in enumerate(run_ranks(summary, 2)):
        assert untimed == 0.0
        assert empty == (False, 0, [])
        names = ["all_reduce", "mine", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor"]
        assert full == (True, 7, names)
        assert list(result) == ["summary", "straggler_analysis", "metadata"]
        assert list(result["summary"]) == list(result["straggler_analysis"]) == names
        row = result["summary"]["all_reduce"][1024]
        assert set(row) == {*ROW, "total_latency_ms", "avg_latency_ms", "tput_avg_gbps", "busbw_avg_gbps"}
        assert row["count"] == 3 and row["msg_size_bytes"] == 1024 and row["msg_size_str"] == "1.0 KB"
        assert row["total_latency_ms"] > 0 and row["avg_latency_ms"] == pytest.approx(row["total_latency_ms"] / 3)
        # bits per second of (throughput, bus bandwidth), as multiples of what is given: upstream's, on two ranks
        for name, size, factors in [
            ("all_reduce", 1024, (2, 1)),
            ("mine", 1024, (2, 1)),
            ("broadcast", 8, (1, 1)),
            ("all_gather_into_tensor", 1024, (2, 1)),
            ("reduce_scatter_tensor", 1024, (1, 0.5)),
        ]:
            (found,) = result["summary"][name].items()
            bits = 8 * size / (found[1]["avg_latency_ms"] / 1e3) / 1e9
            assert found[0] == found[1]["msg_size_bytes"] == size
            assert (found[1]["tput_avg_gbps"], found[1]["busbw_avg_gbps"]) == pytest.approx(
                (factors[0] * bits, factors[1] * bits)
            )
        waited = result["straggler_analysis"]["all_reduce"][1024]
        assert set(waited) == {
            *ROW,
            "total_comm_lat_ms",
            "total_straggler_ms",
            "avg_comm_lat_ms",
            "avg_straggler_ms",
        }
        assert waited["total_comm_lat_ms"] + waited["total_straggler_ms"] == pytest.approx(row["total_latency_ms"])
        assert waited["total_straggler_ms"] >= 0 and waited["avg_comm_lat_ms"] > 0
        assert datetime.fromisoformat(result["metadata"]["timestamp"])
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
    assert "comm op: grads | msg size: 2.0 KB | caller: caller" in caplog.text


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0B"), (40, "40.0 B"), (1536, "1.5 KB"), (3 * 2**30, "3.0 GB"), (2**41, "2.0 TB")]
)
def test_readable_sizes(nbytes: int, text: str) -> None:
    assert log.readable_size(nbytes) == text


def mesh() -> tuple[tuple[int, ...], Any]:
    made = dist.initialize_mesh_device((1, 2), ("dp", "sp"))
    return tuple(made.mesh.shape), made.mesh_dim_names


def test_mesh() -> None:
    assert run_ranks(mesh, 2)[0] == ((1, 2), ("dp", "sp"))
