"""Turn `results/*.jsonl` into a page of markdown tables, ratios against the peers included.

For every comparison the newest run that has it is shown. Ratios say how many times better this project is than the
peer of the same run (above 1 is better), `compute / step` which share of a step is computing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
HERE = Path(__file__).resolve().parent


def main() -> None:
    """Print, or write with `--output`, the report of a results folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--output", type=Path, help="markdown file to write instead of stdout")
    options = parser.parse_args()
    text = render(options.results)
    if options.output:
        options.output.write_text(text)
    else:
        print(text)


def render(results: Path) -> str:
    """All sections that have results."""
    sections = {
        "zero_step": zero_step,
        "zero_memory": zero_memory,
        "startup": startup,
        "overhead": overhead,
        "checkpoint": checkpoint,
        "comm_collectives": collectives,
        "pipe_step": pipe_step,
        "pipe_schedules": pipe_schedules,
        "infer_decode": infer_decode,
        "infer_load": infer_load,
        "infer_serving": infer_serving,
        "infer_perplexity": infer_perplexity,
    }
    parts = ["# Benchmark results\n"]
    for name, section in sections.items():
        path = results / f"{name}.jsonl"
        if path.exists():
            parts.append(section([json.loads(line) for line in path.read_text().splitlines() if line]))
    return "\n".join(parts)


