"""Odd calls of torch.distributed on this backend: each collective x each argument x a list of odd values."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as funcol
from torch.distributed import distributed_c10d

from tests.comm.odd_arrays import EITHER, REFUSED, RIGHT, SCALARS, Kind, Made, kinds, numbers, values
from tests.comm.odd_calls import Case, Prepared
from tests.comm.odd_communicator import NUMBERS, ROWS, add, like, plain_case, same, shape_of

Numbers = np.ndarray
Everybodys = list[dict[str, Numbers]]


@dataclass(frozen=True)
class Form:
    """A collective and its tensors. `times` says how many elements each has, in those of the smallest."""

    name: str
    roles: dict[str, str]
    call: Callable[[dict[str, Any], bool], Any]
    want: Callable[[int, Everybodys], dict[str, Numbers]]
    times: Mapping[str, int] = field(default_factory=dict)
    reduces: bool = False
    halves: bool = False
    """The smallest tensor is cut into two."""
    root_only: frozenset[str] = frozenset()

    def count(self, name: str, odd: str, count: int) -> int:
        """Elements of `name` where `odd` has `count`."""
        return count * self.times.get(name, 1) // self.times.get(odd, 1)


def _root(tensors: list[Any]) -> Any:
    return tensors if dist.get_rank() == 0 else None


def _halves(x: Numbers) -> tuple[Numbers, Numbers]:
    return x[: x.size // 2], x[x.size // 2 :]


def _coalesced(call: Callable[..., Any], pairs: list[tuple[Any, ...]], wait: bool) -> Any:
    try:
        with dist._coalescing_manager(async_ops=True) as manager:
            for pair in pairs:
                call(*pair)
    except BaseException:
        # torch's own manager forgets to end what an error has ended.
        distributed_c10d._world.pg_coalesce_state.pop(dist.group.WORLD, None)
        raise
    return manager


def _forms() -> list[Form]:
    two = {"out": 2}
    a = [
        Form(
            "all_reduce",
            {"x": "inout"},
            lambda t, w: dist.all_reduce(t["x"], async_op=w),
            lambda r, v: {"x": add(v[0]["x"], v[1]["x"])},
            reduces=True,
        ),
        Form(
            "all_reduce_coalesced",
            {"x": "inout", "other": "inout"},
            lambda t, w: dist.all_reduce_coalesced([t["x"], t["other"]], async_op=w),
            lambda r, v: {k: add(v[0][k], v[1][k]) for k in ("x", "other")},
            reduces=True,
        ),
        Form(
            "_coalescing_manager of all_reduce",
            {"x": "inout", "other": "inout"},
            lambda t, w: _coalesced(dist.all_reduce, [(t["other"],), (t["x"],)], w),
            lambda r, v: {k: add(v[0][k], v[1][k]) for k in ("x", "other")},
            reduces=True,
        ),
        Form(
            "reduce",
            {"x": "inout"},
            lambda t, w: dist.reduce(t["x"], 0, async_op=w),
            lambda r, v: {} if r else {"x": add(v[0]["x"], v[1]["x"])},
            reduces=True,
        ),
        Form(
            "broadcast",
            {"x": "inout"},
            lambda t, w: dist.broadcast(t["x"], 0, async_op=w),
            lambda r, v: {"x": v[0]["x"]},
        ),
        Form(
            "all_gather",
            {"x": "in", "out": "out", "other": "out"},
            lambda t, w: dist.all_gather([t["out"], t["other"]], t["x"], async_op=w),
            lambda r, v: {"out": v[0]["x"], "other": v[1]["x"]},
        ),
        Form(
            "all_gather_into_tensor",
            {"x": "in", "out": "out"},
            lambda t, w: dist.all_gather_into_tensor(t["out"], t["x"], async_op=w),
            lambda r, v: {"out": np.concatenate([v[0]["x"], v[1]["x"]])},
            two,
        ),
        Form(
            "all_gather_coalesced",
            {"x": "in", "out": "out", "other": "out"},
            lambda t, w: dist.all_gather_coalesced([[t["out"]], [t["other"]]], [t["x"]], async_op=w),
            lambda r, v: {"out": v[0]["x"], "other": v[1]["x"]},
        ),
        Form(
            "_coalescing_manager of all_gather_into_tensor",
            {"x": "in", "out": "out", "x2": "in", "out2": "out"},
            lambda t, w: _coalesced(dist.all_gather_into_tensor, [(t["out"], t["x"]), (t["out2"], t["x2"])], w),
            lambda r, v: {o: np.concatenate([v[0][i], v[1][i]]) for o, i in (("out", "x"), ("out2", "x2"))},
            {"out": 2, "out2": 2},
        ),
        Form(
            "reduce_scatter",
            {"out": "out", "x": "in", "other": "in"},
            lambda t, w: dist.reduce_scatter(t["out"], [t["x"], t["other"]], async_op=w),
            lambda r, v: {"out": add(v[0]["other" if r else "x"], v[1]["other" if r else "x"])},
            reduces=True,
        ),
        Form(
            "reduce_scatter_tensor",
            {"out": "out", "x": "in"},
            lambda t, w: dist.reduce_scatter_tensor(t["out"], t["x"], async_op=w),
            lambda r, v: {"out": _halves(add(v[0]["x"], v[1]["x"]))[r]},
            {"x": 2},
            True,
        ),
        Form(
            "_coalescing_manager of reduce_scatter_tensor",
            {"out": "out", "x": "in", "out2": "out", "x2": "in"},
            lambda t, w: _coalesced(dist.reduce_scatter_tensor, [(t["out"], t["x"]), (t["out2"], t["x2"])], w),
            lambda r, v: {o: _halves(add(v[0][i], v[1][i]))[r] for o, i in (("out", "x"), ("out2", "x2"))},
            {"x": 2, "x2": 2},
            True,
        ),
        Form(
            "all_to_all",
            {"x": "in", "other": "in", "out": "out", "out2": "out"},
            lambda t, w: dist.all_to_all([t["out"], t["out2"]], [t["x"], t["other"]], async_op=w),
            lambda r, v: {"out": v[0]["other" if r else "x"], "out2": v[1]["other" if r else "x"]},
        ),
        Form(
            "all_to_all_single",
            {"x": "in", "out": "out"},
            lambda t, w: dist.all_to_all_single(t["out"], t["x"], async_op=w),
            lambda r, v: {"out": np.concatenate([_halves(v[0]["x"])[r], _halves(v[1]["x"])[r]])},
            halves=True,
        ),
        Form(
            "all_to_all_single splits",
            {"x": "in", "out": "out"},
            lambda t, w: dist.all_to_all_single(t["out"], t["x"], *_splits(t["out"], t["x"]), async_op=w),
            _want_splits,
            halves=True,
        ),
        Form(
            "gather",
            {"x": "in", "out": "out", "other": "out"},
            lambda t, w: dist.gather(t["x"], _root([t["out"], t["other"]]), 0, async_op=w),
            lambda r, v: {} if r else {"out": v[0]["x"], "other": v[1]["x"]},
            root_only=frozenset(("out", "other")),
        ),
        Form(
            "scatter",
            {"out": "out", "x": "in", "other": "in"},
            lambda t, w: dist.scatter(t["out"], _root([t["x"], t["other"]]), 0, async_op=w),
            lambda r, v: {"out": v[0]["other" if r else "x"]},
            root_only=frozenset(("x", "other")),
        ),
        Form(
            "isend and irecv",
            {"x": "in", "out": "out"},
            lambda t, w: _exchange(t["x"], t["out"]),
            lambda r, v: {"out": v[1 - r]["x"]},
        ),
        Form(
            "irecv and isend",
            {"x": "in", "out": "out"},
            lambda t, w: _exchange(t["x"], t["out"], True),
            lambda r, v: {"out": v[1 - r]["x"]},
        ),
        Form(
            "batch_isend_irecv",
            {"x": "in", "out": "out"},
            lambda t, w: _batch(t["x"], t["out"]),
            lambda r, v: {"out": v[1 - r]["x"]},
        ),
        Form(
            "functional all_reduce",
            {"x": "in"},
            lambda t, w: _kept(funcol.all_reduce(t["x"], "sum", _world())),
            lambda r, v: {"": add(v[0]["x"], v[1]["x"])},
            reduces=True,
        ),
        Form(
            "functional all_gather_tensor",
            {"x": "in"},
            lambda t, w: _kept(funcol.all_gather_tensor(t["x"], 0, _world())),
            lambda r, v: {"": np.concatenate([v[0]["x"], v[1]["x"]])},
        ),
        Form(
            "functional broadcast",
            {"x": "in"},
            lambda t, w: _kept(funcol.broadcast(t["x"], 0, _world())),
            lambda r, v: {"": v[0]["x"]},
        ),
        Form(
            "functional all_reduce_coalesced",
            {"x": "in", "other": "in"},
            lambda t, w: _kept(funcol.all_reduce_coalesced([t["other"], t["x"]], "sum", _world())[1]),
            lambda r, v: {"": add(v[0]["x"], v[1]["x"])},
            reduces=True,
        ),
    ]
    return a


def _world() -> Any:
    return dist.group.WORLD


class _Result:
    """What a functional collective returns, with a `wait` as others have."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def wait(self) -> Any:
        self.tensor = funcol.wait_tensor(self.tensor)
        return self.tensor


