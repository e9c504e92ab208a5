"""bench/gpu_check.sh where there is no GPU: what it says, and that its cases compute what they are compared with."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def check(monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "bench/gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "SMALL", 16)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: bench/gpu_check.sh would run")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu_check.sh")], env={**os.environ, "PYTHON": sys.executable}, text=True,
        capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.startswith("gpu_check: no GPU") and done.stderr.endswith("Nothing was run.\n")


def test_cases_compute_what_they_are_compared_with(check):
    """By the eager twins, in float32 and small."""
    compared = 0
    for case in check.cases():
        ratio = check.error_ratio(case)
        assert ratio is None or ratio <= 1, case.name
        compared += ratio is not None
    assert compared >= 12


def test_a_wrong_kernel_is_seen(check):
    (case, *_) = check.products(16, 16, 16, torch.float32)
    wrong = check.Case(case.name, lambda x, w: case.ours(x, w) * 1.001, case.theirs, case.shapes, case.dtype, 1.0)
    assert check.error_ratio(case) <= 1 < check.error_ratio(wrong)
