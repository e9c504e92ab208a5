"""The kernels on a GPU: accuracy beside the eager twin, and times beside torch's own and the chip's limits.

    bench/gpu_check.sh          the GPU tests first, then this
    python bench/gpu_check.py   this alone; --can-run only asks whether there is anything to run on

A line: time of ours and of torch's (median of rounds that alternate), their ratio (torch's over ours), and the share of
the limit that ours reaches: FLOP/s of dense 16-bit products, or bytes/s of memory, of the chip's data sheet. Errors are
the largest against float64, relative to what torch's own of the same dtype has: the law of twice allows 2. What was not
done in time is listed as such. JSON lines go to --out.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from paracomm import kernels
from paracomm.kernels.select import _too_old, triton_missing

NOTHING_TO_RUN_ON = 3
FLOPS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12}
"""Dense 16-bit products a second (NVIDIA's data sheets), by a part of the name; the first that fits."""
BYTES = {"A100-SXM4-40GB": 1555e9, "A100": 2039e9, "H100 PCIe": 2000e9, "H100": 3350e9, "H200": 4800e9}
SECONDS = 150.0
DEVICE = "cuda"
SMALL = 512
"""The longest dimension of what is compared with float64."""
Function = Callable[..., Any]


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return f"no GPU that torch {torch.__version__} can use (torch.cuda.is_available() is False)"
    return triton_missing() or _too_old(0)


def limit(table: dict[str, float]) -> float | None:
    name = torch.cuda.get_device_name(0)
    return next((figure for part, figure in table.items() if part in name), None)


@dataclass(frozen=True)
class Case:
    """One operation: `ours` and `theirs` take the inputs; `flop` and `nbytes` of a call without and with backward."""

    name: str
    ours: Function
    theirs: Function
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    work: float
    unit: str = "flop"
    backward_share: float = 2.0
    """Work of backward over that of forward; 0: it has none."""


def attention(B: int, H: int, G: int, T: int, K: int, causal: bool, dtype: torch.dtype) -> Case:
    return Case(
        f"attention {T} D{K} H{H}/{G}{' causal' * causal}",
        lambda q, k, v: kernels.attention(q, k, v, causal=causal)[0],
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=H != G),
        ((B, H, T, K), (B, G, T, K), (B, G, T, K)), dtype, 4 * B * H * T * T * K / (2 if causal else 1),
        backward_share=2.5,
    )  # fmt: skip


def decode(B: int, H: int, G: int, S: int, K: int, dtype: torch.dtype) -> Case:
    return Case(
        f"decode {S} D{K} H{H}/{G}",
        lambda q, k, v: kernels.decode(q, k, v, need_lse=False)[0],
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=H != G),
        ((B, H, 1, K), (B, G, S, K), (B, G, S, K)), dtype, 2 * B * G * S * K * dtype.itemsize, "byte", 0.0,
    )  # fmt: skip


def products(N: int, D: int, hidden: int, dtype: torch.dtype) -> list[Case]:
    flop = 2.0 * N * D * hidden
    return [
        Case(f"linear + gelu {N}x{D}x{hidden}", lambda x, w: kernels.linear(x, w, activation="gelu_tanh"),
             lambda x, w: F.gelu(F.linear(x, w), approximate="tanh"), ((N, D), (hidden, D)), dtype, flop),
        Case(f"linear + residual {N}x{hidden}x{D}", lambda x, w, r: kernels.linear(x, w, residual=r),
             lambda x, w, r: F.linear(x, w) + r, ((N, hidden), (D, hidden), (N, D)), dtype, flop),
        Case(f"swiglu {N}x{D}x{hidden}", lambda x, g, u: kernels.glu(x, g, u),
             lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x, u), ((N, D), (hidden, D), (hidden, D)), dtype,
             2 * flop),
    ]  # fmt: skip


def rows(N: int, D: int, dtype: torch.dtype) -> list[Case]:
    nbytes = N * D * dtype.itemsize

    def theirs(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x + r, (D,), w, 1e-5)

    return [
        Case(f"residual + rms {N}x{D}", lambda x, r, w: kernels.add_norm(x, r, w)[0], theirs, ((N, D), (N, D), (D,)),
             dtype, 4 * nbytes, "byte", 0.75),
        Case(f"gated {N}x{D}", lambda g, u: kernels.gated(g, u), lambda g, u: F.silu(g) * u, ((N, D), (N, D)), dtype,
             3 * nbytes, "byte", 5 / 3),
    ]  # fmt: skip


def cross_entropy(N: int, D: int, V: int, dtype: torch.dtype) -> Case:
    targets = torch.randint(V, (N,), device=DEVICE)
    return Case(
        f"linear + cross-entropy {N}x{D}x{V}",
        lambda x, w: kernels.linear_cross_entropy(x, w, None, targets)[0] / N,
        lambda x, w: F.cross_entropy(F.linear(x, w).float(), targets), ((N, D), (V, D)), dtype, 2.0 * N * D * V,
    )  # fmt: skip


def cases() -> list[Case]:
    half = torch.bfloat16
    return [
        *(attention(4, 16, 16, 4096, K, causal, half) for K in (64, 128) for causal in (True, False)),
        attention(4, 16, 4, 4096, 128, True, half),
        attention(1, 8, 8, 2048, 256, True, half),
        attention(2, 8, 8, 2048, 64, True, torch.float16),
        attention(2, 8, 8, 2048, 64, True, torch.float32),
        decode(8, 32, 8, 8192, 128, half),
        *products(8192, 4096, 11008, half),
        *rows(8192, 4096, half),
        cross_entropy(4096, 2048, 32000, half),
    ]  # fmt: skip


