"""Without Triton, or where it cannot run, everything runs on torch's own operations; who insists is told why not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paracomm import kernels
from paracomm.errors import Error, InvalidArgument
from paracomm.kernels import select

ROOT = Path(__file__).resolve().parents[2]

MODEL = """
import torch
from paracomm import kernels
from paracomm.models import Decoder, DecoderConfig, generate
from paracomm.parallel import rng

tokens = torch.arange(24).view(2, 12) % 17
shapes = {"vocabulary": 17, "width": 16, "depth": 1, "heads": 4, "context": 16, "dropout": 0.1}
llama = {"kv_heads": 2, "positions": "rotary", "norm": "rms", "mlp": "swiglu", "tied": False}
for options in ({}, llama):
    model = Decoder(DecoderConfig(**shapes, **options))
    with rng.at(rng.Place(0, 0, torch.arange(2), torch.arange(12))):
        total, count = model(tokens, tokens)
    (total / count).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert generate(model, tokens[:, :3], 4).shape == (2, 7)

q, k, v = (torch.randn(1, heads, 8, 16, requires_grad=True) for heads in (4, 2, 2))
out, lse = kernels.attention(q, k, v, causal=True, window=3, softcap=5.0)
out.sum().backward()
assert q.grad is not None and lse.shape == (1, 4, 8)
"""

INSIST = """
import torch
from paracomm import kernels
from paracomm.errors import Error

try:
    with kernels.backend("triton"):
        kernels.activate(torch.ones(3), "silu")
except Error as error:
    print(error)
"""

ABSENT = "import sys; sys.modules['triton'] = None\n"
BROKEN = "import sys, tempfile, pathlib; folder = pathlib.Path(tempfile.mkdtemp()); sys.path.insert(0, str(folder))\n"
BROKEN += "(folder / 'triton.py').write_text('raise OSError(\"no driver\")')\n"


def run(source: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, text=True, capture_output=True, timeout=120,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("triton", [ABSENT, BROKEN], ids=["absent", "broken"])
def test_models_and_operations_run_on_the_twins(triton):
    run(triton + MODEL + "assert not any(name.startswith('triton.') for name in sys.modules)")


def test_triton_is_not_even_imported_on_a_cpu():
    run(MODEL + "import sys; assert 'triton' not in sys.modules")


@pytest.mark.parametrize(
    "triton, why",
    [(ABSENT, "Triton is not installed"), (BROKEN, "Triton cannot be imported: OSError: no driver")],
    ids=["absent", "broken"],
)
def test_who_insists_is_told(triton, why):
    assert "tensors are on cpu, expected a GPU" in run(triton + INSIST)
    assert why in run(triton + INSIST, TRITON_INTERPRET="1")


# --- the switch ---
def test_the_innermost_backend_counts():
    assert kernels.current() == "auto"
    with kernels.backend("eager"):
        with kernels.backend("triton"):
            assert kernels.current() == "triton"
        assert kernels.current() == "eager" and not kernels.runs(torch.ones(1))
    with pytest.raises(InvalidArgument, match="'cuda', expected one of auto, triton, eager"), kernels.backend("cuda"):
        pass
    with pytest.raises(InvalidArgument):
        kernels.set_backend("fast")


def test_a_dtype_without_kernels():
    with kernels.backend("triton"), pytest.raises(Error, match="float64 has no kernel"):
        kernels.runs(torch.ones(1, dtype=torch.float64))
    assert not kernels.runs(torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize(
    "capability, obstacle", [((7, 5), "7.5, expected at least 8.0"), ((8, 0), None), ((9, 0), None)]
)
def test_a_gpus_age_decides(monkeypatch, capability, obstacle):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    found = select._too_old.__wrapped__(0)
    assert found is None if obstacle is None else found.endswith(obstacle)
