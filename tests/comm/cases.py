"""Collective calls with random data, their float64 reference, and ranks that make them over any transport."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

import paracomm
from paracomm.schedule import build
from paracomm.schedule.registry import cases as schedule_cases
from tests.ranks import Rank, run_ranks

TRANSPORTS = ("local", "shm", "tcp", "mixed")
FLOATS = ("float64", "float32", "float16", "bfloat16")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8")
DTYPES = (*FLOATS, *INTEGERS, "bool")
OPS = ("sum", "prod", "min", "max", "avg", "band", "bor", "bxor")
REDUCING = ("all_reduce", "reduce", "reduce_scatter")
BLOCKED = ("all_gather", "reduce_scatter", "all_to_all", "gather", "scatter")
# Half a unit in the last place of 1: the most that one rounding is off, relative to the value.
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Case:
    """One call. `count` is of the whole buffer, or of one rank's block where the collective has blocks; "uneven" blocks
    have around that many rows."""

    collective: str
    name: str
    root: int | None
    params: tuple[tuple[str, Any], ...]
    count: int
    dtype: str
    op: str = "sum"
    mode: str = "out"  #: "out", "in_place" or "uneven"
    arena: bool = False

    def __str__(self) -> str:
        root = "" if self.root is None else f" root {self.root}"
        memory = "arena" if self.arena else "private"
        params = f" {dict(self.params)}" if self.params else ""
        op = f" {self.op}" if self.collective in REDUCING else ""
        return f"{self.collective}[{self.name}{params}]{root} {self.dtype} x {self.count}{op} {self.mode} {memory}"


def ops_of(dtype: str) -> tuple[str, ...]:
    """Reductions that have a meaning for a dtype."""
    if dtype in FLOATS:
        return ("sum", "prod", "min", "max", "avg")
    return tuple(op for op in OPS if dtype != "bool" or op != "avg")


def modes_of(collective: str) -> tuple[str, ...]:
    if collective == "broadcast":
        return ("in_place",)
    return (
        ("out", "in_place", "uneven")
        if collective in ("all_gather", "reduce_scatter", "all_to_all")
        else ("out", "in_place")
    )


def counts_of(world_size: int, large: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys((0, 1, max(world_size - 1, 0), world_size, world_size + 1, 61, large)))


def cover(world_size: int, large: int, per_count: int) -> Iterator[Case]:
    """Every algorithm x count, `per_count` times, each time with the next dtype, reduction, mode and memory."""
    turn = 0
    for collective, name, root, params in schedule_cases(world_size):
        base = Case(collective, name, root, tuple(sorted(params.items())), 0, "uint8")
        if collective == "barrier":
            yield base
            continue
        for count in counts_of(world_size, large // world_size if collective in BLOCKED else large):
            for _ in range(per_count):
                dtype = DTYPES[turn % len(DTYPES)]
                op = ops_of(dtype)[turn // len(DTYPES) % len(ops_of(dtype))] if collective in REDUCING else "sum"
                modes = modes_of(collective)
                mode, arena = modes[turn // 2 % len(modes)], turn % 3 == 1
                yield replace(base, count=count, dtype=dtype, op=op, mode=mode, arena=arena)
                turn += 1


def cross(world_size: int, counts: tuple[int, ...]) -> Iterator[Case]:
    """Every algorithm x count x dtype x reduction x mode x memory."""
    for collective, name, root, params in schedule_cases(world_size):
        base = Case(collective, name, root, tuple(sorted(params.items())), 0, "uint8")
        if collective == "barrier":
            yield base
            continue
        for count in counts:
            for dtype in DTYPES:
                for op in ops_of(dtype) if collective in REDUCING else ("sum",):
                    for mode in modes_of(collective):
                        for arena in (False, True):
                            yield replace(base, count=count, dtype=dtype, op=op, mode=mode, arena=arena)


# --- data: drawn and reduced once for all algorithms, modes and memories, not to be written ---
def values(case: Case, rank: int, count: int) -> np.ndarray:
    """What rank holds, as float64, or as the integer dtype itself; every value is one of the case's dtype."""
    return _drawn(f"{case.collective} {case.count} {case.dtype} {case.op}", case.dtype, case.op, rank, count)


