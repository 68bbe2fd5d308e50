"""Schedules as data: generated, proven, simulated, chosen and drawn without torch and without ranks."""

from __future__ import annotations

from ds_pipe.schedule.action import Action, Schedule
from ds_pipe.schedule.choose import SCHEDULES, Choice, Verdict, build, choose
from ds_pipe.schedule.draw import to_svg, to_text, to_trace
from ds_pipe.schedule.gpipe import gpipe
from ds_pipe.schedule.inference import inference
from ds_pipe.schedule.interleaved import interleaved
from ds_pipe.schedule.lower import Program, Recv, Send, Transfer, check_program, lower
from ds_pipe.schedule.one_f_one_b import one_f_one_b
from ds_pipe.schedule.simulate import Costs, Measured, Simulation, Span, simulate
from ds_pipe.schedule.validate import validate
from ds_pipe.schedule.zb_h1 import zb_h1
from ds_pipe.schedule.zb_v import zb_v

__all__ = [
    "SCHEDULES",
    "Action",
    "Choice",
    "Costs",
    "Measured",
    "Program",
    "Recv",
    "Schedule",
    "Send",
    "Simulation",
    "Span",
    "Transfer",
    "Verdict",
    "build",
    "check_program",
    "choose",
    "gpipe",
    "inference",
    "interleaved",
    "lower",
    "one_f_one_b",
    "simulate",
    "to_svg",
    "to_text",
    "to_trace",
    "validate",
    "zb_h1",
    "zb_v",
]
