"""What a rank did when: spans that rooms write into one record, where somebody has asked for it.

    timeline.start(comm)
    with timeline.span("compute", "2F0"): ...
    timeline.stop().write("trace/rank-0.json")

The file is Chrome's trace format, which Perfetto (ui.perfetto.dev) and chrome://tracing show, beside what torch's
profiler exports (see merged()). Its times are those of torch's profiler: microseconds of the wall clock since
"baseTimeNanoseconds".
"""

from paracomm.timeline.chrome import merged, read
from paracomm.timeline.record import Record, add, later, span, start, stop
from paracomm.timeline.shares import Shares, shares

__all__ = ["Record", "Shares", "add", "later", "merged", "read", "shares", "span", "start", "stop"]
