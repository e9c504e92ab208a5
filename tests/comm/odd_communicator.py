"""Odd calls of `Communicator`, `connect` and `Work`: each method x each argument x a list of odd values."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import paracomm
from paracomm import _C
from paracomm.schedule import Schedule, build
from tests.comm.odd_arrays import EITHER, REFUSED, RIGHT, SCALARS, Kind, Made, kinds, numbers, values
from tests.comm.odd_calls import Case, Prepared

Values = Sequence[np.ndarray]
REDUCES = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_v")


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In their dtype, as ours."""
    return (a | b) if a.dtype == bool else (a + b).astype(a.dtype)


@dataclass(frozen=True)
class Form:
    """A collective: what each of its arrays is to it, and what they hold in the end."""

    method: str
    roles: dict[str, str]
    """in, out or inout"""
    want: Callable[[int, int, Values], dict[str, np.ndarray] | None]
    """(rank, root, every rank's x, flat): the arrays' values in the end, "" for the result; None: cannot be."""
    out_of_x: Callable[[int], int] = lambda n: n
    x_of_out: Callable[[int], int] = lambda n: n
    rows: tuple[str, ...] = ()
    """Names of its arguments of rows."""
    root_only: frozenset[str] = frozenset()
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.method + ("" if "out" not in self.roles else " out")


def _blocks(x: np.ndarray) -> np.ndarray | None:
    return x.reshape(2, -1) if x.size % 2 == 0 else None


def _want_reduce_scatter(rank: int, v: Values) -> np.ndarray | None:
    found = _blocks(add(*v))
    return None if found is None else found[rank]


def _want_all_to_all(rank: int, v: Values) -> np.ndarray | None:
    parts = [_blocks(one) for one in v]
    return None if parts[0] is None or parts[1] is None else np.concatenate([parts[0][rank], parts[1][rank]])


def _result(found: np.ndarray | None, name: str) -> dict[str, np.ndarray] | None:
    return None if found is None else {name: found}