def _kept(tensor: Any) -> _Result:
    return _Result(tensor)


def _splits(out: Any, x: Any) -> tuple[list[int], list[int]]:
    """Rank 0 sends one row to itself and the rest to rank 1, which sends as many to rank 0 and one to itself."""
    rows = (shape_of(x) or (0,))[0]
    sizes = [1, rows - 1] if dist.get_rank() == 0 else [rows - 1, 1]
    return list(sizes), list(sizes)


def _want_splits(rank: int, v: Everybodys) -> dict[str, Numbers]:
    a, b = v[0]["x"], v[1]["x"]
    return {"out": np.concatenate([a[:1], b[:-1]] if rank == 0 else [a[1:], b[-1:]])}


class _Works:
    def __init__(self, works: list[Any]) -> None:
        self.works = works

    def wait(self) -> None:
        for work in self.works:
            if work is not None:
                work.wait()


def _exchange(x: Any, out: Any, receive_first: bool = False) -> _Works:
    peer = 1 - dist.get_rank()
    calls = [lambda: dist.isend(x, peer), lambda: dist.irecv(out, peer)]
    return _Works([call() for call in (calls[::-1] if receive_first else calls)])


def _batch(x: Any, out: Any) -> _Works:
    peer = 1 - dist.get_rank()
    return _Works(dist.batch_isend_irecv([dist.P2POp(dist.irecv, out, peer), dist.P2POp(dist.isend, x, peer)]))


