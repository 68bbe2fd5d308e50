"""The communication log, under upstream's names, read from ds_comm's ledgers.

Owns `configure`, `log_summary` and the questions beside them. Counts and bytes are always there, whatever is
configured, because the ledger always counts; `enabled` adds times, and nothing else costs anything.

Vocabulary, upstream's: an operation is named by the `log_name` of its call, else by its function. The message size is
that of the tensor that a rank gives (of an all-gather: its own part), in bytes. Throughput counts the whole message,
of an all-reduce twice; bus bandwidth the bits that one rank must send on a ring for it (so it compares with the
hardware); both in units of 1e9 bits per second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from rich.console import Console

import ds_comm
from deepspeed.utils.logging import logger


@dataclass(frozen=True)
class LogSettings:
    """Section `comms_logger` of the configuration."""

    enabled: bool = False
    prof_all: bool = True
    prof_ops: Sequence[str] = ()
    verbose: bool = False
    debug: bool = False

    def wants(self, op: str) -> bool:
        """Whether the log is asked to show `op`."""
        return self.prof_all or op in self.prof_ops


_settings = LogSettings()


def settings() -> LogSettings:
    """What `configure` chose."""
    return _settings


def configure(
    deepspeed_config: Any = None,
    enabled: bool | None = None,
    prof_all: bool | None = None,
    prof_ops: Sequence[str] | None = None,
    verbose: bool | None = None,
    debug: bool | None = None,
) -> None:
    """Choose what the communication log records and shows.

    Args:
        deepspeed_config: dict or object with the section `comms_logger`; the other arguments override it.
        enabled: record times from now on; False stops at once, what was recorded stays until `reset_log`.
        prof_all, prof_ops: show all operations, or only those named.
        verbose: log every operation called through `deepspeed.comm` as it happens; debug adds the caller's name.
    """
    global _settings
    given: dict[str, Any] = {
        "enabled": enabled,
        "prof_all": prof_all,
        "prof_ops": prof_ops,
        "verbose": verbose,
        "debug": debug,
    }
    section = _section(deepspeed_config)
    for name in given:
        value = section.get(name) if isinstance(section, Mapping) else getattr(section, name, None)
        if given[name] is None and value is not None:
            given[name] = value
    _settings = replace(_settings, **{name: value for name, value in given.items() if value is not None})
    apply_timing()


def _section(config: Any) -> Any:
    if isinstance(config, Mapping):
        return config.get("comms_logger", {})
    return getattr(config, "comms_logger", None)


def apply_timing() -> None:
    """Switch the world's ledger to what is configured; nothing to switch before communication is initialised."""
    if ds_comm.is_initialized():
        _ledger().timing = _settings.enabled


def _ledger() -> ds_comm.Ledger:
    return ds_comm.communicator().ledger


_FUNCTIONS = {
    "all_gather": "all_gather_into_tensor",
    "reduce_scatter": "reduce_scatter_tensor",
    "all_to_all": "all_to_all_single",
}
_OWN = "log_summary"
_names: set[str] = set()


def name_operation(log_name: str) -> None:
    """Show the operations of this label under a name of their own."""
    _names.add(log_name)


def _operation(entry: Any) -> str:
    """The name that upstream gives an operation."""
    name: str = entry.label if entry.label in _names else _FUNCTIONS.get(entry.op, entry.op)
    return name


def _message(entry: Any) -> int:
    """Bytes of the tensor that this rank gave."""
    whole: int = entry.nbytes
    return whole // ds_comm.get_world_size() if entry.op == "all_gather" else whole


def _shown() -> list[Any]:
    if not ds_comm.is_initialized():
        return []
    records = [entry for entry in _ledger().records if entry.label != _OWN]
    return [entry for entry in records if _settings.wants(_operation(entry)) or _settings.wants(entry.op)]


def has_comm_data() -> bool:
    """Whether any operation was recorded since the last reset."""
    return bool(_shown())


def get_comm_operation_count() -> int:
    """Operations recorded."""
    return sum(entry.count for entry in _shown())


def get_logged_comm_ops() -> list[str]:
    """Names of the recorded operations, each once."""
    return list(dict.fromkeys(_operation(entry) for entry in _shown()))


def reset_log() -> None:
    """Forget everything recorded."""
    if ds_comm.is_initialized():
        _ledger().reset()


