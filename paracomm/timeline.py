"""What a rank did when: spans that rooms write into one record, where somebody has asked for it.

with timeline.span("compute", "2F0"): ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def span(kind: str, name: str, **details: Any) -> Iterator[None]:
    """Records what happens inside as `name`, of `kind` "compute", "communication", "wait" or "bubble"."""
    yield
