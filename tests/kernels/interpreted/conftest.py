"""Kernels on Triton's interpreter, mended: tests of this folder run in a process of their own, with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from paracomm.kernels.select import interpreted

REASON = "interpreted kernels need a process with TRITON_INTERPRET=1: `make test-kernels`"


def pytest_ignore_collect(collection_path, config):  # type: ignore[no-untyped-def]
    return None


if interpreted():
    from tests.kernels import interpreter

    interpreter.install()


@pytest.fixture(autouse=True)
def unwritten_is_nan() -> Iterator[None]:
    """What a kernel should have written and did not is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