# --- measuring ---
def inputs_of(case: Case, dtype: torch.dtype, small: bool) -> list[Tensor]:
    """Of a matrix's rows such that products are of order 1; `small`: of at most SMALL."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    found = []
    for shape in case.shapes:
        cut = tuple(min(n, SMALL) for n in shape) if small else shape
        x = torch.randn(cut, generator=generator, device=DEVICE, dtype=torch.float64 if small else torch.float32)
        found.append((x / (cut[-1] ** 0.25)).to(case.dtype).to(dtype))
    return found


def differentiated(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    generator = torch.Generator(DEVICE).manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, device=DEVICE, dtype=torch.float32).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def error_ratio(case: Case) -> float | None:
    """The worst of output and gradients: our largest error over twice torch's own, both against float64. None where a
    case's function is tied to its full size."""
    if case.name.startswith("linear + cross-entropy") or case.name.startswith("residual"):
        return None  # tests/kernels/test_gpu.py has them
    run: Function = differentiated if case.backward_share else lambda f, x: [f(*x)]
    results = []
    for function, dtype in ((case.theirs, torch.float64), (case.theirs, case.dtype), (case.ours, case.dtype)):
        results.append([x.double() for x in run(function, inputs_of(case, dtype, small=True))])
    worst = 0.0
    for exact, theirs, ours in zip(*results, strict=True):
        ulp = float(exact.abs().max()) * torch.finfo(case.dtype).eps
        worst = max(worst, float((ours - exact).abs().max()) / (2 * float((theirs - exact).abs().max()) + 2 * ulp))
    return worst


def timed(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds: the median of rounds in turns; before each call the cache is flushed, which the launch hides in."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    found: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            if turn >= 2:
                found[name].append(start.elapsed_time(end))
    return {name: statistics.median(times) for name, times in found.items()}


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    inputs = inputs_of(case, case.dtype, small=False)
    top = limit(FLOPS if case.unit == "flop" else BYTES)
    if case.dtype == torch.float32 and case.unit == "flop":
        top = None
    ratio = error_ratio(case)
    lines = []
    for part in ("forward", "backward") if case.backward_share else ("forward",):
        functions: dict[str, Callable[[], Any]] = {}
        for name, function in (("ours", case.ours), ("torch", case.theirs)):
            if part == "forward":
                functions[name] = lambda function=function: _without_gradients(function, inputs)
            else:
                leaves = [x.detach().requires_grad_() for x in inputs]
                out = function(*leaves)
                grad = torch.randn_like(out)
                functions[name] = lambda out=out, leaves=leaves, grad=grad: torch.autograd.grad(
                    out, leaves, grad, retain_graph=True
                )
        ms = timed(functions, rounds)
        work = case.work * (1.0 if part == "forward" else case.backward_share)
        lines.append(
            {
                "name": case.name, "part": part, "dtype": str(case.dtype), "ours_ms": ms["ours"],
                "torch_ms": ms["torch"], "ratio": ms["torch"] / ms["ours"], "unit": case.unit,
                "rate": work / ms["ours"] * 1e3, "share": None if top is None else work / ms["ours"] * 1e3 / top,
                "error": ratio, "good": ratio is None or ratio <= 1.0,
            }
        )  # fmt: skip
    return lines


@torch.no_grad()
def _without_gradients(function: Function, inputs: list[Tensor]) -> Any:
    return function(*inputs)


def show(line: dict[str, Any]) -> None:
    error = "" if line["error"] is None else f"error {2 * line['error']:.2f} x torch's"
    share = "" if line["share"] is None else f"{line['share']:.0%} of the chip"
    typer.echo(
        f"{line['name']:40} {line['part']:8} {line['dtype'][6:]:8} ours {line['ours_ms']:8.3f} ms  "
        f"torch {line['torch_ms']:8.3f} ms  {line['ratio']:5.2f}x  {share:15} {error} {'' if line['good'] else 'WRONG'}"
    )


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of a timing.")] = 10,
    out: Annotated[Path, typer.Option(help="Where JSON lines go.")] = Path("gpu-check.jsonl"),
    can_run: Annotated[bool, typer.Option("--can-run", help="Only say whether there is anything to run on.")] = False,
) -> None:
    """Exits with 3 where kernels cannot run, and with 1 where one is wrong or fails."""
    obstacle = why_not()
    if obstacle is not None:
        typer.echo(f"gpu_check: {obstacle}. Nothing was run.", err=True)
        raise typer.Exit(NOTHING_TO_RUN_ON)
    if can_run:
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    typer.echo(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, {torch.cuda.device_count()} GPU(s)")
    begin, bad, late = time.monotonic(), 0, []
    with out.open("w") as file:
        for case in cases():
            if time.monotonic() - begin > SECONDS:
                late.append(case.name)
                continue
            try:
                with kernels.backend("triton"):
                    lines = measure(case, rounds)
            except Exception as error:  # the other kernels are still worth knowing
                typer.echo(f"{case.name:40} FAILED: {type(error).__name__}: {error}")
                lines, bad = [{"name": case.name, "failed": str(error), "good": False}], bad + 1
            for line in lines:
                file.write(json.dumps(line | {"device": torch.cuda.get_device_name(0)}) + "\n")
                if "failed" not in line:
                    show(line)
                    bad += not line["good"]
    if late:
        typer.echo(f"not measured, for want of time: {', '.join(late)}")
    raise typer.Exit(1 if bad else 0)


if __name__ == "__main__":
    typer.run(main)
