"""What paracomm raises. The library never prints, aborts or exits: every failure is one of these."""

from __future__ import annotations


class Error(RuntimeError):
    """The root of every error that paracomm raises on its own account. Programs on torch catch RuntimeError."""


class PeerLost(Error):
    """Another rank died or closed its connection; the communicator is of no further use."""


class Timeout(Error, TimeoutError):
    """An operation did not finish within its time."""


class Mismatch(Error):
    """The ranks called different operations, or the same one with different dtype, count, reduction or order."""


class ScheduleError(Error):
    """A schedule that is wrong: it computes something else, races, or can deadlock."""


class InvalidArgument(Error, ValueError):
    """An argument that no call of this kind can accept."""


class SecurityError(Error):
    """A connection or a file that could not prove that it belongs to the job."""
