"""Kernels on Triton's interpreter, mended: tests of this folder run in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from paracomm.kernels.select import interpreted

REASON = "kernels are interpreted in a process with TRITON_INTERPRET=1: `make test-kernels`"


class Elsewhere(pytest.File):
    """A file whose tests this process cannot run: one skip, with the reason."""

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(REASON, allow_module_level=True)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Elsewhere | None:
    return None if interpreted() else Elsewhere.from_parent(parent, path=module_path)


if interpreted():
    from tests.kernels import interpreter

    interpreter.install()


@pytest.fixture(autouse=True)
def unwritten_is_nan() -> Iterator[None]:
    """What a kernel should have written and did not is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