def newest(rows: list[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by comparison (the values of `keys`), of each only those of its last run."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return {key: [row for row in group if row["run"] == group[-1]["run"]] for key, group in groups.items()}


def table(head: list[str], rows: Iterable[list[Any]]) -> str:
    """A markdown table; floats with three significant places, None as a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.4f}"
        return str(value)

    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines) + "\n"


def ratio(numerator: Any, denominator: Any) -> float | None:
    """Quotient of two figures (numbers, or summaries by their median); None where one is missing."""
    pair = [value["median"] if isinstance(value, dict) else value for value in (numerator, denominator)]
    if None in pair or not pair[1]:
        return None
    return float(pair[0] / pair[1])


def spread(figure: Any) -> str | None:
    """A summary as "median (p20-p80)"."""
    if figure is None:
        return None
    return f"{figure['median']:.3f} ({figure['p20']:.3f}-{figure['p80']:.3f})"


def last(row: Row) -> str:
    """The last loss, with enough digits to see whether two contenders agree."""
    return f"{row['losses'][-1]:.6f}"


def provenance(rows: list[Row]) -> str:
    """One line on machine, versions and commits."""
    found: dict[str, set[str]] = {"device": set(), "torch": set(), "python": set(), "commit": set()}
    for row in rows:
        for key, values in found.items():
            if row.get(key):
                dirty = "+" if key == "commit" and row.get("dirty") else ""
                values.add(f"{row[key]}{dirty}")
    return "; ".join(f"{key} {', '.join(sorted(values))}" for key, values in found.items() if values) + "\n"


def section(title: str, rows: list[Row], body: str) -> str:
    """A section with its provenance line."""
    return f"## {title}\n\n{provenance(rows)}\n{body}"


def zero_step(rows: list[Row]) -> str:
    """Seconds per step, and who is how many times slower."""
    body = []
    shown: list[Row] = []
    for (model, dtype, stage), group in sorted(newest(rows, "model", "dtype", "case_stage").items(), key=str):
        shown += group
        by = {row["contender"]: row for row in group}

        def step(name: str, by: dict[str, Row] = by) -> Any:
            return by[name]["step_s"] if name in by else None

        ours = step("ours")
        body.append(
            [model, dtype, stage]
            + [spread(step(name)) for name in ("ours", "upstream", "fsdp2", "ddp", "compute")]
            + [ratio(step(name), ours) for name in ("upstream", "fsdp2", "ddp")]
            + [ratio(step("compute"), ours)]
            + [
                " / ".join(
                    f"{by[name]['losses'][-1]:.5f}" for name in ("ours", "upstream", "fsdp2", "ddp") if name in by
                )
            ]
        )
    head = ["model", "dtype", "stage", "ours s", "upstream s", "FSDP2 s", "DDP s", "compute s"]
    head += ["upstream / ours", "FSDP2 / ours", "DDP / ours", "compute / step", "last losses"]
    return section("Step time", shown, table(head, body))


def zero_memory(rows: list[Row]) -> str:
    """Peaks per rank; ratios are ours over theirs (below 1 is better)."""
    latest = {key: group[-1] for key, group in newest(rows, "model", "dtype", "contender", "stage").items()}
    body = []
    for (model, dtype, contender, stage), row in sorted(latest.items(), key=str):
        peer = latest.get((model, dtype, "upstream", stage)) if contender == "ours" else None
        fsdp2 = latest.get((model, dtype, "fsdp2", None)) if contender == "ours" else None
        figures = [row[phase][key] for phase in ("whole_peak", "train_peak") for key in ("hwm_mb", "pss_mb")]
        ratios = [
            ratio(row[phase][key], other[phase][key] if other else None)
            for other in (peer, fsdp2)
            for phase, key in (("whole_peak", "hwm_mb"), ("whole_peak", "pss_mb"))
        ]
        body.append(
            [model, dtype, contender, stage, *figures, row["train_peak"]["data_mb"], row["imported_mb"], *ratios]
        )
    head = ["model", "dtype", "contender", "stage", "whole HWM MB", "whole PSS MB", "train HWM MB", "train PSS MB"]
    head += ["train data MB", "after imports MB"]
    head += ["HWM / upstream", "PSS / upstream", "HWM / FSDP2", "PSS / FSDP2"]
    return section("Peak memory per rank", list(latest.values()), table(head, body))


def startup(rows: list[Row]) -> str:
    """Imports and `initialize()`."""
    latest = [group[-1] for group in newest(rows, "what", "contender", "stage").values()]
    imports = [
        [row["contender"], spread(row["torch_s"]), spread(row["both_s"]), spread(row["import_ratio"])]
        for row in latest
        if row["what"] == "import"
    ]
    calls = [
        [row["contender"], row["stage"], row["what"] == "initialize_cold"]
        + [spread(row[name]) for name in ("init_distributed_s", "build_s", "initialize_s")]
        for row in latest
        if row["what"] != "import"
    ]
    head = ["contender", "stage", "cold", "init_distributed s", "load model s", "initialize s"]
    both = table(["contender", "import torch s", "and deepspeed s", "ratio"], imports) + "\n" + table(head, calls)
    return section("Start", latest, both)


def overhead(rows: list[Row]) -> str:
    """One rank, against the bare loop."""
    latest = [group[-1] for group in newest(rows, "dtype", "contender", "stage").values()]
    body = [
        [row["contender"], row["stage"], row["dtype"], spread(row["step_s"]), spread(row.get("over_bare")), last(row)]
        for row in latest
    ]
    head = ["contender", "stage", "dtype", "step s", "x bare loop", "last loss"]
    return section("Engine overhead at one rank", latest, table(head, body))


def checkpoint(rows: list[Row]) -> str:
    """Saving and loading; the ratio columns compare with upstream and with `dd`."""
    latest = {key: group[-1] for key, group in newest(rows, "model", "contender", "stage").items()}
    names = ("save_s", "stall_s", "durable_s", "dd_s", "extra_mb", "bytes_per_parameter", "load_s")
    body = []
    for (model, contender, stage), row in sorted(latest.items(), key=str):
        peer = latest.get((model, "upstream", stage), {}) if contender == "ours" else {}
        body.append(
            [
                *(model, contender, stage, *(row[name]["median"] for name in names)),
                ratio(row["durable_s"], row["dd_s"]),
                ratio(row["stall_s"], peer.get("stall_s")),
                ratio(row["save_s"], peer.get("save_s")),
                ratio(peer.get("load_s"), row["load_s"]),
            ]
        )
    head = [
        "model",
        "contender",
        "stage",
        "save call s",
        "stall s",
        "durable s",
        "dd s",
        "extra MB",
        "bytes / parameter",
    ]
    head += ["load s", "durable / dd", "stall / upstream", "call / upstream", "load: upstream / ours"]
    return section("Checkpoints", list(latest.values()), table(head, body))


def pipe_step(rows: list[Row]) -> str:
    """Pipelines: steps next to what was planned for them, and against torch's schedule at the same cut."""
    latest = [row for group in newest(rows, "what", "contender").values() for row in group if "step_s" in row]
    peers = {(row["run"], row["what"]): row["step_s"] for row in latest if row["contender"] in ("pipe", "upstream")}
    body = []
    for row in latest:
        engine = row["what"] == "engine"
        peer = peers.get((row["run"], "engine" if engine else f"torch@{row['what'].partition('@')[2]}"))
        options = {key: value for key, value in row.get("extra", {}).items() if key in ("measured", "schedule")}
        name = f"engine, {row['contender']} {options or ''}" if engine else row["what"]
        planned, parts = row.get("simulated_s"), row.get("parts")
        body.append(
            [name, row["step_s"]["median"], planned, ratio(row["step_s"], planned), ratio(peer, row["step_s"]), parts]
        )
    head = ["contender", "s per step", "planned s", "step / planned", "times faster than its peer", "cut"]
    return section("Pipelines, two stages", latest, table(head, body))


def pipe_schedules(rows: list[Row]) -> str:
    """Seconds to make and prove schedules."""
    latest = [row for group in newest(rows, "contender", "stages", "micro_batches").values() for row in group]
    names = ("generate_s", "validate_s", "simulate_s", "proven_s")
    body = [
        [row["contender"], row["stages"], row["micro_batches"], *(row[name]["median"] for name in names)]
        for row in latest
    ]
    head = ["schedule", "stages", "micro-batches", "generate s", "validate s", "simulate s", "generate and validate s"]
    return section("Schedules", latest, table(head, body))


def collectives(rows: list[Row]) -> str:
    """Milliseconds per collective and transport."""
    latest = [row for group in newest(rows, "dtype", "nbytes").values() for row in group]
    body = [
        [
            *(row["op"], row["dtype"], row["nbytes"] / 1e6, row["transport"], row["call_s"]["median"] * 1e3),
            row["nbytes"] / row["call_s"]["median"] / 1e9,
        ]
        for row in latest
    ]
    head = ["op", "dtype", "MB", "transport", "ms", "GB/s"]
    return section("Collectives, two ranks", latest, table(head, body))


def infer_decode(rows: list[Row]) -> str:
    """Tokens of SmolLM2; the ratio columns say how many times faster than transformers and llama.cpp a row is."""
    latest = [group[-1] for group in newest(rows, "case", "contender").values()]
    figures = {(row["run"], row["case"], row["contender"]): row.get("step_s", row.get("first_s")) for row in latest}
    body = []
    for row in sorted(latest, key=lambda row: str(row["case"])):
        own = figures[row["run"], row["case"], row["contender"]]
        peers = [
            figures.get((row["run"], row["case"], peer))
            for peer in ("transformers:bf16", "llama.cpp:f16", "llama.cpp:bf16", "llama.cpp:q8_0")
        ]
        share, milliseconds = row.get("share"), [own[key] * 1e3 for key in ("median", "p20", "p80")]
        body.append([row["case"], row["contender"], *milliseconds, share, *(ratio(peer, own) for peer in peers)])
    head = ["case", "contender", "ms", "p20", "p80", "share of the roofline"]
    head += ["x transformers", "x llama.cpp F16", "x llama.cpp BF16", "x llama.cpp Q8_0"]
    return section("Inference of SmolLM2-135M", latest, table(head, body))


def infer_load(rows: list[Row]) -> str:
    """Starting and loading."""
    latest = [group[-1] for group in newest(rows, "contender").values()]
    names = ("start_to_first_token_s", "import_s", "build_s", "peak_over_weights", "weights_mb")
    body = [[row["contender"], *(row[name]["median"] for name in names)] for row in latest]
    head = ["contender", "start to first token s", "imports s", "build s", "peak / weights", "weights MB"]
    return section("Loading SmolLM2-135M", latest, table(head, body))


def infer_serving(rows: list[Row]) -> str:
    """Serving a trace of requests."""
    latest = [group[-1] for group in newest(rows, "slots", "requests", "contender").values()]
    rates = {
        tuple(row[key] for key in ("run", "slots", "requests", "contender")): row["tokens_per_s"] for row in latest
    }
    body = []
    for row in latest:
        place = (row["run"], row["slots"], row["requests"])
        own = row["tokens_per_s"]
        peers = [rates.get((*place, peer)) for peer in ("transformers:bf16", "llama.cpp:f16", "llama.cpp:q8_0")]
        waits = [row[name]["median"] for name in ("first_p50_s", "first_p95_s", "total_s")]
        times = [ratio(own, peer) for peer in peers]
        body.append([row["slots"], row["requests"], row["contender"], own["median"], *waits, *times])
    head = ["slots", "requests", "contender", "tokens/s", "first token p50 s", "p95 s", "all s"]
    head += ["x transformers", "x llama.cpp F16", "x llama.cpp Q8_0"]
    return section("Serving SmolLM2-135M", latest, table(head, body))


def infer_perplexity(rows: list[Row]) -> str:
    """Perplexity by precision."""
    latest = [group[-1] for group in newest(rows, "windows", "contender").values()]
    body = [
        [row["windows"], row["contender"], f"{row['perplexity']:.4f}", f"{row['over_first'] - 1:+.2%}"]
        for row in latest
    ]
    head = ["windows of 512", "contender", "perplexity", "against transformers fp32"]
    return section("Perplexity of SmolLM2-135M", latest, table(head, body))


if __name__ == "__main__":
    main()
