"""Pictures of a plan, of a measured run, or of both on one time axis: terminal text, SVG, Perfetto/Chrome JSON.

`plan` is a `Simulation`, `measured` a `Measured` run; either may be None. With both, each stage has two rows, the plan
above the run, and the plan is stretched (`scale`) so that its total work equals the run's: what differs is then order
and waiting, not the unit of time. All three return a string; nothing is printed or written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from ds_pipe.errors import ScheduleError
from ds_pipe.schedule.action import Action
from ds_pipe.schedule.simulate import Measured, Simulation, Span

__all__ = ["to_svg", "to_text", "to_trace"]

# Forward blue, whole backward green, input gradient teal, weight gradient light green; chunks get lighter.
_FILL = {"F": "#4f81c7", "B": "#3f9c5a", "I": "#2fa8a0", "W": "#9ccf8a"}
_ANSI = {"F": 44, "B": 42, "I": 46, "W": 102}

_Row = tuple[str, int, list[tuple[Action, float, float]]]  # "plan" or "run", stage, spans in floats from 0


def to_text(
    plan: Simulation | None = None, measured: Measured | None = None, *, width: int = 100, color: bool = False
) -> str:
    """A time line of at most `width` columns of time: a row per stage (and per run), a letter or code per column.

    An action fills its columns with its kind in lower case for chunks above 0; where there is room its micro-batch
    number stands at its beginning. A dot is waiting. `color` adds ANSI colours.
    """
    rows, total = _rows(plan, measured)
    exact = plan is not None and measured is None and 0 < total <= width
    columns = round(total) if exact and total == round(total) else width
    lines = []
    for which, stage, spans in rows:
        cells = ["."] * columns
        styles = [0] * columns
        for action, start, end in spans:
            a, b = round(start / total * columns), round(end / total * columns)
            kind = action.kind.lower() if action.chunk else action.kind
            text = str(action.micro_batch)
            text = kind + text if len(text) < b - a else kind
            for at in range(a, min(b, columns)):
                cells[at] = text[at - a] if at - a < len(text) else kind if len(text) == 1 else "-"
                styles[at] = _ANSI[action.kind]
        if color:
            pairs = zip(cells, styles, strict=True)
            cells = [f"\x1b[30;{style}m{cell}\x1b[0m" if style else cell for cell, style in pairs]
        lines.append(f"{which:<4} {stage:>3} |{''.join(cells)}|")
    return "\n".join([_title(plan, measured), *lines])


def to_svg(plan: Simulation | None = None, measured: Measured | None = None, *, width: int = 1200) -> str:
    """A standalone SVG, `width` pixels wide; every action has a tooltip with its code, start and end."""
    rows, total = _rows(plan, measured)
    left, top, height, gap = 90, 28, 20, 4
    unit = (width - left - 10) / total
    parts = [f'<text x="4" y="16">{escape(_title(plan, measured))}</text>']
    for index, (which, stage, spans) in enumerate(rows):
        y = top + index * (height + gap)
        parts.append(f'<text x="4" y="{y + 14}">{which} {stage}</text>')
        for action, start, end in spans:
            x, wide = left + start * unit, (end - start) * unit
            opacity = max(0.4, 1 - 0.35 * action.chunk)
            parts.append(
                f'<g><title>{action}: {start:.6g} to {end:.6g}</title><rect x="{x:.2f}" y="{y}" width="{wide:.2f}" '
                f'height="{height}" fill="{_FILL[action.kind]}" fill-opacity="{opacity:.2f}" stroke="#fff" '
                'stroke-width="0.5"/>'
            )
            if wide >= 7 * len(str(action.micro_batch)) + 3:
                parts.append(f'<text x="{x + 2:.2f}" y="{y + 14}">{action.micro_batch}</text>')
            parts.append("</g>")
    tall = top + len(rows) * (height + gap) + 22
    for index, (kind, what) in enumerate(
        (("F", "forward"), ("B", "backward"), ("I", "input gradient"), ("W", "weight gradient"))
    ):
        x, y = left + 130 * index, tall - 18
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{_FILL[kind]}"/>')
        parts.append(f'<text x="{x + 16}" y="{y + 11}">{what}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{tall}" font-family="monospace" '
    return "\n".join([head + 'font-size="11">', '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>"])


def to_trace(
    plan: Simulation | None = None, measured: Measured | None = None, *, microseconds_per_unit: float = 1e6
) -> str:
    """Chrome trace events as JSON, for Perfetto or chrome://tracing: a process per run, a thread per stage.

    `microseconds_per_unit` says what one unit of time is; the default takes the times for seconds.
    """
    rows, _ = _rows(plan, measured)
    events: list[dict[str, object]] = []
    for pid, which in enumerate(("plan", "run")):
        mine = [row for row in rows if row[0] == which]
        if mine:
            name = _title(plan if pid == 0 else None, measured if pid == 1 else None)
            events.append({"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}})
        for _, stage, spans in mine:
            label = {"name": f"stage {stage}"}
            events.append({"name": "thread_name", "ph": "M", "pid": pid, "tid": stage, "args": label})
            for action, start, end in spans:
                events.append(
                    {
                        "name": str(action),
                        "cat": action.kind,
                        "ph": "X",
                        "pid": pid,
                        "tid": stage,
                        "ts": start * microseconds_per_unit,
                        "dur": (end - start) * microseconds_per_unit,
                        "args": {"micro_batch": action.micro_batch, "chunk": action.chunk},
                    }
                )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _rows(plan: Simulation | None, measured: Measured | None) -> tuple[list[_Row], float]:
    """The rows in the order of drawing, and the end of the last span; all times are floats from 0."""
    if plan is None and measured is None:
        raise ScheduleError("nothing to draw: give a plan (a Simulation), a measured run (Measured), or both")
    if plan is not None and measured is not None and len(plan.spans) != len(measured.spans):
        raise ScheduleError(f"the plan has {len(plan.spans)} stages, the measured run {len(measured.spans)}")
    work = float(sum(plan.busy)) if plan else 0.0
    scale = float(sum(measured.busy)) / work if measured and work else 1.0
    rows: list[_Row] = []
    num_stages = max(len(run.spans) for run in (plan, measured) if run is not None)
    for stage in range(num_stages):
        if plan is not None:
            rows.append(("plan", stage, _shifted(plan.spans[stage], 0.0, scale)))
        if measured is not None:
            begin = float(min(spans[0].start for spans in measured.spans if spans))
            rows.append(("run", stage, _shifted(measured.spans[stage], begin, 1.0)))
    total = max((end for _, _, spans in rows for _, _, end in spans), default=0.0)
    if not total > 0:
        raise ScheduleError("nothing to draw: no action takes any time")
    return rows, total


def _shifted(spans: Sequence[Span], begin: float, scale: float) -> list[tuple[Action, float, float]]:
    return [(action, (float(a) - begin) * scale, (float(b) - begin) * scale) for action, a, b in spans]


def _title(plan: Simulation | None, measured: Measured | None) -> str:
    runs = [("plan", plan), ("run", measured)]
    return "; ".join(
        f"{what} {run.name}: time {float(run.makespan):.6g}, bubble {float(run.bubble_fraction):.1%}"
        for what, run in runs
        if run is not None
    )
