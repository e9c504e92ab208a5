"""Every kernel at every configuration of the tables, as Cases."""

from __future__ import annotations

from collections.abc import Iterator

from paracomm.kernels.static import attention_cases, elementwise_cases, product_cases, row_cases
from paracomm.kernels.static.case import Case

FAMILIES = (attention_cases, product_cases, row_cases, elementwise_cases)


def cases(arch: int) -> Iterator[Case]:
    """All of them for sm_`arch`."""
    for family in FAMILIES:
        yield from family.cases(arch)
