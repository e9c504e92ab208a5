"""Collective algorithms as data: written with two verbs, proved, simulated, tuned and projected. NumPy only."""

from . import algorithms as _families  # registers them; below, `algorithms` becomes the function that lists them
from .program import Program, project, project_all
from .registry import algorithm, algorithms, build, get
from .schedule import COLLECTIVES, Ref, Schedule
from .verify import verify

del _families

__all__ = [
    "COLLECTIVES",
    "Program",
    "Ref",
    "Schedule",
    "algorithm",
    "algorithms",
    "build",
    "get",
    "project",
    "project_all",
    "verify",
]