FORMS = _forms()


def tensor_case(form: Form, role_of: str, kind: Kind, waits: bool) -> Case:
    """The tensor `role_of` is of this kind on both ranks, all others are good."""
    role = form.roles[role_of]
    expect = kind.read if role == "in" else kind.written
    if role == "inout" and expect == RIGHT:
        expect = kind.read
    if form.reduces and expect == RIGHT:
        expect = kind.reduced
    if expect == RIGHT and not _fits(form, kind, role_of):
        expect = EITHER
    if form.name.startswith("functional") and ("freed" in kind.name or kind.name in ("torch meta", "torch functional")):
        # torch copies the input first, and reads past the end of a storage that was cut. What has no values, and what
        # stands for others, it answers itself.
        expect = EITHER
    asymmetric = role_of in form.root_only or (form.name in ("reduce", "broadcast") and kind.read != kind.written)
    # torch's own checks are the root's, and a root alone has tensors of two kinds.
    asymmetric |= form.name in ("gather", "scatter") and kind.name in ("torch FakeTensor", "torch float4", "torch bits")

    def prepare(seat: Any) -> Prepared:
        made: dict[str, Made] = {}
        everybodys: Everybodys = [{}, {}]
        for name, one in form.roles.items():
            if name == role_of:
                made[name] = kind.make(seat.rank)
                for r in range(2):
                    twin = made[name] if r == seat.rank else kind.make(r)
                    everybodys[r][name] = twin.numbers() if twin.numbers else np.zeros(0)
            else:
                count = form.count(name, role_of, kind.count)
                good = like(kind.partner, count, None if one == "out" else seat.rank)
                made[name] = Made(good, lambda good=good: numbers(good))
                for r in range(2):
                    everybodys[r][name] = numbers(like(kind.partner, count, None if one == "out" else r))
        before = {name: m.numbers() for name, m in made.items() if m.numbers}
        arrays = {name: m.array for name, m in made.items()}

        def call() -> Any:
            work = form.call(arrays, waits)
            return work.wait() if work is not None else None

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
            if made[role_of].numbers is None:
                return "accepted" if expect == REFUSED and not asymmetric else ""
            for name, right in form.want(seat.rank, everybodys).items():
                reader = made[name].numbers if name else lambda: numbers(result)
                assert reader is not None
                found = reader()
                if not same(found, right):
                    return f"{name or 'the result'} is {found.tolist()}, right is {right.tolist()}"
            return ""

        return Prepared(call, check, untouched)

    name = f"dist {form.name}({role_of}={kind.name}){' async' if waits else ''}"
    raw = kind.name in ("torch bits", "torch float4")  # its good partners are of another dtype
    return Case(
        name,
        prepare,
        EITHER if asymmetric and expect == REFUSED else expect,
        asymmetric,
        raw,
        form.name == "batch_isend_irecv",
    )


