"""A plan as a table for terminals, as a self-contained HTML page, and as JSON for programs."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepspeed.planner.advice import Variant
from deepspeed.planner.plan import Plan
from ds_zero.forecast import OWNERS

__all__ = ["as_html", "as_json", "as_text", "readable"]


def readable(nbytes: float) -> str:
    """ "1.50 GB": bytes in the largest decimal unit that leaves at least one."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(nbytes) < 1000 or unit == "TB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    raise AssertionError("unreachable")


def _head(plan: Plan) -> str:
    config = plan.config
    return (
        f"{plan.workload.name}: {plan.forecast.shard_map.numel:,} parameters, {config.model_dtype}, ZeRO stage "
        f"{config.zero_optimization.stage}, {plan.world} data-parallel ranks on {plan.device}"
    )


def _facts(plan: Plan) -> list[tuple[str, str]]:
    config, found = plan.config, plan.forecast
    calls = ", ".join(f"{count:,} {op}" for op, count in sorted(found.calls.items()) if count) or "none"
    batch = (
        f"{config.train_batch_size} = {config.train_micro_batch_size_per_gpu} per rank x "
        f"{config.gradient_accumulation_steps} micro-batches x {plan.world} ranks"
    )
    facts = [
        ("batch", batch + (f" ({plan.workload.text})" if plan.workload.text else "")),
        ("peak of a rank", f"{readable(plan.peak_nbytes)}, in {found.peak.phase}"),
        ("if the allocator gives nothing back", readable(max(found.kept, plan.peak_nbytes))),
        ("sent per rank and step", f"{readable(found.wire_nbytes)} ({found.wire_elements:,.0f} elements)"),
        ("collectives per step", calls),
        ("checkpoint", readable(plan.checkpoint_nbytes)),
        ("weights alone", readable(plan.weights_nbytes)),
    ]
    return [*facts, *(("note", note) for note in plan.notes)]


def _rows(plan: Plan) -> list[tuple[str, int, list[int], str]]:
    """(owner, bytes at the peak, bytes at the peak of forward, backward and step, what it is)."""
    highest, peak = plan.forecast.highest, plan.forecast.peak
    return [
        (owner, peak.held.get(owner, 0), [highest[phase].held.get(owner, 0) for phase in highest], text)
        for owner, text in OWNERS.items()
    ]


def _verdict(plan: Plan, device_memory: int | None, variants: Sequence[Variant]) -> list[str]:
    if device_memory is None:
        return []
    if plan.fits(device_memory):
        spare = device_memory - plan.peak_nbytes
        return [f"fits in {readable(device_memory)}, with {readable(spare)} to spare"]
    lines = [f"does NOT fit in {readable(device_memory)}: {readable(plan.peak_nbytes - device_memory)} too much"]
    for variant in variants:
        verdict = "fits" if variant.fits else "still too much"
        lines.append(f"with {variant.text}: {readable(variant.peak_nbytes)}, {verdict}")
    if not any(variant.fits for variant in variants):
        lines.append("no key of the config makes it fit: use more ranks, shorter samples, or activation checkpointing")
    return lines


def as_text(plan: Plan, device_memory: int | None = None, variants: Sequence[Variant] = (), width: int = 120) -> str:
    """Tables for a terminal of `width` columns."""
    table = Table()
    table.add_column("bytes of one rank")
    for name in ("at the peak", *plan.forecast.highest):
        table.add_column(name, justify="right")
    for owner, at_peak, phases, _ in _rows(plan):
        table.add_row(owner, *(readable(n) for n in (at_peak, *phases)))
    totals = [moment.total for moment in plan.forecast.highest.values()]
    table.add_section()
    table.add_row("total", *(readable(n) for n in (plan.peak_nbytes, *totals)))
    facts = Table.grid(padding=(0, 2))
    for name, text in _facts(plan):
        facts.add_row(Text(name), Text(text))
    console = Console(width=width, no_color=True)
    with console.capture() as captured:
        console.print(_head(plan), markup=False, highlight=False, soft_wrap=True)
        console.print(table)
        console.print(facts)
        for line in _verdict(plan, device_memory, variants):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return captured.get().rstrip("\n")


def as_json(plan: Plan, device_memory: int | None = None, variants: Sequence[Variant] = ()) -> str:
    """All numbers in bytes, for programs."""
    found = plan.forecast
    document: dict[str, Any] = {
        "model": plan.workload.name,
        "parameters": found.shard_map.numel,
        "ranks": plan.world,
        "device": plan.device,
        "zero_stage": plan.config.zero_optimization.stage,
        "peak": {"phase": found.peak.phase, "total": plan.peak_nbytes, "held": dict(found.peak.held)},
        "phases": {phase: dict(moment.held) for phase, moment in found.highest.items()},
        "kept": found.kept,
        "calls": dict(found.calls),
        "wire_elements": found.wire_elements,
        "wire_nbytes": found.wire_nbytes,
        "checkpoint_nbytes": plan.checkpoint_nbytes,
        "weights_nbytes": plan.weights_nbytes,
        "notes": list(plan.notes),
    }
    if device_memory is not None:
        document["device_memory"] = device_memory
        document["fits"] = plan.fits(device_memory)
        document["variants"] = [{"keys": dict(v.keys), "peak_nbytes": v.peak_nbytes, "fits": v.fits} for v in variants]
    return json.dumps(document, indent=2)


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:60em;color:#222}
table{border-collapse:collapse;width:100%}td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child,td.text{text-align:left}.bar{display:flex;height:2.2em;margin:1em 0;border-radius:4px;
overflow:hidden}.bar div{min-width:1px}.no{color:#a00}.yes{color:#060}dt{font-weight:600}dd{margin:0 0 .4em 1em}"""
_COLOURS = ("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#9c755f")


def as_html(plan: Plan, device_memory: int | None = None, variants: Sequence[Variant] = ()) -> str:
    """One page without scripts, fonts or links: bar, table, facts and verdict."""
    rows = _rows(plan)
    colours = dict(zip((row[0] for row in rows), _COLOURS, strict=True))
    whole = max(plan.peak_nbytes, device_memory or 0)
    bar = "".join(
        f'<div title="{owner}: {readable(at_peak)}" style="width:{at_peak / whole:.4%};background:{colours[owner]}">'
        "</div>"
        for owner, at_peak, _, _ in rows
        if at_peak
    )
    heads = "".join(f"<th>{name}</th>" for name in ("bytes of one rank", "at the peak", *plan.forecast.highest, ""))
    body = "".join(
        f'<tr><td><span style="color:{colours[owner]}">&#9632;</span> {owner}</td>'
        + "".join(f"<td>{readable(n)}</td>" for n in (at_peak, *phases))
        + f'<td class="text">{html.escape(text)}</td></tr>'
        for owner, at_peak, phases, text in rows
    )
    totals = (plan.peak_nbytes, *(moment.total for moment in plan.forecast.highest.values()))
    body += "<tr><th>total</th>" + "".join(f"<th>{readable(n)}</th>" for n in totals) + "<th></th></tr>"
    facts = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in _facts(plan))
    kind = "yes" if device_memory is not None and plan.fits(device_memory) else "no"
    verdict = "".join(f'<p class="{kind}">{html.escape(line)}</p>' for line in _verdict(plan, device_memory, variants))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(plan.workload.name)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(_head(plan))}</h1>{verdict}"
        f'<div class="bar">{bar}</div><table><tr>{heads}</tr>{body}</table><dl>{facts}</dl></html>\n'
    )
