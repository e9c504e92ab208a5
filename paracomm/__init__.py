"""Collective communication as data, and Transformers trained on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paracomm.errors import Error, InvalidArgument, Mismatch, PeerLost, ScheduleError, SecurityError, Timeout
from paracomm.version import __version__

if TYPE_CHECKING:
    from paracomm.bootstrap import init
    from paracomm.comm import Communicator, Work, connect

__all__ = [
    "Communicator", "Error", "InvalidArgument", "Mismatch", "PeerLost", "ScheduleError", "SecurityError", "Timeout",
    "Work", "__version__", "connect", "init",
]  # fmt: skip

# Schedules need no extension, so that it is loaded with the first name that does.
_LAZY = {
    "init": "paracomm.bootstrap",
    "Communicator": "paracomm.comm",
    "Work": "paracomm.comm",
    "connect": "paracomm.comm",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'paracomm' has no attribute {name!r}")