def _fits(form: Form, kind: Kind, role_of: str) -> bool:
    shape = shape_of(kind.make(0).array)
    if form.halves and (not shape or shape[0] % 2):
        return False
    if form.name == "all_to_all_single splits" and shape != (4,):
        return False
    if form.name.startswith("functional") and (len(shape) != 1 or "no " in kind.name):
        return False
    if kind.count % form.times.get(role_of, 1):
        return False
    # Two tensors of one call, of which one has another shape than the flat others: torch asks for one shape.
    return len(shape) == 1 or form.name in ("all_reduce", "reduce", "broadcast", "isend and irecv")


# The good call of a pair comes before the odd one, and is left over where that is refused.
LATER = {("isend and irecv", "out"), ("irecv and isend", "x")}


def _has_no_end(form: Form, kind: Kind) -> bool:
    """torch's own copy of a freed tensor dies, and a fake message, which is not sent, is waited for."""
    if kind.name in ("torch freed", "torch freed strided"):
        return form.name.startswith("functional")
    return kind.name == "torch FakeTensor" and "isend" in form.name


def tensors() -> Iterator[Case]:
    turn = 0
    for form in FORMS:
        for role_of in form.roles:
            if role_of == "out2" or (form.name, role_of) in LATER:
                continue
            for kind in kinds(True):
                if _has_no_end(form, kind):
                    continue
                both = form.name in ("all_reduce", "broadcast") and kind.read != REFUSED
                for waits in (False, True) if both else (turn % 2 == 1,):
                    yield tensor_case(form, role_of, kind, waits)
                turn += 1


# --- lists of tensors ---
LISTS: dict[str, Callable[[], Any]] = SCALARS | {
    "of one": lambda: [torch.zeros(4)],
    "of three": lambda: [torch.zeros(4)] * 3,
    "of None": lambda: [None, None],
    "of numbers": lambda: [1.0, 2.0],
    "of lists": lambda: [[torch.zeros(4)], []],
    "tuple": lambda: (torch.zeros(4), torch.zeros(4)),
    "tensor": lambda: torch.zeros(2, 4),
    "two dtypes": lambda: [torch.zeros(4), torch.zeros(4, dtype=torch.int32)],
    "two sizes": lambda: [torch.zeros(4), torch.zeros(5)],
    "two shapes": lambda: [torch.zeros(4), torch.zeros(2, 2)],
    "the same twice": lambda: [torch.zeros(4)] * 2,
    "overlapping": lambda: _overlapping_pair(),
    "meta and cpu": lambda: [torch.zeros(4), torch.zeros(4, device="meta")],
    "freed and good": lambda: [_freed(torch.zeros(4)), torch.zeros(4)],
    "generator": lambda: (torch.zeros(4) for _ in "ab"),
    "dictionary": lambda: {0: torch.zeros(4), 1: torch.zeros(4)},
    "sparse and dense": lambda: [torch.zeros(4).to_sparse(), torch.zeros(4)],
}
LISTS_REFUSED = set(SCALARS) - {"None"} | {
    "of one",
    "of three",
    "of None",
    "of numbers",
    "of lists",
    "two dtypes",
    "meta and cpu",
    "freed and good",
}


def _overlapping_pair() -> list[torch.Tensor]:
    base = torch.zeros(6)
    return [base[:4], base[2:]]


def _freed(x: torch.Tensor) -> torch.Tensor:
    x.untyped_storage().resize_(0)
    return x


