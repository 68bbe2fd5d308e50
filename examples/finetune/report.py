"""The HTML report: one file without outside references, charts as inline SVG.

Reads steps.jsonl (one line per step), summary.json and, after a demo, demo.json from a run's folder.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 220, 56, 28, 14
COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea")

Series = Mapping[str, Sequence[tuple[float, float]]]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2rem auto; padding: 0 1rem; color: #1f2937; }
h1 { font-size: 1.6rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
pre, .text { background: #f3f4f6; padding: .7rem 1rem; border-radius: .4rem; white-space: pre-wrap; overflow-x: auto }
.charts { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0; flex: 1 1 420px } svg { width: 100% }
figcaption { font-weight: 600 } .grid { stroke: #e5e7eb }
text { font: 11px system-ui; fill: #4b5563 }
.good { color: #047857; font-weight: 600 } .bad { color: #b91c1c; font-weight: 600 }
"""


def write_report(output: Path) -> Path:
    """Write `output/report.html` from what a run left there."""
    rows = [json.loads(line) for line in (output / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    demo_file = output / "demo.json"
    demo = json.loads(demo_file.read_text(encoding="utf-8")) if demo_file.exists() else None
    body = "\n".join(
        (
            "<h1>Fine-tuning with ZeRO</h1>",
            _headline(rows, summary),
            '<div class="charts">',
            _figure("Training loss", _by_run(rows, "loss", 1.0)),
            _figure("Gradient norm before clipping", _by_run(rows, "grad_norm", 1.0)),
            _figure("Tokens per second, all ranks", _by_run(rows, "tokens_per_second", 1.0), zero=True),
            _figure("Share of time waiting for communication, %", _by_run(rows, "communication", 100.0), zero=True),
            _figure("Memory of rank 0, GB", _memory(rows), zero=True),
            _figure("Sent by each rank per step, MB", _by_run(rows, "wire_nbytes", 1e-6), zero=True),
            "</div>",
            _interruption(demo) if demo else "",
            "<h2>The same prompt before and after</h2>",
            *(
                f'<p>{when}</p><div class="text">{_escape(summary[f"text_{when}"])}</div>'
                for when in ("before", "after")
            ),
            "<h2>Versions and configuration</h2>",
            _table(summary["versions"].items()),
            f"<pre>{_escape(json.dumps(summary['config'], indent=2))}</pre>",
            f"<pre>{_escape(summary['command'])}</pre>",
        )
    )
    path = output / "report.html"
    title = "<title>Fine-tuning with ZeRO</title>"
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{title}<style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n",
        encoding="utf-8",
    )
    return path


def _headline(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    ordered = sorted(row["tokens_per_second"] for row in rows)
    facts = {
        "Held-out loss": f"{summary['loss_before']:.4f} before, {summary['loss_after']:.4f} after",
        "Ranks": summary["ranks"],
        "Host": summary["host"],
        "Steps": f"{rows[-1]['step']} of {summary['tokens_per_step']:,} tokens",
        "Throughput": f"{ordered[len(ordered) // 2]:,.0f} tokens per second (median step)",
        "Peak memory of rank 0": f"{max(row['peak_nbytes'] for row in rows) / 1e9:.2f} GB",
    }
    return _table(facts.items())


def _interruption(demo: dict[str, Any]) -> str:
    heads = ("step", "loss before the kill", "loss after resuming", "")
    lines = ["".join(f"<th>{head}</th>" for head in heads)]
    lines += (
        f'<td>{step}</td><td class="n">{first!r}</td><td class="n">{second!r}</td><td>{_mark(first == second)}</td>'
        for step, first, second in demo["compared"]
    )
    return (
        f"<h2>Killed and resumed</h2><p>{_escape(demo['story'])}</p><table>"
        + "".join(f"<tr>{line}</tr>" for line in lines)
        + f"</table><p>What transformers alone generates from the exported folder: {_mark(demo['export_agrees'])}."
    )


def _mark(good: bool) -> str:
    return '<span class="good">same</span>' if good else '<span class="bad">different</span>'


def _by_run(rows: list[dict[str, Any]], key: str, factor: float) -> Series:
    """One series per start of the script."""
    runs = dict.fromkeys(row["run"] for row in rows)
    return {
        f"run of {run}": [
            (row["step"], row[key] * factor) for row in rows if row["run"] == run and row[key] is not None
        ]
        for run in runs
    }


def _memory(rows: list[dict[str, Any]]) -> Series:
    last = [row for row in rows if row["run"] == rows[-1]["run"]]
    return {
        "in use after a step": [(row["step"], row["memory_nbytes"] / 1e9) for row in last],
        "peak": [(row["step"], row["peak_nbytes"] / 1e9) for row in last],
    }


def _figure(title: str, series: Series, zero: bool = False) -> str:
    """A line chart; `zero` lets its vertical axis begin at 0."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = 0.0 if zero else min(y for _, y in points), max(y for _, y in points)
    y_high += 0.05 * (y_high - y_low) or 1.0
    plot_width, plot_height = WIDTH - LEFT - 10, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> str:
        across = LEFT + plot_width * (x - x_low) / max(x_high - x_low, 1)
        return f"{across:.1f},{TOP + plot_height * (1 - (y - y_low) / (y_high - y_low)):.1f}"

    parts = []
    for index in range(5):
        value = y_low + (y_high - y_low) * index / 4
        height = TOP + plot_height * (1 - index / 4)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 10}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for step in (x_low, x_high):
        across = place(step, y_low).split(",")[0]
        parts.append(f'<text x="{across}" y="{HEIGHT - 8}" text-anchor="middle">step {step:g}</text>')
    for index, (name, line) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        dash = ' stroke-dasharray="6 4"' if index else ""
        path = " ".join(place(x, y) for x, y in line)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2"{dash} points="{path}"/>')
        where = f'x="{WIDTH - 12}" y="{TOP + 12 + 14 * index}" text-anchor="end"'
        parts.append(f'<text {where} style="fill:{colour}">{_escape(name)}</text>')
    return (
        f'<figure><figcaption>{_escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{_escape(title)}">{"".join(parts)}</svg></figure>'
    )


def _table(items: Any) -> str:
    rows = "".join(f"<tr><th>{_escape(str(key))}</th><td>{_escape(str(value))}</td></tr>" for key, value in items)
    return f"<table>{rows}</table>"


def _escape(text: str) -> str:
    return html.escape(text)
