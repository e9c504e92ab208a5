"""Arguments: each is checked before anything is sent, and nothing kills the interpreter."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from paracomm import InvalidArgument
from paracomm.comm.arguments import LONGEST_S, seconds

NO_SECONDS = [0, -1, -0.0, float("nan"), float("inf"), "5", b"5", True, np.True_, [1], np.array(3.0), 1j, object()]


@pytest.mark.parametrize("value", [1, 2.5, np.float32(3), np.int64(4), Fraction(1, 2), 5e-324])
def test_seconds_are_any_finite_number_above_0(value: Any) -> None:
    assert seconds("timeout_s", value) == float(value)


def test_seconds_end_where_the_core_sees_no_end() -> None:
    assert seconds("timeout_s", None) == -1.0
    assert seconds("timeout_s", 10**400) == seconds("timeout_s", 1e300) == LONGEST_S


@pytest.mark.parametrize("value", NO_SECONDS)
def test_anything_else_is_no_number_of_seconds(value: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^timeout_s must be a finite number of seconds above 0, got "):
        seconds("timeout_s", value)
