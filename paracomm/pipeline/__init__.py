"""Pipeline schedules as data: written by short functions, checked, simulated, drawn, and run by paracomm.parallel."""

from paracomm.pipeline import schedules as schedules  # fills the registry
from paracomm.pipeline.action import Action, PipelineSchedule, read_schedule
from paracomm.pipeline.registry import SCHEDULES, build, pipeline_schedule

__all__ = ["SCHEDULES", "Action", "PipelineSchedule", "build", "pipeline_schedule", "read_schedule"]