def _forms() -> list[Form]:
    double, half = (lambda n: 2 * n), (lambda n: n // 2)
    found = [
        Form("all_reduce", {"x": "inout"}, lambda r, root, v: {"x": add(*v)}),
        Form("reduce", {"x": "inout"}, lambda r, root, v: {"x": add(*v) if r == root else v[r]}),
        Form("broadcast", {"x": "inout"}, lambda r, root, v: {"x": v[root]}),
    ]
    for out in ("", "out"):
        roles = {"x": "in"} | ({"out": "out"} if out else {})
        if out:
            found.append(Form("all_reduce", roles, lambda r, root, v: {"out": add(*v)}))
            found.append(
                Form(
                    "reduce",
                    roles,
                    lambda r, root, v: {"out": add(*v)} if r == root else {},
                    root_only=frozenset(("out",)),
                )
            )
        found += [
            Form("all_gather", roles, lambda r, root, v, o=out: {o: np.concatenate(v)}, double, half),
            Form("all_gather_v", roles, lambda r, root, v, o=out: {o: np.concatenate(v)}, double, half, ("rows",)),
            Form(
                "reduce_scatter", roles, lambda r, root, v, o=out: _result(_want_reduce_scatter(r, v), o), half, double
            ),
            Form(
                "reduce_scatter_v",
                roles,
                lambda r, root, v, o=out: _result(_want_reduce_scatter(r, v), o),
                half,
                double,
                ("rows",),
            ),
            Form("all_to_all", roles, lambda r, root, v, o=out: _result(_want_all_to_all(r, v), o)),
            Form(
                "all_to_all_v",
                roles,
                lambda r, root, v, o=out: _result(_want_all_to_all(r, v), o),
                rows=("send_rows", "recv_rows"),
            ),
            Form(
                "gather",
                roles,
                lambda r, root, v, o=out: {o: np.concatenate(v)} if r == root else {},
                double,
                half,
                root_only=frozenset(("out",)),
            ),
        ]

    def scattered(rank: int, root: int, v: Values) -> dict[str, np.ndarray] | None:
        parts = _blocks(v[root])
        return None if parts is None else {"out": parts[rank]}

    found.append(Form("scatter", {"x": "in", "out": "out"}, scattered, half, double, root_only=frozenset(("x",))))
    return found


FORMS = _forms()


def like(partner: Callable[[int], Any], count: int, rank: int | None) -> Any:
    """A good array with the rank's values (None: zeros)."""
    x = partner(count)
    if rank is not None and count:
        if isinstance(x, torch.Tensor):
            if not x.is_quantized:
                new = torch.from_numpy(np.array(values(rank, count, np.int64)))
                x.copy_(new % 2 if x.dtype == torch.bool else new)
        else:
            x[...] = values(rank, count, x.dtype)
    return x


def shape_of(x: Any) -> tuple[int, ...]:
    """Of whatever it is: one dimension of unknown size where it tells none."""
    try:
        return tuple(int(n) for n in x.shape)
    except Exception:
        return (4,)


def same(found: np.ndarray, want: np.ndarray) -> bool:
    return found.size == want.size and bool(np.array_equal(found, want, equal_nan=found.dtype.kind in "fc"))


def _call(form: Form, seat: Any, arrays: dict[str, Any], options: dict[str, Any], waits: bool) -> Any:
    options = dict(options)
    first = arrays["x"]
    if form.rows and not any(name in options for name in form.rows):
        n = (shape_of(first) or (0,))[0]
        for name in form.rows[: 1 if form.method != "all_gather_v" else 0]:
            options[name] = [n // 2, n - n // 2]
    positional = [options.pop("rows")] if form.method == "reduce_scatter_v" else []
    kept = {name: x for name, x in arrays.items() if name != "x"}
    result = getattr(seat.comm, form.method)(first, *positional, **kept, **options)
    if waits or isinstance(result, paracomm.Work):
        result = result.wait()
    return result


def array_case(form: Form, role_of: str, kind: Kind, way: str, alone: bool = False) -> Case:
    """The argument `role_of` is of this kind, on both ranks or on rank 0 alone; all others are good."""
    role = form.roles[role_of]
    expect = kind.read if role == "in" else kind.written
    if role == "inout" and expect == RIGHT:
        expect = kind.read
    if form.method in REDUCES and expect == RIGHT:
        expect = kind.reduced
    x_count = kind.count if role_of == "x" else form.x_of_out(kind.count)
    # One rank reads what the other one writes, or does not look at it.
    asymmetric = role_of in form.root_only or (form.method in ("reduce", "broadcast") and kind.read != kind.written)
    # The rows of one element are one rank's.
    asymmetric |= form.method == "reduce_scatter_v" and "out" in form.roles and x_count == 1

    def prepare(seat: Any) -> Prepared:
        rank = seat.rank
        made: dict[str, Made] = {}
        for name in form.roles:
            if name == role_of and not (alone and rank):
                made[name] = kind.make(rank)
            else:
                count = form.out_of_x(x_count) if name == "out" else x_count
                good = like(kind.partner, count, None if name == "out" else rank)
                made[name] = Made(good, lambda good=good: numbers(good))
        readable = made["x"].numbers is not None
        everybodys = []
        if readable:
            for r in range(2):
                x = kind.make(r) if role_of == "x" and not (alone and r) else None
                other = like(kind.partner, x_count, r)
                everybodys.append(x.numbers() if x is not None and x.numbers else numbers(other))
        before = {name: m.numbers() for name, m in made.items() if m.numbers}
        arrays = {name: m.array for name, m in made.items()}
        options = {"async_op": True} if way == "async" else {"timeout_s": 3.5} if way == "timed" else {}

        def untouched() -> str:
            for name, m in made.items():
                if not m.intact():
                    return f"memory outside {name} was written"
                if m.numbers and form.roles[name] == "in" and not same(m.numbers(), before[name]):
                    return f"{name} was changed from {before[name]} to {m.numbers()}"
            return ""

        def check(result: Any) -> str:
            if wrong := untouched():
                return wrong
            if not readable or made[role_of].numbers is None:
                return "accepted" if expect == REFUSED and not asymmetric else ""
            want = form.want(rank, 0, everybodys)
            shape = shape_of(made["x"].array)
            if form.rows and form.method != "all_gather_v" and (not shape or shape[0] % 2):
                return ""  # blocks of different sizes
            if want is None:
                return f"accepted, though {x_count} elements have no two equal blocks"
            for name, right in want.items():
                reader = made[name].numbers if name else lambda: numbers(result)
                assert reader is not None
                found = reader()
                if not same(found, right):
                    return f"{name or 'the result'} is {found.tolist()}, right is {right.tolist()}"
            return ""

        def after_error() -> str:
            return untouched()

        return Prepared(lambda: _call(form, seat, arrays, options, False), check, after_error)

    if expect == RIGHT and form.method != "all_reduce" and not _fits(form, kind, role_of, x_count):
        expect = EITHER
    suffix = ", on rank 0" if alone else ""
    name = f"{form.name}({role_of}={kind.name}) {way}{suffix}"
    return Case(name, prepare, EITHER if asymmetric and expect == REFUSED else expect, alone or asymmetric)


def _fits(form: Form, kind: Kind, role_of: str, x_count: int) -> bool:
    """Whether a right result exists: equal blocks along dimension 0."""
    if form.method in ("broadcast", "reduce"):
        return True
    made = kind.make(0).array
    shape = shape_of(made)
    if form.method in ("all_gather", "gather", "all_gather_v") and role_of == "x":
        return form.method != "all_gather_v" or len(shape) > 0
    if role_of == "out":
        halves = form.method not in ("all_to_all", "all_to_all_v") or x_count % 2 == 0
        return form.out_of_x(x_count) == kind.count and halves
    return len(shape) > 0 and shape[0] % 2 == 0


def collectives() -> Iterator[Case]:
    """Every array argument x every kind of array; synchronous, with a timeout and asynchronous in turn."""
    ways = ("plain", "async", "timed")
    turn = 0
    for form in FORMS:
        for role_of in form.roles:
            for kind in kinds(False):
                if kind.name.startswith("junk None") and role_of == "out":
                    continue  # the default
                chosen = ways if form.method == "all_reduce" and kind.read != REFUSED else (ways[turn % 3],)
                for way in chosen:
                    yield array_case(form, role_of, kind, way)
                turn += 1


def on_one_rank() -> Iterator[Case]:
    """The same on rank 0 alone, of a few kinds."""
    some = (
        "junk None",
        "junk text",
        "torch freed",
        "torch meta",
        "numpy object",
        "torch DTensor",
        "numpy read-only",
        "torch int64 contiguous",
        "numpy float32 no elements",
    )
    for form in FORMS:
        for role_of in form.roles:
            for kind in kinds(False):
                if kind.name not in some or (kind.name.startswith("junk None") and role_of == "out"):
                    continue
                case = array_case(form, role_of, kind, "plain", alone=True)
                expect = case.expect if case.expect == REFUSED else EITHER
                if role_of in form.root_only:
                    continue
                yield Case(case.name, _no_oracle(case.prepare), expect, True)


def _no_oracle(prepare: Callable[[Any], Prepared]) -> Callable[[Any], Prepared]:
    """Ranks that call different things end in a named error; there is no right value."""

    def changed(seat: Any) -> Prepared:
        prepared = prepare(seat)
        return Prepared(prepared.call, lambda result: "", prepared.after_error)

    return changed


# --- sends and receives ---
def _messages(kind: Kind, what: str, way: str) -> Case:
    def prepare(seat: Any) -> Prepared:
        rank = seat.rank
        odd = kind.make(rank)
        theirs = kind.make(1 - rank)
        good = like(kind.partner, kind.count, None if what == "send" else rank)
        want = (theirs.numbers() if theirs.numbers else None) if what == "send" else values(1 - rank, kind.count)
        before = odd.numbers() if odd.numbers else None
        dtype = None if what == "send" else numbers(like(kind.partner, kind.count, 1 - rank))

        def call() -> None:
            # The odd call comes first: what it refuses has sent nothing.
            first = getattr(seat.comm, what)(odd.array, 1 - rank, async_op=True)
            second = getattr(seat.comm, "recv" if what == "send" else "send")(good, 1 - rank, async_op=True)
            second.wait()
            first.wait()

        def check(_: Any) -> str:
            if not odd.intact():
                return "memory outside x was written"
            if what == "send":
                if want is not None and not same(numbers(good), want):
                    return f"received {numbers(good).tolist()}, right is {want.tolist()}"
                if before is not None and odd.numbers and not same(odd.numbers(), before):
                    return "x was changed"
            elif odd.numbers is not None and dtype is not None and not same(odd.numbers(), dtype):
                return f"x is {odd.numbers().tolist()}, right is {dtype.tolist()}"
            return ""

        return Prepared(call, check, lambda: "" if odd.intact() else "memory outside x was written")

    return Case(f"{what}(x={kind.name}) {way}", prepare, kind.read if what == "send" else kind.written)


def messages() -> Iterator[Case]:
    for what in ("send", "recv"):
        for kind in kinds(False):
            yield _messages(kind, what, "async")


# --- arguments that are no arrays ---
NUMBERS: dict[str, Callable[[], Any]] = SCALARS | {
    "0.0": lambda: 0.0,
    "1.0": lambda: 1.0,
    "1.5": lambda: 1.5,
    "2": lambda: 2,
    "2**31": lambda: 1 << 31,
    "-2**63": lambda: -(1 << 63),
    "text 1": lambda: "1",
    "int64(1)": lambda: np.int64(1),
    "array(1)": lambda: np.array(1),
    "tensor(1)": lambda: torch.tensor(1),
    "bytes": lambda: b"1",
    "array of two": lambda: np.zeros(2),
    "meta": lambda: torch.tensor(1, device="meta"),
}
TIMES_REFUSED = {
    "text",
    "NaN",
    "-1",
    "True",
    "1j",
    "[]",
    "{}",
    "()",
    "object",
    "type",
    "function",
    "Ellipsis",
    "text 1",
    "bytes",
    "array of two",
    "meta",
    "-2**63",
}
INTEGERS_REFUSED = TIMES_REFUSED - {"True"} | {"3.5", "inf", "2**62", "2**31", "1.5", "2**200"}
_GOOD = object()


def plain_case(
    name: str,
    call: Callable[[Any, Any], Any],
    value: Callable[[], Any],
    expect: str,
    alone: bool,
    ends: bool = False,
) -> Case:
    def prepare(seat: Any) -> Prepared:
        given = value() if not (alone and seat.rank) else _GOOD
        return Prepared(lambda: call(seat, given), lambda wrong: wrong or "")

    return Case(name + (", on rank 0" if alone else ""), prepare, expect, alone, ends=ends)


def _form_call(form: Form, argument: str, shape: tuple[int, ...] = (4,)) -> Callable[[Any, Any], str]:
    """The form with one argument set, on good arrays; compares with the result that int(argument) asks for."""

    def call(seat: Any, given: Any) -> str:
        count = int(np.prod(shape))
        x = values(seat.rank, count).reshape(shape)
        arrays: dict[str, Any] = {"x": x}
        if "out" in form.roles:
            arrays["out"] = np.zeros(form.out_of_x(count), np.float32)
        options = {} if given is _GOOD else {argument: given}
        result = _call(form, seat, arrays, options, False)
        root = 0
        if argument == "root" and given is not _GOOD and given is not None:
            root = int(given)
        want = form.want(seat.rank, root, [values(r, count) for r in range(2)])
        assert want is not None
        for name, right in want.items():
            found = numbers(result if not name else arrays[name])
            if not same(found, right):
                return f"{name or 'the result'} is {found.tolist()}, right is {right.tolist()}"
        return ""

    return call


def timeouts() -> Iterator[Case]:
    for form in [f for f in FORMS if "out" not in f.roles or f.method == "scatter"]:
        for name, value in NUMBERS.items():
            if name == "0.0":
                continue  # a time that is over at once
            expect = REFUSED if name in TIMES_REFUSED else RIGHT if name == "None" else EITHER
            for alone in (False, True) if name in ("NaN", "text") else (False,):
                yield plain_case(f"{form.name}(timeout_s={name})", _form_call(form, "timeout_s"), value, expect, alone)
    for name, value in NUMBERS.items():
        if name == "0.0":
            continue
        expect = REFUSED if name in TIMES_REFUSED else RIGHT if name == "None" else EITHER
        yield plain_case(
            f"barrier(timeout_s={name})", lambda seat, t: seat.comm.barrier(timeout_s=t), value, expect, False
        )
        yield plain_case(
            f"send(timeout_s={name})", lambda seat, t: _both_ways(seat, send={"timeout_s": t}), value, expect, False
        )
        yield plain_case(
            f"recv(timeout_s={name})", lambda seat, t: _both_ways(seat, recv={"timeout_s": t}), value, expect, False
        )
        yield plain_case(f"Work.wait(timeout_s={name})", _wait_call, value, expect, False)


def _wait_call(seat: Any, given: Any) -> str:
    work = seat.comm.all_reduce(np.ones(4), async_op=True)
    try:
        found = work.wait(given)
    finally:
        again = work.wait()
    return "" if (found == 2).all() and (again == 2).all() else f"wait() gave {found}"


def _both_ways(seat: Any, send: dict[str, Any] | None = None, recv: dict[str, Any] | None = None) -> str:
    """Each sends to the other; the odd call comes first."""
    out, x = np.zeros(4), np.full(4, 3.0 + seat.rank)
    calls = [
        lambda: seat.comm.send(x, **{"peer": seat.peer, "async_op": True} | (send or {})),
        lambda: seat.comm.recv(out, **{"peer": seat.peer, "async_op": True} | (recv or {})),
    ]
    works = [call() for call in (calls if send else calls[::-1])]
    for work in works:
        if work is not None and hasattr(work, "wait"):
            work.wait()
    return "" if (out == 3.0 + seat.peer).all() else f"received {out.tolist()}"


def _to_peer(seat: Any, name: str, given: Any) -> str:
    """send or recv with an odd peer: right means what peer int(given) would do."""
    if given is None:
        return _both_ways(seat, **{name: {"peer": None}})
    if float(given) != seat.rank and float(given) in (0, 1):
        return _both_ways(seat, **{name: {"peer": given}})
    x = np.full(4, 9.0)
    getattr(seat.comm, name)(x, given, timeout_s=0.5) if float(given) not in (0, 1) else None
    if float(given) == seat.rank:
        seat.comm.send(x, given, async_op=True)
        out = np.zeros(4)
        seat.comm.recv(out, given)
        return "" if (out == 9).all() else f"a message to itself came as {out.tolist()}"
    return "accepted"


def _try_peer(name: str) -> Callable[[Any, Any], str]:
    def call(seat: Any, given: Any) -> str:
        try:
            known = given is None or float(given) in (0, 1)
        except Exception:
            known = False
        if known:
            return _to_peer(seat, name, given)
        getattr(seat.comm, name)(np.full(4, 9.0), given, timeout_s=0.5)
        return "accepted"

    return call


def scalars() -> Iterator[Case]:
    """root, op, async_op, algorithm, peer, tag."""
    for form in FORMS:
        if form.method in ("reduce", "broadcast", "gather", "scatter"):
            for name, value in NUMBERS.items():
                expect = REFUSED if name in INTEGERS_REFUSED | {"2"} else EITHER
                if name == "None":
                    expect = REFUSED
                for alone in (False, True) if name in ("None", "1.5") else (False,):
                    case = plain_case(f"{form.name}(root={name})", _form_call(form, "root"), value, expect, alone)
                    yield case if not alone else Case(case.name, case.prepare, EITHER, True)
        if form.method in REDUCES:
            for name, value in (
                NUMBERS
                | {
                    "SUM": lambda: "SUM",
                    "b'sum'": lambda: b"sum",
                    "''": str,
                    "ReduceOp": lambda: torch.distributed.ReduceOp.SUM,
                }
            ).items():
                expect = EITHER if name in ("SUM", "b'sum'", "ReduceOp", "None") else REFUSED
                yield plain_case(f"{form.name}(op={name})", _form_call(form, "op"), value, expect, False)
            for name in ("sum", "prod", "min", "max", "avg", "band", "bor", "bxor"):
                yield plain_case(
                    f"{form.name}(op={name}) of floats", _op_of_floats(form, name), lambda: None, EITHER, False
                )
        for name, value in (NUMBERS | SCHEDULES).items():
            expect = RIGHT if name == "None" else EITHER if name == "good schedule" else REFUSED
            yield plain_case(f"{form.name}(algorithm={name})", _form_call(form, "algorithm"), value, expect, False)
        for name, value in NUMBERS.items():
            yield plain_case(f"{form.name}(async_op={name})", _form_call(form, "async_op"), value, EITHER, False)
    for name, value in (NUMBERS | SCHEDULES).items():
        expect = RIGHT if name == "None" else REFUSED
        yield plain_case(
            f"barrier(algorithm={name})", lambda seat, a: seat.comm.barrier(algorithm=a), value, expect, False
        )
    for what in ("send", "recv"):
        for name, value in NUMBERS.items():
            expect = REFUSED if name in INTEGERS_REFUSED | {"2"} else EITHER
            if name in ("True", "1.0", "0.0", "int64(1)", "array(1)", "tensor(1)", "None"):
                expect = EITHER
            case = plain_case(f"{what}(peer={name})", _try_peer(what), value, expect, False)
            yield Case(case.name, case.prepare, expect, expect == EITHER)  # a rank's neighbour is the other one itself
            expect = REFUSED if name in INTEGERS_REFUSED - {"2**62", "2**31", "-1", "-2**63"} else EITHER
            yield plain_case(f"{what}(tag={name})", _tagged(what), value, expect, False)


def _tagged(what: str) -> Callable[[Any, Any], str]:
    def call(seat: Any, given: Any) -> str:
        out, x = np.zeros(4), np.full(4, 3.0 + seat.rank)
        first = getattr(seat.comm, what)(x if what == "send" else out, seat.peer, tag=given, async_op=True)
        other = seat.comm.recv if what == "send" else seat.comm.send
        other(out if what == "send" else x, seat.peer, tag=given)
        first.wait()
        return "" if (out == 3.0 + seat.peer).all() else f"received {out.tolist()}"

    return call


def _op_of_floats(form: Form, op: str) -> Callable[[Any, Any], str]:
    def call(seat: Any, _: Any) -> str:
        whole = [np.array([1.5, -2.5, np.inf, -1.0], np.float32), np.array([2.5, -0.5, 1.0, 3.0], np.float32)]
        arrays: dict[str, Any] = {"x": whole[seat.rank].copy()}
        if "out" in form.roles:
            arrays["out"] = np.zeros(form.out_of_x(4), np.float32)
        result = _call(form, seat, arrays, {"op": op}, False)
        if op in ("band", "bor", "bxor"):
            return f"{op} of floats was accepted"
        both = {
            "sum": np.add,
            "prod": np.multiply,
            "min": np.minimum,
            "max": np.maximum,
            "avg": lambda a, b: (a + b) / np.float32(2),
        }[op](*whole)
        if form.method in ("reduce_scatter", "reduce_scatter_v"):
            both = both.reshape(2, 2)[seat.rank]
        if form.method == "reduce" and seat.rank:
            return ""
        found = numbers(arrays.get("out", result))
        return "" if same(found, both) else f"{op} is {found.tolist()}, right is {both.tolist()}"

    return call


SCHEDULES: dict[str, Callable[[], Any]] = {
    "no name": str,
    "nope": lambda: "nope",
    "ring of 3": lambda: build("all_reduce", "ring", 3),
    "class": lambda: Schedule,
    "name with NUL": lambda: "ring\0",
    "long": lambda: "x" * 100_000,
    "empty Schedule": lambda: Schedule.__new__(Schedule),
}


# --- rows ---
ROWS: dict[str, Callable[[], Any]] = SCALARS | {
    "one": lambda: [4],
    "three": lambda: [2, 2, 0],
    "negative": lambda: [-2, 6],
    "floats": lambda: [1.5, 2.5],
    "whole floats": lambda: [2.0, 2.0],
    "texts": lambda: ["2", "2"],
    "None inside": lambda: [None, 4],
    "huge": lambda: [1 << 62, 4 - (1 << 62)],
    "huge alone": lambda: [1 << 62, 1 << 62],
    "NaNs": lambda: [np.nan, np.nan],
    "lists": lambda: [[2], [2]],
    "array": lambda: np.array([2, 2]),
    "tensor": lambda: torch.tensor([2, 2]),
    "tuple": lambda: (2, 2),
    "generator": lambda: (n for n in (2, 2)),
    "True and 3": lambda: [True, 3],
    "too few": lambda: [1, 1],
    "too many": lambda: [3, 3],
    "mapping": lambda: {0: 2, 1: 2},
    "2**200": lambda: [2**200, 0],
    "overflow": lambda: [(1 << 63) - 1, 5],
}
ROWS_GOOD = {"array", "tensor", "tuple"}
ROWS_EITHER = {"whole floats", "generator", "None", "True and 3", "mapping"}


def rows() -> Iterator[Case]:
    for form in FORMS:
        for argument in form.rows:
            for name, value in ROWS.items():
                expect = RIGHT if name in ROWS_GOOD else EITHER if name in ROWS_EITHER else REFUSED
                call = _rows_call(form, argument)
                for alone in (False, True) if name in ("negative", "floats", "one", "huge") else (False,):
                    case = plain_case(f"{form.name}({argument}={name})", call, value, expect, alone)
                    unknown = argument == "recv_rows" and name in ("too few", "too many")
                    yield dataclasses.replace(case, mismatch=unknown)


def _rows_call(form: Form, argument: str) -> Callable[[Any, Any], str]:
    def call(seat: Any, given: Any) -> str:
        count = 2 if form.method == "all_gather_v" else 4
        x = values(seat.rank, count)
        arrays: dict[str, Any] = {"x": x}
        if "out" in form.roles:
            arrays["out"] = np.zeros(form.out_of_x(count), np.float32)
        options = {argument: [2, 2] if given is _GOOD else given}
        if form.method == "all_to_all_v" and argument == "recv_rows":
            options["send_rows"] = [2, 2]
        result = _call(form, seat, arrays, options, False)
        if name_is_uneven(given):
            return ""
        want = form.want(seat.rank, 0, [values(r, count) for r in range(2)])
        assert want is not None
        for name, right in want.items():
            found = numbers(result if not name else arrays[name])
            if not same(found, right):
                return f"{name or 'the result'} is {found.tolist()}, right is {right.tolist()}"
        return ""

    return call


def name_is_uneven(given: Any) -> bool:
    return isinstance(given, list) and given[:1] == [True] and given[1:] == [3]


# --- overlapping ---
def overlapping() -> Iterator[Case]:
    """Input and output share memory, whole or in part."""
    for form in FORMS:
        if "out" not in form.roles:
            continue
        for count in (4, 9000):
            for place in ("before", "behind", "same start", "inside", "interleaved", "same end"):
                for library in ("numpy", "torch"):
                    for way in ("plain", "async"):
                        yield _overlap_case(form, count, place, library, way)


def _overlap_case(form: Form, count: int, place: str, library: str, way: str) -> Case:
    def prepare(seat: Any) -> Prepared:
        out_count = form.out_of_x(count)
        largest = max(count, out_count)
        shift = max(1, count // 8)
        buffer: Any = np.full(2 * largest + 2 * shift, 0, np.float32)
        if library == "torch":
            buffer = torch.from_numpy(buffer)
        step = 2 if place == "interleaved" else 1
        starts = {
            "before": (0, shift),
            "behind": (shift, 0),
            "same start": (0, 0),
            "interleaved": (0, 1),
            "inside": (0, max(0, abs(count - out_count) // 2 + 1)),
            "same end": (largest - count, largest - out_count),
        }[place]
        x = buffer[starts[0] : starts[0] + step * count : step]
        out = buffer[starts[1] : starts[1] + step * out_count : step]
        index = np.arange(len(buffer))
        of_x = set(index[starts[0] : starts[0] + step * count : step].tolist())
        of_out = set(index[starts[1] : starts[1] + step * out_count : step].tolist())
        mine = [np.arange(count, dtype=np.float32) % 97 + 100 * r for r in range(2)]
        x[:] = mine[seat.rank] if library == "numpy" else torch.from_numpy(mine[seat.rank])
        before = numbers(buffer)

        def check(result: Any) -> str:
            now = numbers(buffer)
            want = form.want(seat.rank, 0, mine)
            writes = of_out if want else set()
            others = np.array(sorted(set(index.tolist()) - writes), int)
            if not same(now[others], before[others]):
                return "memory outside out was written"
            for right in (want or {}).values():
                if not same(numbers(out), right):
                    found = numbers(out)
                    at = int(np.flatnonzero(found != right)[0])
                    return f"out[{at}] is {found[at]}, right is {right[at]}"
            return ""

        options = {"async_op": True} if way == "async" else {}
        assert len(of_x) == count
        return Prepared(lambda: _call(form, seat, {"x": x, "out": out}, options, False), check)

    name = f"{form.name}(x and out overlap: {place}, {count} elements of {library}) {way}"
    return Case(name, prepare, EITHER, bool(form.root_only))


# --- the rest of the communicator ---
def others() -> Iterator[Case]:
    def plain(
        name: str,
        call: Callable[[Any, Any], Any],
        values_: dict[str, Callable[[], Any]],
        expect: Callable[[str], str],
        alone: Sequence[str] = (),
    ) -> Iterator[Case]:
        for value_name, value in values_.items():
            for one in (False, True) if value_name in alone else (False,):
                yield plain_case(f"{name}={value_name})", call, value, expect(value_name), one)

    def refused(names: set[str]) -> Callable[[str], str]:
        return lambda name: REFUSED if name in names else EITHER

    def nothing(_: Any) -> str:
        return ""

    yield from plain(
        "split(color", _split_color, NUMBERS, refused(INTEGERS_REFUSED - {"2**31", "2**62"}), ("1.5", "text", "2**200")
    )
    yield from plain(
        "split(key",
        _split_key,
        NUMBERS,
        refused(INTEGERS_REFUSED - {"-1", "2**31", "2**62", "-2**63"}),
        ("1.5", "text", "2**200"),
    )
    yield from plain(
        "exchange(blob",
        _exchange,
        NUMBERS
        | {
            "empty": bytes,
            "bytearray": lambda: bytearray(b"1"),
            "memoryview": lambda: memoryview(b"1"),
            "strided": lambda: memoryview(b"12")[::2],
        },
        refused({"None", "text", "5", "3.5", "object", "type"}),
        ("None", "text"),
    )
    shapes = NUMBERS | {
        "-5": lambda: -5,
        "negative": lambda: (2, -1),
        "floats": lambda: (2.5, 2),
        "product": lambda: (1 << 40, 1 << 40),
        "wraps to 0": lambda: (1 << 32, 1 << 32),
        "wraps to 4": lambda: ((1 << 62) + 1, 4),
        "texts": lambda: ("2", "3"),
        "nested": lambda: ((2,), 3),
        "negative squared": lambda: (-2, -2),
        "torch.Size": lambda: torch.Size((2, 3)),
    }
    del shapes["2**31"]  # 8 GiB are a good shape, which takes its time
    huge = {"product", "wraps to 0", "wraps to 4", "negative squared"}
    yield from plain(
        "empty(shape",
        _empty_shape,
        shapes,
        refused(
            (INTEGERS_REFUSED - {"()", "[]", "array of two"})
            | huge
            | {"-5", "negative", "floats", "texts", "nested", "None"}
        ),
    )
    dtypes = SCALARS | {
        "nope": lambda: "nope",
        "object dtype": lambda: np.dtype(object),
        "text dtype": lambda: "U4",
        "quint8": lambda: torch.quint8,
        "complex64": lambda: torch.complex64,
        "f4": lambda: "f4",
        "structured": lambda: np.dtype([("a", "f4")]),
        "float8": lambda: torch.float8_e5m2,
        "layout": lambda: torch.strided,
        "big-endian": lambda: ">f4",
        "M8": lambda: "M8[s]",
    }
    wrong = set(SCALARS) - {"None", "type", "{}", "[]", "()"} | {"nope", "object dtype", "layout"}
    yield from plain("empty(dtype", lambda seat, d: nothing(seat.comm.empty(4, d)), dtypes, refused(wrong))
    for like_ in ("torch", "numpy"):
        yield from plain(
            f"empty({like_}, dtype",
            lambda seat, d, k=like_: nothing(seat.comm.empty(4, d, like=k)),
            dtypes,
            refused(wrong),
        )
    yield from plain(
        "empty(like",
        lambda seat, k: nothing(seat.comm.empty(4, like=k)),
        SCALARS | {"cupy": lambda: "cupy"},
        refused(set(SCALARS) - {"None"}),
    )
    for name in ("transport", "bytes_sent"):
        yield from plain(
            f"{name}(peer",
            lambda seat, p, n=name: nothing(getattr(seat.comm, n)(p)),
            NUMBERS,
            refused(INTEGERS_REFUSED | {"2", "None"}),
        )
    tables = NUMBERS | {
        "entries of 5": lambda: {"all_reduce": 5},
        "empty entries": lambda: {"all_reduce": []},
        "entry of texts": lambda: {"all_reduce": [["x", "y", "z"]]},
        "unknown": lambda: {"nope": [[1, "ring", {}]]},
        "unknown name": lambda: {"all_reduce": [[None, "nope", {}]]},
        "NaN limit": lambda: {"all_reduce": [[np.nan, "ring", {}]]},
    }
    tables_wrong = set(NUMBERS) - {"None", "{}", "()", "[]"} | {"entries of 5", "entry of texts", "unknown name"}
    for on_device in (False, True):
        yield from plain(
            f"use_table(on_device={on_device}, table",
            lambda seat, t, d=on_device: _use_table(seat, t, d),
            tables,
            refused(tables_wrong),
        )
    yield from plain(
        "use_device(index", lambda seat, i: nothing(seat.comm.use_device(i)), NUMBERS, refused(INTEGERS_REFUSED)
    )
    for argument in ("nbytes", "iterations", "arena", "algorithm"):
        expect = refused(INTEGERS_REFUSED - {"2**31", "inf"} if argument in ("nbytes", "iterations") else set())
        skipped = {"2**31"}  # a good number that takes minutes
        yield from plain(
            f"native_time_all_reduce({argument}",
            _time(argument),
            {k: v for k, v in NUMBERS.items() if k not in skipped},
            expect,
        )
    for name, value in (
        NUMBERS
        | {
            "accents": lambda: "é" * 3000,
            "surrogate": lambda: "\ud800",
            "long": lambda: "x" * 10**6,
            "NUL": lambda: "a\0b",
            "empty": str,
        }
    ).items():
        yield plain_case(
            f"abort(why={name})", lambda seat, why: nothing(seat.comm.abort(why)), value, EITHER, False, ends=True
        )
    yield plain_case("abort(why=accents) and its text", _abort_text, lambda: "é" * 3000, RIGHT, False, ends=True)
    yield from _closed()
    yield plain_case(
        "close() twice",
        lambda seat, _: nothing((seat.comm.close(), seat.comm.close())),
        lambda: None,
        RIGHT,
        False,
        ends=True,
    )
    yield plain_case("copy, repr, check, seconds_waiting", _small, lambda: None, RIGHT, False)
    for name, value in (SCALARS | {"three": lambda: (1, 2, 3)}).items():
        yield plain_case(
            f"__exit__({name})", lambda seat, v: nothing(seat.comm.__exit__(v, v, v)), value, RIGHT, False, ends=True
        )


def _split_color(seat: Any, given: Any) -> str:
    return _split(seat, (0 if given is _GOOD else given,), given is None)


def _split_key(seat: Any, given: Any) -> str:
    return _split(seat, (0, 0 if given is _GOOD else given), False)


def _split(seat: Any, arguments: tuple[Any, ...], none: bool) -> str:
    part = seat.comm.split(*arguments)
    if none:
        return "" if part is None else "color None gave a communicator"
    with part:
        found = part.all_reduce(np.ones(2))
    return "" if (found == 2).all() and part.world_size == 2 else f"of {part.world_size} ranks"


def _exchange(seat: Any, given: Any) -> str:
    found = seat.comm.exchange(b"1" if given is _GOOD else given)
    right = bytes(given) if isinstance(given, bytes | bytearray | memoryview) else None
    return "" if right is None or found == [right, right] else f"gave {found}"


def _empty_shape(seat: Any, given: Any) -> str:
    x = seat.comm.empty(given)
    try:
        several = isinstance(given, list | tuple | np.ndarray) and np.ndim(given) > 0
        want = np.empty(tuple(given) if several else given, np.uint8).shape
    except (TypeError, ValueError, MemoryError):
        return f"accepted: the shape is {tuple(x.shape)}"
    x[...] = 1
    return "" if tuple(x.shape) == want else f"the shape is {tuple(x.shape)}"


def _use_table(seat: Any, table: Any, on_device: bool) -> str:
    try:
        seat.comm.use_table(table, on_device=on_device)
        return str(seat.good_call())
    finally:
        seat.comm.use_table(None, on_device=on_device)


def _time(argument: str) -> Callable[[Any, Any], str]:
    def call(seat: Any, given: Any) -> str:
        good: dict[str, Any] = {"nbytes": 64, "iterations": 2}
        found = seat.comm.native_time_all_reduce(**good | {argument: given})
        return "" if all(t >= 0 for t in found) else f"gave {found}"

    return call


def _abort_text(seat: Any, why: str) -> str:
    seat.comm.barrier()
    if seat.rank == 0:
        seat.comm.abort(why)
    try:
        seat.comm.all_reduce(np.ones(3))
    except paracomm.Error as error:
        return "" if "é" in str(error) else f"the reason is missing: {str(error)[:100]}"
    return "an aborted communicator works"


def _small(seat: Any, _: Any) -> str:
    comm = seat.comm
    assert copy.deepcopy(comm) is comm and copy.copy(comm) is not None and "rank" in repr(comm)
    comm.check()
    good = (
        comm.seconds_waiting() >= 0
        and comm.local_ranks == [0, 1]
        and comm.host_indices == [0, 0]
        and len(comm.hosts) == 2
    )
    return "" if good else "who is here is wrong"


def _closed() -> Iterator[Case]:
    """Each method of a communicator that was closed."""

    def case(name: str, call: Callable[[Any], Any], expect: str) -> Case:
        def prepare(seat: Any) -> Prepared:
            def run() -> None:
                seat.comm.barrier()
                seat.comm.close()
                call(seat.comm)

            return Prepared(run)

        return Case(f"{name} when closed", prepare, expect, ends=True)

    x = np.ones(4, np.float32)
    calls: dict[str, Callable[[Any], Any]] = {
        "all_reduce": lambda c: c.all_reduce(x),
        "all_reduce async": lambda c: c.all_reduce(x, async_op=True).wait(),
        "reduce": lambda c: c.reduce(x),
        "broadcast": lambda c: c.broadcast(x),
        "all_gather": lambda c: c.all_gather(x),
        "all_gather_v": lambda c: c.all_gather_v(x),
        "reduce_scatter": lambda c: c.reduce_scatter(x),
        "reduce_scatter_v": lambda c: c.reduce_scatter_v(x, [2, 2]),
        "all_to_all": lambda c: c.all_to_all(x),
        "all_to_all_v": lambda c: c.all_to_all_v(x, [2, 2]),
        "gather": lambda c: c.gather(x),
        "scatter": lambda c: c.scatter(x, out=np.ones(2, np.float32)),
        "barrier": lambda c: c.barrier(),
        "send": lambda c: c.send(x, 1 - c.rank),
        "recv": lambda c: c.recv(x.copy(), 1 - c.rank),
        "check": lambda c: c.check(),
        "split": lambda c: c.split(0),
        "exchange": lambda c: c.exchange(b"1"),
        "native_time_all_reduce": lambda c: c.native_time_all_reduce(64, 2),
        "use_cached_table": lambda c: c.use_cached_table(),
    }
    for name, call in calls.items():
        yield case(name, call, EITHER if name == "check" else REFUSED)
    still: dict[str, Callable[[Any], Any]] = {
        "hosts": lambda c: c.hosts,
        "transport": lambda c: c.transport(1),
        "bytes_sent": lambda c: c.bytes_sent(0),
        "seconds_waiting": lambda c: c.seconds_waiting(),
        "repr": repr,
        "abort": lambda c: c.abort(),
        "use_table": lambda c: c.use_table(None),
        "timeout_s": lambda c: c.timeout_s,
        "empty": lambda c: c.empty(3),
        "local_ranks": lambda c: c.local_ranks,
        "close": lambda c: c.close(),
        "use_device": lambda c: c.use_device(),
    }
    for name, call in still.items():
        yield case(name, call, EITHER)


# --- connect ---
def connections() -> Iterator[Case]:
    good: dict[str, Any] = {"timeout_s": 3.0, "connect_timeout_s": 3.0}

    def case(argument: str, name: str, value: Callable[[], Any], expect: str) -> Case:
        def call(seat: Any, given: Any) -> str:
            arguments: dict[str, Any] = {"rank": seat.rank, "world_size": 2, "exchange": seat.exchange, **good}
            try:
                comm = paracomm.connect(**arguments | {argument: given})
            except (OSError, ValueError) as error:  # what the caller's own exchange raises reaches the caller
                raise CoreError(str(error)) from error
            try:
                found = comm.all_reduce(np.ones(2))
                return "" if (found == comm.world_size).all() else f"all_reduce gave {found}"
            finally:
                comm.close()

        return plain_case(f"connect({argument}={name})", call, value, expect, False)

    large = {"2**45": lambda: 1 << 45, "2**20": lambda: 1 << 20, "1": lambda: 1, "0": lambda: 0, "7": lambda: 7}
    for argument in ("window_bytes", "staging_bytes", "sockets_per_peer", "lag", "cores"):
        for name, value in (NUMBERS | large).items():
            wrong = INTEGERS_REFUSED - {"None"} | {"2**45"}
            if argument == "sockets_per_peer":
                wrong = wrong | {"2**20"}
            yield case(argument, name, value, REFUSED if name in wrong else EITHER)
    for argument in ("timeout_s", "connect_timeout_s"):
        for name, value in NUMBERS.items():
            wrong = (TIMES_REFUSED | {"None", "0.0"}) - {"2**62"}
            yield case(argument, name, value, REFUSED if name in wrong - {"0.0", "None"} else EITHER)
    for argument in ("interface", "host_id", "master_address", "transport", "table", "exchange"):
        for name, value in (SCALARS | {"NUL": lambda: "a\0b", "long": lambda: "x" * 70_000}).items():
            wrong = {"5", "3.5", "NaN", "object", "type", "Ellipsis", "-1", "2**62"}
            if argument == "exchange":
                wrong = wrong | {"None", "text"}
            yield case(argument, name, value, REFUSED if name in wrong else EITHER)
    answers: dict[str, Callable[[], Any]] = {
        "raises": lambda: lambda b: (_ for _ in ()).throw(OSError("down")),
        "None": lambda: lambda b: None,
        "too few": lambda: lambda b: [b],
        "junk": lambda: lambda b: [b"x", b"y"],
        "texts": lambda: lambda b: ["x", "y"],
        "huge": lambda: lambda b: [b"\xff" * 100_000] * 2,
        "empty": lambda: lambda b: [b"", b""],
        "itself twice": lambda: lambda b: [b, b],
    }
    for name, value in answers.items():
        yield case(
            "exchange",
            f"one that {name}" if name == "raises" else f"one of {name}",
            value,
            EITHER if name == "raises" else REFUSED,
        )
    for argument, name, value in (
        ("rank", "-1", lambda: -1),
        ("rank", "2", lambda: 2),
        ("rank", "2**62", lambda: 1 << 62),
        ("rank", "None", lambda: None),
        ("rank", "text", lambda: "0"),
        ("rank", "1.5", lambda: 1.5),
        ("rank", "NaN", lambda: float("nan")),
        ("world_size", "0", lambda: 0),
        ("world_size", "-1", lambda: -1),
        ("world_size", "2**62", lambda: 1 << 62),
        ("world_size", "2**31", lambda: 1 << 31),
        ("world_size", "None", lambda: None),
        ("world_size", "text", lambda: "2"),
        ("world_size", "1.5", lambda: 1.5),
        ("world_size", "3", lambda: 3),
        ("world_size", "NaN", lambda: float("nan")),
    ):
        yield case(argument, name, value, REFUSED)


# --- the core itself ---
class CoreError(paracomm.Error):
    """Stands for whatever the private half raises: any exception of Python will do, a death will not."""


def _private_case(name: str, call: Callable[[Any], Any]) -> Case:
    def prepare(seat: Any) -> Prepared:
        def run() -> None:
            try:
                call(seat)
            except Exception as error:
                raise CoreError(f"{type(error).__name__}: {error}") from error

        return Prepared(run)

    return Case(name, prepare, EITHER)


def private() -> Iterator[Case]:
    """Nothing kills the interpreter: objects of the core that were made by __new__ alone, and odd numbers."""
    classes = {name: found for name, found in vars(_C).items() if isinstance(found, type)}
    arguments: dict[str, tuple[Any, ...]] = {"": (), "0": (0,), "0, 0": (0, 0), "-1": (-1,), "None": (None,)}
    for name, kind in classes.items():
        for attribute in dir(kind):
            if attribute in ("__new__", "__class__", "__init_subclass__", "__subclasshook__", "__del__"):
                continue
            if attribute.startswith("__") and attribute not in ("__init__", "__repr__", "__reduce__", "__iter__"):
                continue
            for text, given in arguments.items():
                yield _private_case(f"_C.{name}.__new__().{attribute}({text})", _of_new(kind, attribute, given))
                if text == "" and not callable(getattr(kind, attribute)):
                    break
    for name, found in vars(_C).items():
        if callable(found) and not isinstance(found, type) and not name.startswith("_"):
            for text, given in (arguments | {"0, 0, 0": (0, 0, 0), "200": (200,), "2**62": (1 << 62,)}).items():
                yield _private_case(f"_C.{name}({text})", lambda seat, f=found, g=given: f(*g))
    core: dict[str, Callable[[Any], Any]] = {
        "dump_plan(99)": lambda c: c.dump_plan(99, 4, 0),
        "dump_plan(-1)": lambda c: c.dump_plan(-1, 4, 0),
        "choose(99)": lambda c: c.choose(99, -1, 8),
        "choose(-1)": lambda c: c.choose(-1, -1, 8),
        "choose(root=99)": lambda c: c.choose(0, 99, 8),
        "choose(root=-9)": lambda c: c.choose(0, -9, 8),
        "set_choice(99)": lambda c: c.set_choice(99, -1, []),
        "set_choice(program)": lambda c: c.set_choice(1, 99, [(8, 99)]),
        "run(program=99)": lambda c: c.run(99, 0, 0, 0, 0, 0, 1.0, [], [], 0),
        "run(program=-1)": lambda c: c.run(-1, 0, 0, 0, 0, 0, 1.0, [], [], 0),
        "run(null)": lambda c: c.run(0, 0, 0, 4, 0, 0, 1.0, [], [], 0),
        "run(dtype=200)": lambda c: c.run(0, 0, 0, 0, 200, 0, 1.0, [], [], 0),
        "run(op=200)": lambda c: c.run(0, 0, 0, 0, 0, 200, 1.0, [], [], 0),
        "run(count=-1)": lambda c: c.run(0, 0, 0, -1, 0, 0, 1.0, [], [], 0),
        "submit(dtype=200)": lambda c: c.submit(0, 0, 0, 0, 200, 0, 1.0, [], [], 0).wait(1.0),
        "submit(null)": lambda c: c.submit(0, 0, 0, 4, 0, 0, 1.0, [], [], 0).wait(1.0),
        "submit(program=99)": lambda c: c.submit(99, 0, 0, 0, 0, 0, 1.0, [], [], 0).wait(1.0),
        "send(null)": lambda c: c.send(0, 64, 0, 1 - c.rank, 1.0, 7),
        "recv(null)": lambda c: c.recv(0, 64, 0, 1 - c.rank, 1.0, 8),
        "send(dtype=200)": lambda c: c.send(0, 0, 200, 1 - c.rank, 1.0, 9),
        "recv(peer=-9)": lambda c: c.recv(0, 0, 0, -9, 1.0, 9),
        "add_program(None)": lambda c: c.add_program(None),
        "attach_device(None)": lambda c: c.attach_device(None),
        "make_device(core, 0, 0)": lambda c: _C.make_device(c, 0, 0),
        "make_device(core, 'x', 99)": lambda c: _C.make_device(c, "x", 99),
        "make_device(0, 0, 0)": lambda c: _C.make_device(0, 0, 0),
        "make_device(core, 'cuda', -1)": lambda c: _C.make_device(c, "cuda", -1),
        "fast_all_reduce of nothing": lambda c: c.fast_all_reduce()(),
        "fast_all_reduce(None)": lambda c: c.fast_all_reduce()(None, None, None),
        "fast_all_reduce(op=5)": lambda c: c.fast_all_reduce()(np.ones(2), 5, None),
        "fast_all_reduce by keyword": lambda c: c.fast_all_reduce()(x=np.ones(2)),
        "fill_normal(null)": lambda c: _C.fill_normal(0, 0, 0, 0, 4, 0),
        "decode_blocks(null)": lambda c: _C.decode_blocks(8, 32, 0, 32, False, 0),
        "item_size(200)": lambda c: _C.item_size(200),
        "block_bytes(0, 0)": lambda c: _C.block_bytes(0, 0),
    }
    for name, call in core.items():
        found = _private_case(f"core {name}", lambda seat, f=call: f(seat.comm._core))
        yield Case(found.name, found.prepare, EITHER, ends=True)


def _of_new(kind: Any, attribute: str, given: tuple[Any, ...]) -> Callable[[Any], Any]:
    def call(seat: Any) -> None:
        found = getattr(kind.__new__(kind), attribute)
        if callable(found):
            found(*given)

    return call