def lists() -> Iterator[Case]:
    x = lambda seat: torch.from_numpy(values(seat.rank, 4).copy())  # noqa: E731
    calls: dict[str, Callable[[Any, Any], Any]] = {
        "all_gather(tensor_list": lambda seat, given: dist.all_gather(given, x(seat)),
        "all_gather_coalesced(lists": lambda seat, given: dist.all_gather_coalesced(given, [x(seat)]),
        "all_gather_coalesced(inputs": lambda seat, given: dist.all_gather_coalesced([[x(seat)], [x(seat)]], given),
        "reduce_scatter(input_list": lambda seat, given: dist.reduce_scatter(x(seat), given),
        "all_to_all(output_list": lambda seat, given: dist.all_to_all(given, [x(seat), x(seat)]),
        "all_to_all(input_list": lambda seat, given: dist.all_to_all([x(seat), x(seat)], given),
        "all_reduce_coalesced(tensors": lambda seat, given: dist.all_reduce_coalesced(given),
        "gather(gather_list": lambda seat, given: dist.gather(x(seat), given if seat.rank == 0 else None, 0),
        "scatter(scatter_list": lambda seat, given: dist.scatter(x(seat), given if seat.rank == 0 else None, 0),
        "gather(gather_list not of the root": lambda seat, given: dist.gather(
            x(seat), given if seat.rank else [x(seat), x(seat)], 0
        ),
        "functional all_reduce_coalesced(tensors": lambda seat, given: [
            funcol.wait_tensor(t) for t in funcol.all_reduce_coalesced(given, "sum", _world())
        ],
    }
    for name, call in calls.items():
        asymmetric = name.startswith(("gather", "scatter"))
        for value_name, value in LISTS.items():
            if name.startswith("functional") and "freed" in value_name:
                continue
            loose = asymmetric or "coalesced" in name or value_name in ("two sizes", "[]", "()", "{}", "None")
            loose |= name.startswith("functional")
            strict = value_name in LISTS_REFUSED and not loose
            expect = REFUSED if strict and name != "gather(gather_list not of the root" else EITHER
            case = _quiet(plain_case(f"dist {name}={value_name})", call, value, expect, asymmetric))
            # A good list for one rank, and the other one's own block does not fit.
            yield dataclasses.replace(case, alone=case.alone or value_name == "two sizes")


def _quiet(case: Case) -> Case:
    """What the call returns is no complaint."""

    def prepare(seat: Any) -> Prepared:
        prepared = case.prepare(seat)
        return Prepared(prepared.call)

    return dataclasses.replace(case, prepare=prepare)