def _summary() -> dict[str, dict[int, dict[str, Any]]]:
    """Per operation and message size; entries that differ in label or dtype alone are added up."""
    size = ds_comm.get_world_size()
    table: dict[str, dict[int, dict[str, Any]]] = {}
    for entry in _shown():
        nbytes = _message(entry)
        row = table.setdefault(_operation(entry), {}).setdefault(
            nbytes, {"count": 0, "total_latency_ms": 0.0, "_moved": 0.0, "_wire": 0.0}
        )
        row["count"] += entry.count
        row["total_latency_ms"] += entry.seconds * 1e3
        row["_moved"] += entry.count * entry.nbytes * (2 if entry.op == "all_reduce" else 1)
        row["_wire"] += entry.count * entry.wire / size * (entry.nbytes / entry.numel if entry.numel else 0)
    for rows in table.values():
        for nbytes, row in rows.items():
            seconds, moved, wire = row["total_latency_ms"] / 1e3, row.pop("_moved"), row.pop("_wire")
            row["avg_latency_ms"] = row["total_latency_ms"] / row["count"]
            row["tput_avg_gbps"] = moved * 8 / seconds / 1e9 if seconds else 0.0
            row["busbw_avg_gbps"] = wire * 8 / seconds / 1e9 if seconds else 0.0
            row["msg_size_bytes"], row["msg_size_str"] = nbytes, readable_size(nbytes)
    return table


def _stragglers(summary: dict[str, dict[int, dict[str, Any]]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Per operation and size: the least time of all ranks, and what this rank waited beyond it."""
    own = {(op, nbytes): row["total_latency_ms"] for op, rows in summary.items() for nbytes, row in rows.items()}
    everyone: list[Any] = [None] * ds_comm.get_world_size()
    ds_comm.all_gather_object(everyone, own, label=_OWN)
    result: dict[str, dict[int, dict[str, Any]]] = {}
    for (op, nbytes), total in own.items():
        least, count = min(times.get((op, nbytes), total) for times in everyone), summary[op][nbytes]["count"]
        result.setdefault(op, {})[nbytes] = {
            "count": count,
            "total_comm_lat_ms": least,
            "total_straggler_ms": total - least,
            "avg_comm_lat_ms": least / count,
            "avg_straggler_ms": (total - least) / count,
            "msg_size_bytes": nbytes,
            "msg_size_str": readable_size(nbytes),
        }
    return result


def log_summary(show_straggler: bool = False, return_dict: bool = False) -> dict[str, Any] | None:
    """Log on rank 0 what was communicated; collective (all ranks meet in a barrier).

    Returns:
        None, or with `return_dict` on every rank {"summary": {op: {bytes: {count, total_latency_ms, avg_latency_ms,
        tput_avg_gbps, busbw_avg_gbps, msg_size_bytes, msg_size_str}}}, "straggler_analysis": None or {op: {bytes:
        {count, total_comm_lat_ms, total_straggler_ms, avg_comm_lat_ms, avg_straggler_ms, msg_size_bytes,
        msg_size_str}}}, "metadata": {world_size, rank, timestamp}}. Latencies are 0 unless `enabled`. What this
        function itself communicates is left out.
    """
    summary = _summary()  # before the barrier: it is not part of what the user asked about
    table = _ledger().table()
    ds_comm.barrier(label=_OWN)
    stragglers = _stragglers(summary) if show_straggler else None
    if ds_comm.get_rank() == 0:
        console = Console(width=120)
        with console.capture() as text:
            console.print(table)
        logger.info("\n" + text.get())
        if stragglers is not None:
            lost = {op: sum(row["total_straggler_ms"] for row in rows.values()) for op, rows in stragglers.items()}
            logger.info("time of rank 0 spent waiting for slower ranks, ms: %s", lost)
    if not return_dict:
        return None
    now = datetime.now().isoformat()
    metadata = {"world_size": ds_comm.get_world_size(), "rank": ds_comm.get_rank(), "timestamp": now}
    return {"summary": summary, "straggler_analysis": stragglers, "metadata": metadata}


def readable_size(nbytes: float) -> str:
    """ "1.5 MB": bytes in the largest binary unit that leaves at least one, with two digits at most; "0B" for none."""
    if not nbytes:
        return "0B"
    units = ["B", "KB", "MB", "GB", "TB"]
    place = next((i for i in range(len(units)) if nbytes < 1024 ** (i + 1)), len(units) - 1)
    return f"{round(nbytes / 1024**place, 2)} {units[place]}"
