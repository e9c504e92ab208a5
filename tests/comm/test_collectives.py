"""Collectives as Python calls them: kinds of arrays, strides, blocks of any size, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from paracomm import InvalidArgument, ScheduleError
from paracomm.schedule import Schedule, algorithm, build, verify
from paracomm.schedule.registry import forget
from tests.comm.cases import DTYPES, TRANSPORTS, run_over


class OnlyDlpack:
    """An array of a library that we know nothing of."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._tensor.__dlpack_device__()


def kinds_of_arrays(comm: Any) -> None:
    n, r = comm.world_size, comm.rank
    total = n * (n + 1) / 2
    for name in DTYPES:
        dtype = getattr(torch, name)
        x = torch.full((3, 5), r + 1, dtype=torch.float32).to(dtype)
        want = 1 if name == "bool" else total
        assert comm.all_reduce(x) is x
        assert x.dtype == dtype and (x.double() == want).all()
        out = comm.all_gather(torch.full((2,), r, dtype=torch.float32).to(dtype))
        assert out.dtype == dtype and out.shape == (n, 2)
        assert torch.equal(out[:, 0], torch.arange(n).to(dtype))
    requires_grad = torch.ones(4, requires_grad=True)
    comm.all_reduce(requires_grad)
    assert requires_grad.sum() == 4 * n
    x = np.full((2, 3), r + 1.0)
    assert comm.all_reduce(x) is x and (x == total).all()
    assert comm.all_reduce(np.array(r + 1.0)) == total  # no dimensions
    view = memoryview(bytearray([r] * 4))
    comm.broadcast(view, n - 1)
    assert view.tolist() == [n - 1] * 4