# --- numbers, groups, options ---
def options() -> Iterator[Case]:
    x = lambda rank: torch.from_numpy(values(rank, 4).copy())  # noqa: E731
    total = torch.tensor([3.0, 6.0, 4.0, 7.0])

    def equal(found: torch.Tensor, right: torch.Tensor) -> str:
        return "" if torch.equal(found, right) else f"got {found.tolist()}, right is {right.tolist()}"

    def all_reduce(seat: Any, **given: Any) -> str:
        t = x(seat.rank)
        work = dist.all_reduce(t, **given)
        if work is not None and hasattr(work, "wait"):
            work.wait()
        return "" if "group" in given else equal(t, total)

    def rooted(name: str, argument: str) -> Callable[[Any, Any], str]:
        def call(seat: Any, given: Any) -> str:
            t, lists_ = x(seat.rank), [torch.zeros(4), torch.zeros(4)]
            root = int(given) if given is not None else 0
            on_root = seat.rank == root
            if name == "broadcast":
                dist.broadcast(t, **{argument: given})
                return equal(t, x(root))
            if name == "reduce":
                dist.reduce(t, **{argument: given})
                return equal(t, total) if on_root else ""
            if name == "gather":
                dist.gather(t, lists_ if on_root else None, **{argument: given})
                return equal(torch.cat(lists_), torch.cat([x(0), x(1)])) if on_root else ""
            dist.scatter(t, [x(0), x(1)] if on_root else None, **{argument: given})
            return equal(t, x(seat.rank))

        def safe(seat: Any, given: Any) -> str:
            try:
                int(given)
            except Exception:
                getattr(dist, name)(x(seat.rank), **{argument: given})
                return "" if given is None else "accepted"
            return call(seat, given)

        return safe

    ops = SCALARS | {
        "text SUM": lambda: "SUM",
        "99": lambda: 99,
        "PREMUL_SUM": lambda: dist._make_nccl_premul_sum(2.0),
        "class": lambda: dist.ReduceOp,
        "tensor": lambda: torch.ones(2),
        "type SUM": lambda: dist.ReduceOp.RedOpType.SUM,
    }
    for name, value in ops.items():
        expect = EITHER if name in ("type SUM", "None", "PREMUL_SUM", "5", "-1", "True", "99") else REFUSED
        yield plain_case(
            f"dist all_reduce(op={name})",
            lambda seat, op: all_reduce(seat, op=op) if op is not None else "",
            value,
            expect,
            False,
        )
        yield plain_case(
            f"dist reduce_scatter_tensor(op={name})",
            lambda seat, op: _quietly(dist.reduce_scatter_tensor(torch.zeros(2), x(seat.rank), op)),
            value,
            expect,
            False,
        )
        yield plain_case(
            f"dist reduce(op={name})", lambda seat, op: _quietly(dist.reduce(x(seat.rank), 0, op)), value, expect, False
        )
    groups = SCALARS | {
        "the class": lambda: dist.ProcessGroup,
        "the base": lambda: dist.ProcessGroup(0, 2),
        "non-member": lambda: dist.GroupMember.NON_GROUP_MEMBER,
        "name": lambda: dist.group.WORLD.group_name,
    }
    grouped: dict[str, Callable[[Any, Any], Any]] = {
        "all_reduce": lambda seat, g: dist.all_reduce(x(seat.rank), group=g),
        "broadcast": lambda seat, g: dist.broadcast(x(seat.rank), 0, group=g),
        "all_gather": lambda seat, g: dist.all_gather([x(0), x(1)], x(seat.rank), group=g),
        "barrier": lambda seat, g: dist.barrier(group=g),
        "isend": lambda seat, g: dist.isend(x(seat.rank), 1 - seat.rank, group=g) if g is not None else None,
        "irecv": lambda seat, g: dist.irecv(x(seat.rank), 1 - seat.rank, group=g) if g is not None else None,
        "all_gather_object": lambda seat, g: dist.all_gather_object([None, None], 5, group=g),
        "get_rank": lambda seat, g: dist.get_rank(g),
        "get_world_size": lambda seat, g: dist.get_world_size(g),
        "monitored_barrier": lambda seat, g: dist.monitored_barrier(g, timedelta(seconds=3)),
    }
    for name, call in grouped.items():
        for value_name, value in groups.items():
            yield plain_case(
                f"dist {name}(group={value_name})", lambda seat, g, c=call: _quietly(c(seat, g)), value, EITHER, False
            )
    for name in ("broadcast", "reduce", "gather", "scatter"):
        argument = "src" if name in ("broadcast", "scatter") else "dst"
        for prefix in ("", "group_"):
            for value_name, value in NUMBERS.items():
                call = rooted(name, prefix + argument)
                yield plain_case(f"dist {name}({prefix}{argument}={value_name})", call, value, EITHER, True)
    for value_name, value in NUMBERS.items():
        yield plain_case(
            f"dist all_reduce(async_op={value_name})",
            lambda seat, a: all_reduce(seat, async_op=a),
            value,
            EITHER,
            False,
        )
        for what in ("isend", "irecv"):
            for argument in ("dst" if what == "isend" else "src", "tag"):
                call = _to_peer(what, argument)
                yield plain_case(f"dist {what}({argument}={value_name})", call, value, EITHER, argument != "tag")
        if value_name != "0.0":
            yield plain_case(
                f"dist monitored_barrier(timeout={value_name})",
                lambda seat, t: _quietly(dist.monitored_barrier(timeout=t)),
                value,
                EITHER,
                False,
            )
        yield plain_case(
            f"dist monitored_barrier(wait_all_ranks={value_name})",
            lambda seat, t: _quietly(dist.monitored_barrier(timeout=timedelta(seconds=3), wait_all_ranks=t)),
            value,
            EITHER,
            False,
        )
        yield plain_case(
            f"dist barrier(device_ids={value_name})",
            lambda seat, d: _quietly(dist.barrier(device_ids=d)),
            value,
            EITHER,
            False,
        )
        yield plain_case(f"dist Work.wait(timeout={value_name})", _wait, value, EITHER, False)
    for value_name, value in ROWS.items():
        for argument in ("output_split_sizes", "input_split_sizes"):
            yield plain_case(
                f"dist all_to_all_single({argument}={value_name})", _split_sizes(argument), value, EITHER, False
            )
    for value_name, value in (
        SCALARS | {"of numbers": lambda: [1], "of None": lambda: [None], "tuple": lambda: (1,)}
    ).items():
        yield plain_case(
            f"dist batch_isend_irecv(p2p_op_list={value_name})",
            lambda seat, p: _quietly(dist.batch_isend_irecv(p)),
            value,
            EITHER,
            False,
        )
        for argument in ("op", "tensor", "peer", "group", "tag"):
            if (argument, value_name) == ("group", "None"):
                continue
            yield plain_case(f"dist P2POp({argument}={value_name})", _p2p(argument), value, EITHER, argument == "peer")


