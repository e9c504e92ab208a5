"""The mended interpreter: what it mends is right, and what it looks for is found when planted."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.kernels import interpreter


def finite(count: int) -> Tensor:
    """float32 of any finite bits, ties and subnormals among them."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64).to(torch.int32)
    bits[::5] = (bits[::5] & ~0xFFFF) | 0x8000  # exactly between two bfloat16
    bits[::7] &= ~0x7F800000  # subnormal
    x = bits.view(torch.float32)
    return torch.where(x.isfinite(), x, torch.ones(()))


@triton.jit
def convert_kernel(X, Y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < count, other=0.0)
    tl.store(Y + at, x.to(Y.dtype.element_ty), mask=at < count)


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    convert_kernel[(triton.cdiv(len(x), 1 << 16),)](x, y, len(x), BLOCK=1 << 16)
    return y


def test_bfloat16_is_rounded_as_torch_does() -> None:
    x = finite(1_000_000)
    assert torch.equal(converted(x, torch.bfloat16).view(torch.int16), x.to(torch.bfloat16).view(torch.int16))


def test_every_bfloat16_is_widened_exactly() -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(converted(x, torch.float32).view(torch.int32), x.float().view(torch.int32))


def test_infinity_and_nan() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38])
    y = converted(x, torch.bfloat16)
    assert y[:2].tolist() == [torch.inf, -torch.inf] and y[2].isnan() and y[3] == torch.inf


