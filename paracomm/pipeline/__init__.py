"""Pipeline schedules as data: written by short functions, checked, simulated, drawn, and run by paracomm.parallel."""

from paracomm.pipeline import schedules as schedules  # fills the registry
from paracomm.pipeline.action import Action, PipelineSchedule, read_schedule
from paracomm.pipeline.cut import cut, cut_evenly
from paracomm.pipeline.registry import SCHEDULES, build, pipeline_schedule
from paracomm.pipeline.simulate import Costs, Link, Span, Timeline, simulate
from paracomm.pipeline.verify import Fault, faults, verify

__all__ = [
    "SCHEDULES",
    "Action",
    "Costs",
    "Fault",
    "Link",
    "PipelineSchedule",
    "Span",
    "Timeline",
    "build",
    "cut",
    "cut_evenly",
    "faults",
    "pipeline_schedule",
    "read_schedule",
    "simulate",
    "verify",
]