def _quietly(result: Any) -> str:
    if hasattr(result, "wait"):
        result.wait()
    return ""


def _wait(seat: Any, given: Any) -> str:
    x = torch.ones(4)
    work = dist.all_reduce(x, async_op=True)
    try:
        work.wait() if given is None else work.wait(given)
    finally:
        work.wait()
    return "" if (x == 2).all() else f"got {x.tolist()}"


def _to_peer(what: str, argument: str) -> Callable[[Any, Any], str]:
    def call(seat: Any, given: Any) -> str:
        x, out = torch.full((4,), 3.0 + seat.rank), torch.zeros(4)
        arguments: dict[str, Any] = {"dst" if what == "isend" else "src": 1 - seat.rank} | {argument: given}
        first = getattr(dist, what)(x if what == "isend" else out, **arguments)
        try:
            tag = int(given) if argument == "tag" else 0
        except Exception:
            return "accepted"
        other = dist.irecv(out, 1 - seat.rank, tag=tag) if what == "isend" else dist.isend(x, 1 - seat.rank, tag=tag)
        other.wait()
        first.wait()
        return "" if (out == 4.0 - seat.rank).all() else f"received {out.tolist()}"

    return call


def _split_sizes(argument: str) -> Callable[[Any, Any], str]:
    def call(seat: Any, given: Any) -> str:
        x, out = torch.from_numpy(values(seat.rank, 4).copy()), torch.zeros(4)
        good = {"output_split_sizes": [2, 2], "input_split_sizes": [2, 2]}
        dist.all_to_all_single(out, x, **good | {argument: given})
        right = np.concatenate([values(r, 4)[2 * seat.rank : 2 * seat.rank + 2] for r in range(2)])
        return "" if out.tolist() == right.tolist() else f"got {out.tolist()}, right is {right.tolist()}"

    return call


def _p2p(argument: str) -> Callable[[Any, Any], str]:
    def call(seat: Any, given: Any) -> str:
        arguments: dict[str, Any] = {"op": dist.isend, "tensor": torch.ones(4), "peer": 1 - seat.rank, "tag": 0}
        first = dist.P2POp(**arguments | {argument: given})
        tag = given if argument == "tag" else 0
        second = dist.P2POp(dist.irecv, torch.zeros(4), 1 - seat.rank, tag=tag)
        for work in dist.batch_isend_irecv([first, second]):
            work.wait()
        return ""

    return call