@cache
def _drawn(seed: str, dtype: str, op: str, rank: int, count: int) -> np.ndarray:
    rng = np.random.default_rng([zlib.crc32(seed.encode()), rank])
    if dtype == "bool":
        drawn = rng.random(count) < 0.5
    elif dtype in INTEGERS:
        limits = np.iinfo(dtype)
        drawn = rng.integers(limits.min, limits.max, count, dtype, endpoint=True)
    else:
        low = 0.5 if op == "prod" else 0.0
        drawn = rounded((low + rng.random(count)) * rng.choice((-1.0, 1.0), count), dtype)
    drawn.flags.writeable = False
    return drawn


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values that the dtype can hold."""
    return torch.from_numpy(x).to(getattr(torch, dtype)).double().numpy()


def as_float64(x: Any) -> np.ndarray:
    """An array of ours as float64 or as its integer dtype."""
    return torch.as_tensor(x).double().numpy() if x.dtype in (torch.bfloat16, torch.float16) else numbers(x)


def numbers(x: Any) -> np.ndarray:
    array = x.numpy() if isinstance(x, torch.Tensor) else x
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def bits(x: Any) -> bytes:
    if isinstance(x, torch.Tensor):
        x = (
            x.contiguous()
            .view(torch.uint8 if x.element_size() == 1 else getattr(torch, f"int{8 * x.element_size()}"))
            .numpy()
        )
    return np.ascontiguousarray(x).tobytes()


def new_array(comm: Any, case: Case, count: int, filled: np.ndarray | None = None) -> Any:
    """bfloat16 is torch's; all else is NumPy's. Without values it holds rubbish, so that what nobody wrote shows."""
    if case.dtype == "bfloat16":
        array = comm.empty(count, torch.bfloat16) if case.arena else torch.empty(count, dtype=torch.bfloat16)
        array.copy_(torch.tensor(filled)) if filled is not None else array.fill_(-77)
        return array
    array = comm.empty(count, np.dtype(case.dtype)) if case.arena else np.empty(count, case.dtype)
    array[...] = filled if filled is not None else 77
    return array


# --- reference ---
def reduced(case: Case, world_size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of `count` elements, and how far off it may be: one rounding a rank, relative to the size of what is added up."""
    return _reduced(replace(case, name="", root=None, params=(), mode="", arena=False), world_size, count)