@triton.jit
def arithmetic_kernel(X, Y, OUT, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(X + at), tl.load(Y + at)
    tl.store(OUT + at, x + y)
    tl.store(OUT + N + at, x * y)
    tl.store(OUT + 2 * N + at, x - y)
    tl.store(OUT + 3 * N + at, tl.maximum(x, y))
    tl.store(OUT + 4 * N + at, tl.where(x < y, x, y))
    tl.store(OUT + 5 * N + at, tl.abs(x))
    tl.store(OUT + 6 * N, tl.max(x, 0))


def test_bfloat16_arithmetic() -> None:
    x, y = torch.randn(2, 64).bfloat16()
    out = torch.empty(6 * 64 + 1, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](x, y, out, N=64)
    expected = torch.cat([x + y, x * y, x - y, torch.maximum(x, y), torch.minimum(x, y), x.abs(), x.max()[None]])
    assert torch.equal(out, expected)


@triton.jit
def added(a, b):
    return a + b


@triton.jit
def reduced_kernel(X, OUT, PLACE, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(X + at)
    tl.store(OUT + at, tl.cumsum(x, 0))
    tl.store(OUT + N, tl.reduce(x, 0, added))
    value, place = tl.max(x, 0, return_indices=True)
    tl.store(OUT + N + 1, value)
    tl.store(PLACE, place)
    tl.store(PLACE + 1, tl.argmin(x, 0))


def test_bfloat16_reductions_and_scans() -> None:
    """On bit patterns the largest would be the most negative one."""
    x = torch.randint(-20, 20, (64,)).bfloat16()
    out, place = torch.empty(66, dtype=torch.bfloat16), torch.empty(2, dtype=torch.int32)
    reduced_kernel[(1,)](x, out, place, N=64)
    assert torch.equal(out, torch.cat([x.cumsum(0), x.sum()[None], x.max()[None]]))
    assert place.tolist() == [int(x.float().argmax()), int(x.float().argmin())]


@triton.jit
def cast_kernel(X, WHOLE, BITS, BACK, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(X + at)
    tl.store(WHOLE + at, x.to(tl.int32))
    tl.store(BITS + at, x.to(tl.int16, bitcast=True))
    tl.store(BACK + at, tl.load(WHOLE + at).to(tl.bfloat16))
    tl.store(BACK + N + at, x.to(tl.float16).to(tl.bfloat16))


def test_bfloat16_to_integers_bits_and_halves() -> None:
    x = (torch.randn(64) * 50).bfloat16()
    whole, bits = torch.empty(64, dtype=torch.int32), torch.empty(64, dtype=torch.int16)
    back = torch.empty(128, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, whole, bits, back, N=64)
    assert torch.equal(whole, x.int()) and torch.equal(bits, x.view(torch.int16))
    assert torch.equal(back, torch.cat([x.int().bfloat16(), x.half().bfloat16()]))


@triton.jit
def dot_kernel(X, Y, OUT, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N), tl.arange(0, K)
    x = tl.load(X + m * K + k[None, :])
    y = tl.load(Y + k[:, None] * N + n[None, :])
    tl.store(OUT + m * N + n[None, :], tl.dot(x, y, input_precision=PRECISION))


def product(x: Tensor, y: Tensor, precision: str = "ieee") -> Tensor:
    (M, K), N = x.shape, y.shape[1]
    out = torch.empty(M, N)
    dot_kernel[(1,)](x, y, out, M=M, N=N, K=K, PRECISION=precision)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dots_of_16_bits_add_in_float32(dtype: torch.dtype) -> None:
    x, y = torch.randn(16, 64).to(dtype), torch.randn(64, 32).to(dtype)
    torch.testing.assert_close(product(x, y), x.float() @ y.float(), rtol=1e-6, atol=1e-5)


def test_precisions_of_float32_dots() -> None:
    """Each keeps the bits that it says: errors of one product, relative to it."""
    x, y = torch.zeros(16, 16), torch.zeros(16, 16)
    x[0, 0], y[0, 0] = 1 + 2**-8 + 2**-14 + 2**-23, 1 + 2**-9 + 2**-15 + 2**-22
    exact = float(x[0, 0].double() * y[0, 0].double())
    off = {
        precision: abs(float(product(x, y, precision)[0, 0]) / exact - 1)
        for precision in ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
    }
    assert off["ieee"] <= 2**-24 and off["bf16x6"] <= 2**-22 and off["tf32x3"] <= 2**-20
    assert 2**-20 < off["tf32"] < 2**-10 and 2**-24 < off["bf16x3"] < 2**-14


def test_dots_that_hardware_has_not_are_refused() -> None:
    with pytest.raises(Exception, match=r"K >= 16"):
        product(torch.randn(16, 8), torch.randn(8, 16))


@triton.jit
def copy_kernel(X, Y, count, shift, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        x = tl.load(X + at + shift, mask=at < count, other=0.0)
        tl.store(Y + at, x, mask=at < count)
    else:
        tl.store(Y + at, tl.load(X + at + shift))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_out_of_bounds_is_found(dtype: torch.dtype) -> None:
    x, y = torch.ones(30, dtype=dtype), torch.zeros(30, dtype=dtype)
    copy_kernel[(2,)](x, y, 30, 0, BLOCK=16, MASKED=True)
    assert torch.equal(x, y)
    with pytest.raises(Exception, match="load out of bounds: 2 of 16"):
        copy_kernel[(2,)](x, y, 30, 0, BLOCK=16, MASKED=False)
    with pytest.raises(Exception, match="load out of bounds: 1 of 16"):
        copy_kernel[(2,)](x, y, 30, -1, BLOCK=16, MASKED=True)
    with pytest.raises(Exception, match="store out of bounds"):
        copy_kernel[(2,)](torch.ones(32, dtype=dtype), y, 32, 0, BLOCK=16, MASKED=False)


def test_a_view_has_the_bounds_of_its_own_elements() -> None:
    memory = torch.ones(64)
    with pytest.raises(Exception, match="out of bounds"):
        copy_kernel[(1,)](memory[:10], torch.zeros(16), 16, 0, BLOCK=16, MASKED=False)


@triton.jit
def masked_kernel(X, Y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(Y + at, tl.load(X + at, mask=at < N // 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_masked_off_is_anything(dtype: torch.dtype) -> None:
    y = torch.zeros(16, dtype=dtype)
    masked_kernel[(1,)](torch.ones(16, dtype=dtype), y, N=16)
    assert y[:8].eq(1).all() and y[8:].isnan().all()


@triton.jit
def racing_kernel(X, Y, KIND: tl.constexpr):
    program = tl.program_id(0)
    if KIND == "two write":
        tl.store(Y, program.to(tl.float32))
    elif KIND == "one writes, one reads":
        if program == 0:
            tl.store(Y + 1, 1.0)
        else:
            tl.store(Y + 2, tl.load(Y + 1))
    elif KIND == "atomic beside a store":
        if program == 0:
            tl.store(Y, 1.0)
        else:
            tl.atomic_add(Y, 1.0)
    elif KIND == "atomics":
        tl.atomic_add(Y, 1.0)
    else:
        tl.store(Y + program, tl.load(X) + tl.load(Y + program))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("two write", "1 addresses are written by two programs"),
        ("one writes, one reads", "reads 1 addresses that another program writes"),
        ("atomic beside a store", "updates 1 addresses that another program writes"),
    ],
)
def test_races_are_found(kind: str, message: str) -> None:
    with pytest.raises(interpreter.RaceError, match=message):
        racing_kernel[(2,)](torch.ones(1), torch.zeros(4), KIND=kind)


@pytest.mark.parametrize("kind", ["atomics", "apart"])
def test_what_is_no_race(kind: str) -> None:
    y = torch.zeros(4)
    racing_kernel[(2,)](torch.ones(1), y, KIND=kind)
    assert float(y.sum()) == 2


@triton.jit
def described_kernel(X, Y, M: tl.constexpr, N: tl.constexpr):
    Y.store([4, 0], X.load([-2, 8]))


def test_descriptors_clip() -> None:
    """What lies beyond a descriptor's ends is read as 0 and not written."""
    x, y = torch.randn(10, 12), torch.zeros(10, 12)
    described_kernel[(1,)](TensorDescriptor.from_tensor(x, [8, 8]), TensorDescriptor.from_tensor(y, [8, 8]), M=8, N=8)
    expected = torch.zeros(10, 12)
    expected[6:10, :4] = x[:4, 8:]
    assert torch.equal(y, expected)


@triton.jit
def own_descriptor_kernel(X, rows, begin, STORE: tl.constexpr):
    """X has 8 rows of 8; each program reads or writes the four from `begin`, of `rows` that it says there are."""
    tiles = tl.make_tensor_descriptor(X, [rows, 8], [8, 1], [4, 8])
    if STORE:
        tiles.store([begin, 0], tl.zeros((4, 8), tl.float32))
    else:
        tiles.load([begin, 0])


@pytest.mark.parametrize(("store", "word"), [(False, "load"), (True, "store")])
def test_descriptors_of_a_wrong_shape_are_found(store: bool, word: str) -> None:
    own_descriptor_kernel[(1,)](torch.ones(8, 8), 8, 6, STORE=store)
    with pytest.raises(Exception, match=f"{word} out of bounds: 16 of 32"):
        own_descriptor_kernel[(1,)](torch.ones(8, 8), 10, 6, STORE=store)


def test_races_of_descriptors_are_found() -> None:
    own_descriptor_kernel[(2,)](torch.ones(8, 8), 8, 0, STORE=False)
    with pytest.raises(interpreter.RaceError, match="32 addresses are written by two programs"):
        own_descriptor_kernel[(2,)](torch.ones(8, 8), 8, 0, STORE=True)


def test_descriptors_that_hardware_has_not_are_refused() -> None:
    with pytest.raises(Exception, match="16-byte aligned"):
        own_descriptor_kernel[(1,)](torch.ones(66)[1:65].view(8, 8), 8, 0, STORE=False)


def test_atomics_on_bfloat16_are_refused() -> None:
    with pytest.raises(Exception, match="atomics on bfloat16"):
        racing_kernel[(1,)](torch.ones(1), torch.zeros(4, dtype=torch.bfloat16), KIND="atomics")


def test_another_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "9.9.9")
    with pytest.raises(RuntimeError, match=r"knows the interpreter of Triton 3\.7\.1; this is 9\.9\.9"):
        interpreter.install()


def test_the_suite_is_watched() -> None:
    before = interpreter.watch.launches
    converted(torch.ones(4), torch.bfloat16)
    assert interpreter.watch.launches == before + 1