def dlpack(comm: Any) -> None:
    n, r = comm.world_size, comm.rank
    for dtype in (torch.float32, torch.bfloat16, torch.int16):
        tensor = torch.full((n, 2), r + 1, dtype=dtype)
        x = OnlyDlpack(tensor)
        assert comm.all_reduce(x) is x
        assert (tensor == n * (n + 1) // 2).all()
        tensor[:] = r
        gathered = torch.as_tensor(comm.all_gather(x))
        assert gathered.dtype == dtype and gathered.shape == (n, n, 2)
        assert (gathered[n - 1] == n - 1).all()
        assert torch.as_tensor(comm.reduce_scatter(x)).tolist() == [[n * (n - 1) // 2] * 2]
        assert torch.as_tensor(comm.all_to_all(x))[:, 0].tolist() == list(range(n))
        comm.broadcast(x, n - 1)
        assert (tensor == n - 1).all()


def strides(comm: Any) -> None:
    n, r = comm.world_size, comm.rank
    total = n * (n + 1) // 2
    for make in (lambda: np.full((6, 4), r + 1, np.int32), lambda: torch.full((6, 4), r + 1, dtype=torch.int32)):
        whole = make()
        comm.all_reduce(whole[:, ::2])
        assert (whole[:, ::2] == total).all() and (whole[:, 1::2] == r + 1).all()
        whole = make()
        work = comm.all_reduce(whole.T, async_op=True)
        work.wait()
        assert (whole == total).all()
        whole, source = make(), make()
        assert comm.all_reduce(source.T, out=whole.T) is not None
        assert (whole == total).all() and (source == r + 1).all()
        gathered = comm.all_gather(make()[::3])
        assert gathered.shape == (n, 2, 4) and (gathered[n - 1] == n).all()
        whole = make()
        comm.broadcast(whole[1::2], n - 1)
        assert (whole[1::2] == n).all() and (whole[::2] == r + 1).all()
        whole = make()
        comm.reduce(whole[::2], n - 1)
        assert (whole[::2] == (total if r == n - 1 else r + 1)).all() and (whole[1::2] == r + 1).all()
        out = make()
        comm.scatter(make()[: 2 * n : 2] if r == 0 else None, 0, out=out[:1, :4])
        assert (out[:1] == 1).all()
    if n == 3:
        ordered = np.asfortranarray(np.arange(12.0).reshape(3, 4) + 100 * r)
        assert (comm.all_to_all(ordered)[:, 0] == np.arange(3) * 100 + 4 * r).all()
        assert (comm.all_gather(ordered) == np.arange(12.0).reshape(3, 4) + 100 * np.arange(3)[:, None, None]).all()


def blocks_of_any_size(comm: Any) -> None:
    n, r = comm.world_size, comm.rank
    gathered = comm.all_gather_v(np.full((r, 2), r, np.int16))  # the rows are exchanged
    assert gathered.tolist() == [[k, k] for k in range(n) for _ in range(k)]
    assert comm.all_gather_v(np.zeros((0, 3))).shape == (0, 3)
    rows = [2 * k + 1 for k in range(n)]
    x = torch.arange(sum(rows) * 3, dtype=torch.float64).reshape(-1, 3)
    mine = slice(sum(rows[:r]), sum(rows[: r + 1]))
    assert torch.equal(comm.reduce_scatter_v(x, rows), n * x[mine])
    assert torch.equal(comm.reduce_scatter_v(x, rows, "avg"), x[mine])
    send = [(r + d) % 3 for d in range(n)]
    x = np.repeat(np.arange(n) + 10 * r, send)
    got = comm.all_to_all_v(x, send)  # what comes is exchanged
    assert got.tolist() == [r + 10 * s for s in range(n) for _ in range((s + r) % 3)]
    out = np.empty_like(got)
    work = comm.all_to_all_v(x, send, [(s + r) % 3 for s in range(n)], out=out, async_op=True)
    assert work.wait() is out and out.tolist() == got.tolist()
    assert comm.exchange(bytes([r]) * (r * 1000)) == [bytes([k]) * (k * 1000) for k in range(n)]


def averages(comm: Any) -> None:
    n, r = comm.world_size, comm.rank
    assert (comm.all_reduce(np.full(7, r, np.float32), "avg") == (n - 1) / 2).all()
    negative = comm.all_reduce(np.full(7, -r - 1, np.int32), "avg")
    assert (negative == -((n * (n + 1) // 2) // n)).all()  # toward zero
    half = comm.all_reduce(torch.full((9,), 1000.0 * (r + 1), dtype=torch.float16), "avg")
    assert (half == 1000.0 * (n + 1) / 2).all()
    flags = np.array([True, False, r == 0, r > 0])
    assert comm.all_reduce(flags.copy(), "max").tolist() == [True, False, True, n > 1]
    assert comm.all_reduce(flags.copy(), "prod").tolist() == [True, False, n == 1, False]
    assert comm.all_reduce(flags.copy(), "bxor").tolist() == [n % 2 == 1, False, True, (n - 1) % 2 == 1]


def refusals(comm: Any) -> None:
    n = comm.world_size
    x = np.ones(2 * n, np.float32)
    locked = np.ones(3)
    locked.flags.writeable = False
    for text, call in {
        "read-only": lambda: comm.all_reduce(locked),
        "output array is read-only": lambda: comm.all_reduce(np.ones(3), out=locked),
        "unknown reduction 'mean': expected one of sum, prod": lambda: comm.all_reduce(x, "mean"),
        "band has no meaning for float32": lambda: comm.all_reduce(x, "band"),
        "avg has no meaning for bool": lambda: comm.all_reduce(np.ones(3, bool), "avg"),
        "input is float32, output is float64": lambda: comm.all_reduce(x, out=np.ones(2 * n)),
        f"output has 1 elements, expected {2 * n}": lambda: comm.all_reduce(x, out=np.ones(1, np.float32)),
        f"root must be in 0..{n - 1}, got {n}": lambda: comm.broadcast(x, n),
        "root must be in": lambda: comm.reduce(x, -1),
        "equal blocks": lambda: comm.reduce_scatter(np.ones(2 * n + 1)),
        "not a multiple of world_size": lambda: comm.reduce_scatter(np.ones((1, n))),
        "all_to_all: ": lambda: comm.all_to_all(np.ones(2 * n + 1)),
        "do not fit (": lambda: comm.all_gather_v(x, rows=[1] * n),
        "rows [1": lambda: comm.reduce_scatter_v(x, [1] * n),
        "send_rows [1": lambda: comm.all_to_all_v(x, [1] * n, [1] * n),
        "has no algorithm 'circle': expected one of": lambda: comm.all_reduce(x, algorithm="circle"),
        "an object with __dlpack__ or __cuda_array_interface__, got list": lambda: comm.all_reduce([1.0]),
        "complex64": lambda: comm.all_reduce(torch.ones(3, dtype=torch.complex64), "max"),
        "not one that collectives take": lambda: comm.broadcast(np.zeros(3, "S3")),
        "format '>": lambda: comm.all_reduce(np.ones(3, ">f4")),
        "layout": lambda: comm.all_reduce(torch.eye(3).to_sparse()),
        "device meta": lambda: comm.all_reduce(torch.ones(3, device="meta")),
        "is for": lambda: comm.all_reduce(x, algorithm=Schedule("all_reduce", n + 1)),
        "all_reduce was given a schedule of barrier": lambda: comm.all_reduce(x, algorithm=Schedule("barrier", n)),
        "color must be": lambda: comm.split(-1),
        "like must be": lambda: comm.empty(3, like="jax"),
        "at least one dimension": lambda: comm.all_gather_v(np.ones(())),
    }.items():
        with pytest.raises(InvalidArgument) as caught:
            call()
        assert text in str(caught.value), f"{text!r} is not in {caught.value}"
        assert isinstance(caught.value, ValueError)
    # Nothing was sent, so that all ranks are still in step.
    assert (comm.all_reduce(np.ones(3)) == n).all()


CHECKS = (kinds_of_arrays, dlpack, strides, blocks_of_any_size, averages, refusals)


@pytest.mark.parametrize("transport", ["local", "shm", "tcp"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_calls(transport: str, check: Any) -> None:
    run_over(transport, 3, check)


@pytest.mark.parametrize("check", CHECKS[:-1], ids=lambda check: check.__name__)
def test_calls_of_a_lonely_rank(check: Any) -> None:
    run_over("shm", 1, check)


def half_a_sum(s: Schedule) -> None:
    """Everything to rank 0, and nothing back."""
    for rank in range(1, s.world_size):
        s.reduce(s.at(rank), s.at(0))


def runs_what_is_wrong(comm: Any) -> list[str]:
    n = comm.world_size
    own = Schedule("all_reduce", n)
    half_a_sum(own)
    ring = build("all_reduce", "ring", n)
    outside = ring.ops.copy()
    outside[0, 3] = 99
    found = []
    wrong = ["half_a_sum", own, ring.replaced(ring.ops[:-1]), ring.replaced(ring.ops[::-1]), ring.replaced(outside)]
    for refused in wrong:
        for _ in range(2):  # what was refused is not taken the second time
            x = np.ones(1000, np.float32)
            with pytest.raises(ScheduleError) as caught:
                comm.all_reduce(x, algorithm=refused)
            assert (x == 1).all()
            found.append(str(caught.value))
    before = comm.bytes_sent((comm.rank + 1) % n)
    with pytest.raises(ScheduleError):
        comm.use_table({"all_reduce": [[2**62, "half_a_sum", {}]]})
    with pytest.raises(InvalidArgument, match="a name or a Schedule"):
        comm.all_reduce(np.ones(3), algorithm=3)
    assert before == comm.bytes_sent((comm.rank + 1) % n) == 0
    comm.use_table(None)
    assert comm.all_reduce(np.ones(3), algorithm=ring.replaced(ring.ops))[0] == n
    assert comm.all_reduce(np.ones(3))[0] == n
    return found


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_schedule_without_a_proof_does_not_run(transport: str) -> None:
    algorithm("all_reduce", "half_a_sum")(half_a_sum)
    try:
        first, *others = run_over(transport, 3, runs_what_is_wrong)
        assert all(other == first for other in others)
        assert "[half_a_sum] world_size=3: 1.data[0] lacks the contribution of rank [0, 2]" in first[0]
    finally:
        forget("all_reduce", "half_a_sum")


def test_whose_schedules_are_proved_again() -> None:
    """Those of the package are proved by its tests; what was asked for with other parameters is not among them."""
    assert (
        build("broadcast", "chain", 4, 0).shipped and build("all_reduce", "hierarchical", 4, hosts=(0, 0, 1, 1)).shipped
    )
    assert not build("broadcast", "chain", 4, 0, pieces=3).shipped
    assert not build("all_reduce", "ring", 4).replaced(build("all_reduce", "ring", 4).ops).shipped
    algorithm("all_reduce", "ours")(gather_on_the_last)
    try:
        assert not build("all_reduce", "ours", 4).shipped
    finally:
        forget("all_reduce", "ours")
    with pytest.raises(ValueError, match="read-only"):
        build("all_reduce", "ring", 4).ops[0] = 0


def gather_on_the_last(s: Schedule) -> None:
    """Everything to the last rank, one after the other, and back."""
    last = s.world_size - 1
    for rank in range(last):
        s.reduce(s.at(rank), s.at(last))
    for rank in range(last):
        s.copy(s.at(last), s.at(rank))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_own_algorithm(transport: str) -> None:
    algorithm("all_reduce", "gather_on_the_last")(gather_on_the_last)
    try:
        schedule = Schedule("all_reduce", 3)
        gather_on_the_last(schedule)
        verify(schedule)

        def check(comm: Any) -> None:
            for count in (1, 1000, 100_000):
                x = np.arange(count, dtype=np.float32)
                assert np.array_equal(comm.all_reduce(x.copy(), algorithm="gather_on_the_last"), 3 * x)
                assert np.array_equal(comm.all_reduce(x.copy(), algorithm=schedule), 3 * x)

        run_over(transport, 3, check, window_bytes=4096)
    finally:
        forget("all_reduce", "gather_on_the_last")