@cache
def _reduced(case: Case, world_size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    stack = np.stack([values(case, rank, count) for rank in range(world_size)])
    if case.dtype in FLOATS and case.op in ("sum", "avg", "prod"):
        total, size = (x.prod(0) if case.op == "prod" else x.sum(0) for x in (stack, np.abs(stack)))
        parts = world_size if case.op == "avg" else 1
        return total / parts, (world_size + 1) * ROUNDING[case.dtype] * size / parts
    if case.dtype == "bool":
        loop = {"sum": np.logical_or, "max": np.logical_or, "bor": np.logical_or, "bxor": np.logical_xor}
        result = loop.get(case.op, np.logical_and).reduce(stack)
    elif case.op == "avg":  # the sum wraps around, the division truncates toward zero
        total = stack.sum(0, dtype=case.dtype).astype(object)
        result = np.array([abs(int(t)) // world_size * (1 if t >= 0 else -1) for t in total], case.dtype)
    else:
        loops = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum,
                 "band": np.bitwise_and, "bor": np.bitwise_or, "bxor": np.bitwise_xor}  # fmt: skip
        result = loops[case.op].reduce(stack, dtype=stack.dtype)
    return result, np.zeros(count)


def run_case(comm: Any, case: Case) -> bytes:
    """Runs the case, holds the result to the reference and returns its bits (b"" where this rank has no result)."""
    schedule = build(case.collective, case.name, comm.world_size, case.root, **dict(case.params))
    if case.collective == "barrier":
        comm.barrier(algorithm=schedule)
        return b""
    result, expected, slack = _CALLS[case.collective](comm, case, schedule)
    if result is None:
        return b""
    got = as_float64(result).reshape(-1)
    assert got.shape == expected.shape, f"rank {comm.rank}: {case}: shape {got.shape}, expected {expected.shape}"
    wrong = ~(np.abs(got - expected) <= slack) if case.dtype in FLOATS else got != expected
    if wrong.any():
        first = int(np.argmax(wrong))
        raise AssertionError(
            f"rank {comm.rank} of {comm.world_size}: {case}: {int(wrong.sum())} of {len(got)} elements are wrong, "
            f"the first at {first}: {got[first]!r}, expected {expected[first]!r}"
        )
    return bits(result)


def _all_reduce(comm: Any, case: Case, schedule: Any) -> tuple[Any, np.ndarray, Any]:
    mine = values(case, comm.rank, case.count)
    x = new_array(comm, case, case.count, mine)
    out = None if case.mode == "in_place" else new_array(comm, case, case.count)
    result = comm.all_reduce(x, case.op, out=out, algorithm=schedule)
    assert result is (x if out is None else out)
    if out is not None:
        assert np.array_equal(as_float64(x), mine), f"{case}: the input was overwritten"
    return (result, *reduced(case, comm.world_size, case.count))


def _reduce(comm: Any, case: Case, schedule: Any) -> tuple[Any, np.ndarray, Any]:
    mine = values(case, comm.rank, case.count)
    x = new_array(comm, case, case.count, mine)
    out = None if case.mode == "in_place" else new_array(comm, case, case.count)
    result = comm.reduce(x, case.root, case.op, out=out, algorithm=schedule)
    if comm.rank != case.root or out is not None:
        assert np.array_equal(as_float64(x), mine), f"{case}: the input was overwritten"
    return (result if comm.rank == case.root else None, *reduced(case, comm.world_size, case.count))


def _broadcast(comm: Any, case: Case, schedule: Any) -> tuple[Any, np.ndarray, Any]:
    wanted = values(case, case.root, case.count)
    x = new_array(comm, case, case.count, wanted if comm.rank == case.root else None)
    return comm.broadcast(x, case.root, algorithm=schedule), wanted, 0.0


def _rows(case: Case, world_size: int) -> list[int]:
    if case.mode != "uneven":
        return [case.count] * world_size
    return [(case.count * (r % 3) + r) if r % 4 != 3 else 0 for r in range(world_size)]


def _all_gather(comm: Any, case: Case, schedule: Any) -> tuple[Any, np.ndarray, Any]:
    rows = _rows(case, comm.world_size)
    parts = [values(case, r, rows[r]) for r in range(comm.world_size)]
    x = new_array(comm, case, rows[comm.rank], parts[comm.rank])
    if case.mode == "uneven":
        result = comm.all_gather_v(x, rows=rows, algorithm=schedule)
    elif case.mode == "in_place":
        out = new_array(comm, case, sum(rows))
        mine = out[comm.rank * case.count : (comm.rank + 1) * case.count]
        mine[...] = x
        result = comm.all_gather(mine, out=out, algorithm=schedule)
    else:
        result = comm.all_gather(x, algorithm=schedule)
        assert tuple(result.shape) == (comm.world_size, case.count)
    return result, np.concatenate(parts), 0.0


def _reduce_scatter(comm: Any, case: Case, schedule: Any) -> tuple[Any, np.ndarray, Any]:
    rows = _rows(case, comm.world_size)
    own = values(case, comm.rank, sum(rows))
    x = new_array(comm, case, sum(rows), own)
    begin = sum(rows[: comm.rank])
    mine = slice(begin, begin + rows[comm.rank])
    if case.mode == "uneven":
        result = comm.reduce_scatter_v(x, rows, case.op, algorithm=schedule)
    elif case.mode == "in_place":
        result = comm.reduce_scatter(x, case.op, out=x[mine], algorithm=schedule)
    else:
        result = comm.reduce_scatter(x, case.op, algorithm=schedule)
    if case.mode != "in_place":
        assert np.array_equal(as_float64(x), own), f"{case}: the input was overwritten"
    expected, slack = reduced(case, comm.world_size, sum(rows))
    return result, expected[mine], slack[mine]


def _all_to_all(comm: Any, case: Case, schedule: Any) -> tuple[Any, np.ndarray, Any]:
    n, me = comm.world_size, comm.rank
    # rows[s][d]: what s sends to d
    rows = [[case.count + (3 * s + d) % 4 if case.mode == "uneven" else case.count for d in range(n)] for s in range(n)]
    inputs = [values(case, s, sum(rows[s])) for s in range(n)]
    x = new_array(comm, case, sum(rows[me]), inputs[me])
    if case.mode == "uneven":
        result = comm.all_to_all_v(x, rows[me], [rows[s][me] for s in range(n)], algorithm=schedule)
    else:
        result = comm.all_to_all(x, out=x if case.mode == "in_place" else None, algorithm=schedule)
    begins = [sum(rows[s][:me]) for s in range(n)]
    return result, np.concatenate([inputs[s][begins[s] : begins[s] + rows[s][me]] for s in range(n)]), 0.0


def _gather(comm: Any, case: Case, schedule: Any) -> tuple[Any, np.ndarray, Any]:
    parts = [values(case, r, case.count) for r in range(comm.world_size)]
    x, out = new_array(comm, case, case.count, parts[comm.rank]), None
    if case.mode == "in_place" and comm.rank == case.root:
        out = new_array(comm, case, case.count * comm.world_size)
        mine = out[comm.rank * case.count : (comm.rank + 1) * case.count]
        mine[...] = x
        x = mine
    result = comm.gather(x, case.root, out=out, algorithm=schedule)
    assert (result is None) == (comm.rank != case.root)
    return result, np.concatenate(parts), 0.0


def _scatter(comm: Any, case: Case, schedule: Any) -> tuple[Any, np.ndarray, Any]:
    everything = values(case, case.root, case.count * comm.world_size)
    x, out = None, new_array(comm, case, case.count)
    mine = slice(comm.rank * case.count, (comm.rank + 1) * case.count)
    if comm.rank == case.root:
        x = new_array(comm, case, len(everything), everything)
        if case.mode == "in_place":
            out = x[mine]
    return comm.scatter(x, case.root, out=out, algorithm=schedule), everything[mine], 0.0


_CALLS: dict[str, Callable[..., tuple[Any, np.ndarray, Any]]] = {
    "all_reduce": _all_reduce, "reduce": _reduce, "broadcast": _broadcast, "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter, "all_to_all": _all_to_all, "gather": _gather, "scatter": _scatter,
}  # fmt: skip


# --- ranks over a transport ---
def connect(rank: Rank, transport: str, **options: Any) -> paracomm.Communicator:
    """A communicator over "local" (ranks are threads), "shm", "tcp" or "mixed": two pretended hosts."""
    if transport == "mixed":
        options["host_id"] = "a" if rank.rank < (rank.world_size + 1) // 2 else "b"
    elif transport == "tcp":
        options["transport"] = "tcp"
    options.setdefault("timeout_s", 30.0)
    return rank.connect(**options)


def run_over(transport: str, world_size: int, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """function(communicator, *args) on every rank; threads get a process of their own, so that none outlives a test."""
    if transport == "local":
        return run_ranks(1, _threads, world_size, function, args, options, timeout_s=300)[0]
    return run_ranks(world_size, _rank, transport, function, args, options, timeout_s=300)


def _threads(_: Rank, world_size: int, function: Callable[..., Any], args: tuple, options: dict) -> list[Any]:
    return run_ranks(world_size, _rank, "local", function, args, options, threads=True, timeout_s=300)


def _rank(rank: Rank, transport: str, function: Callable[..., Any], args: tuple, options: dict) -> Any:
    with connect(rank, transport, **options) as comm:
        return function(comm, *args)


def digests_of(comm: Any, cases: list[Case]) -> list[bytes]:
    """A digest of every case's result bits on this rank."""
    return [hashlib.blake2b(run_case(comm, case), digest_size=16).digest() for case in cases]


@cache
def digests(transport: str, world_size: int, cases: tuple[Case, ...], window_bytes: int) -> list[list[bytes]]:
    """[rank][case] digests of the results over a transport, computed once."""
    return run_over(transport, world_size, digests_of, list(cases), window_bytes=window_bytes)