# --- groups and objects ---
def groups_and_objects() -> Iterator[Case]:
    def new_group(argument: str) -> Callable[[Any, Any], str]:
        def call(seat: Any, given: Any) -> str:
            group = dist.new_group(**{argument: given})
            if not isinstance(group, dist.ProcessGroup):
                return ""
            x = torch.ones(3)
            dist.all_reduce(x, group=group)
            size = float(dist.get_world_size(group))
            dist.destroy_process_group(group)
            return "" if x.tolist() == [size] * 3 else f"a group of {size} ranks sums ones to {x.tolist()}"

        return call

    ranks = SCALARS | {
        "both": lambda: [0, 1],
        "backwards": lambda: [1, 0],
        "twice": lambda: [0, 0],
        "beyond": lambda: [0, 5],
        "negative": lambda: [-1, 0],
        "floats": lambda: [0.0, 1.0],
        "texts": lambda: ["0", "1"],
        "array": lambda: np.array([0, 1]),
        "tensor": lambda: torch.tensor([0, 1]),
        "of None": lambda: [None, 1],
        "one": lambda: [0],
    }
    for name, value in ranks.items():
        # A failed attempt may leave the ranks' counters of groups apart.
        yield plain_case(f"dist new_group(ranks={name})", new_group("ranks"), value, EITHER, False, ends=True)
    for name, value in (
        SCALARS
        | {
            "seconds": lambda: timedelta(seconds=3),
            "0 s": lambda: timedelta(0),
            "-1 s": lambda: timedelta(seconds=-1),
            "huge": lambda: timedelta.max,
        }
    ).items():
        case = plain_case(f"dist new_group(timeout={name})", new_group("timeout"), value, EITHER, False, ends=True)
        yield dataclasses.replace(case, mismatch=True)  # no time at all is a time
    settings = SCALARS | {
        "unknown": lambda: {"nope": 1},
        "timeout NaN": lambda: {"timeout_s": float("nan")},
        "transport": lambda: {"transport": "nope"},
        "window": lambda: {"window_bytes": 1 << 62},
        "negative": lambda: {"staging_bytes": -1},
        "interface": lambda: {"interface": "nope0"},
        "table": lambda: {"table": 5},
        "rank": lambda: {"rank": 0},
    }
    good = ("None", "{}")
    for name, value in settings.items():
        expect = RIGHT if name in good else REFUSED
        yield plain_case(f"dist new_group(pg_options={name})", new_group("pg_options"), value, expect, False, ends=True)
    for name, value in (SCALARS | {"upper": lambda: "PARACOMM", "nope": lambda: "nope"}).items():
        yield plain_case(f"dist new_group(backend={name})", new_group("backend"), value, EITHER, False, ends=True)
    for name, value in (
        SCALARS | {"pairs": lambda: [[0], [1]], "both": lambda: [[0, 1]], "texts": lambda: [["a"]]}
    ).items():
        yield plain_case(
            f"dist split_group(split_ranks={name})",
            lambda seat, r: _quietly(dist.split_group(split_ranks=r)),
            value,
            EITHER,
            False,
            ends=True,
        )
        yield plain_case(
            f"group.split_group(ranks={name})",
            lambda seat, r: _quietly(dist.group.WORLD.split_group(r)),
            value,
            EITHER,
            False,
            ends=True,
        )
    for name, value in (SCALARS | {"seconds": lambda: timedelta(seconds=3)}).items():
        yield plain_case(
            f"group.set_timeout({name})",
            lambda seat, t: _quietly(dist.group.WORLD.set_timeout(t)),
            value,
            EITHER,
            False,
            ends=True,
        )
    objects = SCALARS | {
        "lambda": lambda: lambda: 0,
        "lock": threading.Lock,
        "tensor": lambda: torch.ones(3),
        "meta": lambda: torch.ones(3, device="meta"),
        "freed": lambda: _freed(torch.ones(3)),
        "large": lambda: b"x" * 300_000,
        "raises": lambda: _Unpicklable(),
        "bites": lambda: _Bites(),
    }
    for name, value in objects.items():
        yield plain_case(
            f"dist all_gather_object(obj={name})",
            lambda seat, o: _quietly(dist.all_gather_object([None, None], o)),
            value,
            EITHER,
            False,
        )
        yield plain_case(
            f"dist all_gather_object(list={name})",
            lambda seat, o: _quietly(dist.all_gather_object(o, seat.rank)),
            value,
            EITHER,
            False,
        )
        if name != "large":  # 300,000 objects, which torch pickles one by one
            yield plain_case(
                f"dist broadcast_object_list(list={name})",
                lambda seat, o: _quietly(dist.broadcast_object_list(o, 0)),
                value,
                EITHER,
                True,
            )
        yield plain_case(
            f"dist broadcast_object_list(of {name})",
            lambda seat, o: _quietly(dist.broadcast_object_list([o], 0)),
            value,
            EITHER,
            True,
        )
        yield plain_case(
            f"dist gather_object(obj={name})",
            lambda seat, o: _quietly(dist.gather_object(o, [None, None] if seat.rank == 0 else None, 0)),
            value,
            EITHER,
            True,
        )
        yield plain_case(
            f"dist scatter_object_list(out={name})",
            lambda seat, o: _quietly(dist.scatter_object_list(o, [1, 2] if seat.rank == 0 else None, 0)),
            value,
            EITHER,
            True,
        )
        yield plain_case(
            f"dist scatter_object_list(of {name})",
            lambda seat, o: _quietly(dist.scatter_object_list([None], [o, o] if seat.rank == 0 else None, 0)),
            value,
            EITHER,
            True,
        )


class _Unpicklable:
    def __reduce__(self) -> Any:
        raise ValueError("no pickle of this")


class _Bites:
    """Is pickled, but raises where it is read."""

    def __reduce__(self) -> Any:
        return _bite, ()


def _bite() -> Any:
    raise ValueError("bitten")
