"""The communicator: collectives over arrays, on every rank of a group."""

from __future__ import annotations

import itertools
import math
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from paracomm import _C, background
from paracomm.comm import device, programs, spans
from paracomm.comm.agreement import read_for_all
from paracomm.comm.arguments import (
    apart,
    block_rows,
    block_shape,
    flag,
    need_blocks,
    need_rows,
    need_same,
    op_code,
    rank_of,
    seconds,
    whole,
)  # fmt: skip
from paracomm.comm.arrays import (
    HOST,
    MOST_ELEMENTS,
    Several,
    View,
    arena_array,
    contiguous,
    empty_like,
    held,
    host_copy,
    host_room,
    is_lazy,
    known,
    name_of,
    native,
    need_reducible,
    unpack,
    view,
    writable_view,
)  # fmt: skip
from paracomm.comm.compiled import untraced
from paracomm.comm.device import Device, Lane
from paracomm.comm.work import Work
from paracomm.errors import Error, InvalidArgument
from paracomm.schedule import Schedule, build, tune
from paracomm.schedule.verify import prove
from paracomm.timeline import record

_SUM = _C.REDUCE_OPS["sum"]
DRAIN_S = 5.0
"""How long a communicator that is closed waits for operations that nobody has waited for."""
_open: weakref.WeakSet[Communicator] = weakref.WeakSet()


def close_all() -> None:
    """At exit."""
    for comm in list(_open):
        comm.close()
    background.wait_until_idle()


background.close_at_exit()


class Communicator:
    """A group of ranks. All ranks call the same collectives in the same order.

    Arrays are torch tensors on the CPU or on GPUs, NumPy and CuPy arrays, or objects with `__dlpack__` or
    `__cuda_array_interface__`, of float64/32/16, bfloat16, int8/16/32/64, uint8/16/32/64 or bool. Complex numbers are
    moved and summed, torch's 8-bit floats moved. Arrays may be strided, conjugated or negated; inputs may share memory
    with outputs. `paracomm.comm.device` says how those on GPUs travel. Operations on GPUs come after what the current
    stream holds, and it goes on after them, while the host does not wait. Reductions: sum, prod, min, max, avg, band,
    bor, bxor; 16-bit floats accumulate in float32. Each method takes `async_op=True` for a `Work` instead of the
    result, `algorithm=` for a schedule by name or a `Schedule`, and `timeout_s=` for another timeout than the
    communicator's.

    Every method raises, on every surviving rank: PeerLost (a rank died or left), Timeout, Mismatch (ranks called
    different things); and at once, before anything is sent: InvalidArgument. After the first three the communicator
    is of no further use.
    """

    def __init__(self, core: _C.Communicator, table: dict[str, Any] | None = None, settings: tuple[Any, ...] = ()):
        self._core = core
        self._table = _checked(table)
        self._settings = settings
        self.name = ""
        """Of its axis of the mesh: what it is called in a timeline; "" for "world"."""
        self._programs: dict[Any, int] = {}
        self._algorithms: dict[int, tuple[str, str]] = {}
        self._in_flight: list[tuple[_C.Work, list[Any], bool]] = []  # with what they use; is it no receive?
        self._sweep_at = 16
        self._mode = device.mode()
        self.device: Device | None = None
        """What its operations on GPUs' memory run on, once there was one (or `use_device` was called)."""
        self._device_table: dict[str, Any] = tune.device_table(core.world_size)
        self._device_choices: dict[tuple[str, int | None], list[tuple[int, int]]] = {}
        self._emulates = self._mode == "emulated" and len(set(core.host_indices)) == 1
        # (x, op, out or None): true if it was done at once, None where only all_reduce() knows how.
        self.fast_all_reduce = _never if self._emulates else core.fast_all_reduce()
        self.rank: int = core.rank
        self.world_size: int = core.world_size
        if self.world_size > 0:
            self._choose("all_reduce", None, 0)
        for kind in (Communicator, Work, device.DeviceWork):
            untraced(kind)
        _open.add(self)

    # --- who is here ---
    @property
    def hosts(self) -> list[str]:
        """Host name of every rank."""
        return list(self._core.hosts)

    @property
    def host_indices(self) -> list[int]:
        """Number of every rank's host, in order of first appearance."""
        return list(self._core.host_indices)

    @property
    def local_ranks(self) -> list[int]:
        """Ranks that share memory with this one, itself included."""
        return list(self._core.local_ranks)

    @property
    def timeout_s(self) -> float:
        """Of an operation that is given no other."""
        return float(self._core.timeout_s)

    def transport(self, peer: int) -> str:
        """ "shm", "tcp", "local" or "self": how this rank reaches `peer`."""
        return str(self._core.transport(rank_of("transport: peer", peer, self.world_size)))

    def bytes_sent(self, peer: int) -> int:
        """Bytes of payload sent to `peer` so far."""
        return int(self._core.bytes_sent(rank_of("bytes_sent: peer", peer, self.world_size)))

    def seconds_waiting(self) -> float:
        """Seconds that collectives spent waiting for peers so far."""
        return float(self._core.seconds_waiting())

    def __repr__(self) -> str:
        return f"Communicator(rank={self.rank}, world_size={self.world_size}, hosts={len(set(self.host_indices))})"

    # --- schedules ---
    def _program(self, schedule: Schedule) -> int:
        key = (schedule.collective, schedule.name, schedule.root, schedule.fingerprint)
        if key not in self._programs:
            if schedule.world_size != self.world_size:
                raise InvalidArgument(
                    f"schedule [{schedule.name}] is for {schedule.world_size} ranks, "
                    f"the communicator has {self.world_size}"
                )
            prove(schedule)
            self._programs[key] = self._core.add_program(programs.bind(schedule, self.rank))
            self._algorithms[self._programs[key]] = schedule.collective, schedule.name
        return self._programs[key]

    def _choose(self, collective: str, root: int | None, nbytes: int) -> int:
        code, where = _C.COLLECTIVES[collective], -1 if root is None else root
        found = self._core.choose(code, where, nbytes)
        if found >= 0:
            return int(found)
        entries = []
        for max_nbytes, name, params in programs.choices(self._table, collective, self._core.host_indices):
            schedule = build(collective, name, self.world_size, root, **params)
            entries.append((max_nbytes, self._program(schedule)))
        self._core.set_choice(code, where, entries)
        return int(self._core.choose(code, where, nbytes))

    def _choose_on_device(self, collective: str, root: int | None, nbytes: int) -> int:
        key = (collective, root)
        if key not in self._device_choices:
            self._device_choices[key] = [
                (limit, self._program(build(collective, name, self.world_size, root, **params)))
                for limit, name, params in self._device_table[collective]
            ]
        return next(program for limit, program in self._device_choices[key] if nbytes <= limit)

    def use_table(self, table: dict[str, Any] | None, *, on_device: bool = False) -> None:
        """Chooses algorithms by `table` (None: the default ones) from now on, of operations over the host's transports
        or of those on devices; the same on all ranks."""
        if on_device:
            self._device_table = {**tune.device_table(self.world_size), **_checked(table)}
            self._device_choices.clear()
            return
        self._table = _checked(table)
        for collective in _C.COLLECTIVES:
            for root in (-1, *range(self.world_size)):
                self._core.set_choice(_C.COLLECTIVES[collective], root, [])
        self._choose("all_reduce", None, 0)

    def use_cached_table(self) -> None:
        """Chooses as `paracomm tune` found best for this layout, if rank 0 has cached such a table. Collective.

        Raises InvalidArgument on every rank if rank 0 has a file there that it cannot use.
        """
        path = tune.cache_path(self.hosts[0], self.host_indices)
        table = read_for_all(self.rank, self.exchange, lambda: tune.load(path))
        if table is not None:
            self.use_table(table)

    def _select(
        self, collective: str, root: int | None, found: View | None, nbytes: int, algorithm: str | Schedule | None
    ) -> tuple[int, Lane | None]:
        """The program of a call whose array is `found`, and the lane of the device that it runs on, if it does."""
        lane = self._lane(found) if self._emulates or (found is not None and found.device != HOST) else None
        if algorithm is None:
            choose = self._choose if lane is None else self._choose_on_device
            return choose(collective, root, nbytes), lane
        if isinstance(algorithm, str):
            params = {"hosts": self.host_indices} if algorithm in ("hierarchical", "ordered") else {}
            algorithm = build(collective, algorithm, self.world_size, root, **params)
        if not isinstance(algorithm, Schedule) or not hasattr(algorithm, "collective"):
            raise InvalidArgument(
                f"{collective}: algorithm must be a name or a Schedule, got a {type(algorithm).__name__}"
            )
        if algorithm.collective != collective:
            raise InvalidArgument(f"{collective} was given a schedule of {algorithm.collective}")
        return self._program(algorithm), lane

    def _run(
        self, chosen: tuple[int, Lane | None], source: int, target: int, count: int, dtype: int, op: int,
        timeout_s: float | None, async_op: bool, result: Any, keep: tuple[Any, ...],
        finish: Callable[[], None] | None = None, blocks: Sequence[int] = (), output_blocks: Sequence[int] = (),
        largest_block: int = 0, later: bool = False,
    ) -> Any:  # fmt: skip
        """Runs an operation, or launches it. `later`: nobody begins it before it is waited for, or `kick` is called."""
        program, lane = chosen
        async_op = flag("async_op", async_op)
        limit = seconds("timeout_s", timeout_s)
        arguments = (program, source, target, count, dtype, op, limit, list(blocks), list(output_blocks), largest_block)
        label: spans.Label | None = spans.EARLIER
        if record.current is not None:
            operation, algorithm = self._algorithms[program]
            label = self._label(operation, (count or sum(blocks)) * _C.item_size(dtype), algorithm=algorithm)
        if lane is not None:
            return lane.device.run(lane, arguments, async_op, result, keep, finish, label)
        keep = (*keep, *held(keep))  # also while this waits: another thread may take the memory away
        if async_op:
            return self._launch(self._core.submit(*arguments, finish, not later), result, keep, label)
        if label is None or label is spans.EARLIER:
            self._core.run(*arguments)
        else:
            with spans.runs(label):
                self._core.run(*arguments)
        if finish is not None:
            finish()
        return result

    def _on_host(
        self, collective: str, source: np.ndarray, target: np.ndarray, op: str = "sum", blocks: Sequence[int] = ()
    ) -> np.ndarray:
        """A collective on what this library tells itself, over the host's transports wherever the callers' arrays are;
        returns target."""
        v, w = view(source), view(target)
        chosen = self._choose(collective, None, w.nbytes), None
        self._run(chosen, v.address, w.address, w.count, v.dtype, _C.REDUCE_OPS[op], None, False, target, (),
                  blocks=blocks)  # fmt: skip
        return target

    def _label(self, operation: str, nbytes: int, **details: Any) -> spans.Label | None:
        """None: one rank by itself, which nothing is shown of."""
        if self.world_size == 1:
            return None
        return {"axis": self.name or spans.WORLD, "operation": operation, "bytes": nbytes, **details}

    def _launch(
        self, core: _C.Work, result: Any, keep: tuple[Any, ...], label: spans.Label | None, ends: bool = True
    ) -> Work:
        # A Work may be dropped before it is complete (DistributedDataParallel.join does so); the core then still has
        # the memory in use.
        if len(self._in_flight) >= self._sweep_at:
            self._in_flight = [entry for entry in self._in_flight if not entry[0].done()]
            self._sweep_at = max(16, 2 * len(self._in_flight))
        kept = list(keep)  # emptied by whoever waits
        self._in_flight.append((core, kept, ends))
        if label is not None and label is not spans.EARLIER:
            spans.launched(core, label)
        return Work(core, result, kept, label)

    # --- memory of calls ---
    def _readable(self, what: str, x: Any, op: str | None = None, staged: bool = False) -> tuple[Any, View]:
        """Contiguous memory with x's elements, which operations can read.

        Args:
            x: an array or Several.
            op: of a reduction.
            staged: on the host.
        """
        whole = x if isinstance(x, Several) else native(x)
        source = known(contiguous(whole.packed() if isinstance(whole, Several) else whole))
        v = view(source)
        if op is not None:
            need_reducible(what, whole, op)
        if v.device != HOST and (staged or self._stages(v)):
            source = host_copy(source)
            v = view(source)
        return source, v

    def _writable(
        self, what: str, x: Any, staged: bool = False, filled: bool = False
    ) -> tuple[Any, View, Callable[[], None] | None]:
        """Contiguous memory for x's elements, which operations can write, and what puts them into x in the end.

        Args:
            x: an array or Several.
            filled: the memory holds x's elements at the start.
        """
        whole = x
        if isinstance(x, Several) and (joined := x.joined()) is not None:
            whole = joined
        parts = whole.arrays if isinstance(whole, Several) else [native(whole)]
        views = [writable_view(what, part) for part in parts]
        on_host = views[0].device == HOST
        staged = not on_host and (staged or self._stages(views[0]))
        if len(parts) == 1 and views[0].contiguous and not staged:
            return known(parts[0]), views[0], None
        if filled:
            target = contiguous(parts[0]) if len(parts) == 1 else Several(parts).packed()
            target = host_copy(target) if staged else target
        else:
            shape = parts[0].shape if len(parts) == 1 else (sum(math.prod(part.shape) for part in parts),)
            target = host_room(parts[0], shape) if staged else empty_like(parts[0], shape)
        w = view(known(target))
        if on_host and not any(map(is_lazy, parts)):
            offsets = itertools.accumulate((v.nbytes for v in views), initial=0)
            rows = [(o, known(part), 0, v.count) for o, part, v in zip(offsets, parts, views, strict=False)]
            return target, w, _C.Unpack(w.address, rows)
        return target, w, lambda: unpack(target, parts)

    def _stages(self, found: View) -> bool:
        """Whether an array on a GPU has to be copied to the host first."""
        if self._mode == "emulated":
            raise InvalidArgument(
                f"the array is on {name_of(found.device)}, and PARACOMM_DEVICE is 'emulated': the emulated "
                "GPUs' memory is the CPU's"
            )
        return self.use_device(found.device) is None

    def use_device(self, index: int | None = None) -> Device | None:
        """Makes the device on which operations on GPUs' memory run. Collective. The first such operation does it
        otherwise, and a second call does nothing.

        Args:
            index: of the GPU, as CUDA counts in this process; None: the current one of torch or CuPy.

        Returns:
            None where arrays on GPUs are staged through host memory, and those of emulated ones are the host's: between
            hosts, and if PARACOMM_DEVICE is "host".

        Raises:
            InvalidArgument: on every rank: one of them has no usable GPU or cannot map another one's memory; it says
                why.
        """
        index = None if index is None else whole("use_device: index", index, 0, 2**15)
        if self.device is None and self._mode != "host" and len(set(self.host_indices)) == 1:
            if self._emulates:
                kind, index = "emulated", device.emulated_index(self._core)
            else:
                kind, index = "cuda", device.current_index() if index is None else index
            self.device = device.make(self._core, self.exchange, kind, index)
        return self.device

    def _lane(self, found: View | None) -> Lane:
        used = self.device or self.use_device(None if found is None or found.device == HOST else found.device)
        assert used is not None  # or `found` had been staged
        return used.lane(found)

    # --- collectives ---
    def all_reduce(
        self, x: Any, op: str = "sum", *, out: Any = None, async_op: bool = False,
        algorithm: str | Schedule | None = None, timeout_s: float | None = None,
    ) -> Any:  # fmt: skip
        """The reduction of every rank's x, on every rank: into `out` (shape and dtype of x) or, without it, into x."""
        plain = async_op is False and algorithm is None and timeout_s is None and record.current is None
        if plain and self.fast_all_reduce(x, op, out):
            return x if out is None else out
        code = op_code(op)
        source, v, target, w, finish = self._reduced_into("all_reduce", x, op, out)
        program = self._select("all_reduce", None, v, v.nbytes, algorithm)
        return self._run(program, v.address, w.address, v.count, v.dtype, code, timeout_s, async_op,
                         x if out is None else out, (source, target, x, out), finish)  # fmt: skip

    def all_reduce_later(self, x: Any, op: str, *, timeout_s: float | None = None) -> Work:
        """all_reduce(x, op, async_op=True) for who waits for many at once: this rank begins it when somebody waits for
        it or for a later operation, or calls `kick`."""
        code = op_code(op)
        source, v, _, _, finish = self._reduced_into("all_reduce", x, op, None)
        program = self._select("all_reduce", None, v, v.nbytes, None)
        work: Work = self._run(program, v.address, v.address, v.count, v.dtype, code, timeout_s, True, x, (source, x),
                               finish, later=True)  # fmt: skip
        return work

    def kick(self) -> None:
        """Has a thread of the core begin what is to be done later. Does not wait."""
        self._core.kick()

    def _reduced_into(self, what: str, x: Any, op: str, out: Any) -> tuple[Any, View, Any, View, Any]:
        """Input and output of a reduction of x: into `out` or, without it, into x."""
        if out is None:
            x = x if isinstance(x, Several) else native(x)
            target, w, finish = self._writable(what, x, filled=True)
            need_reducible(what, x, op)
            return target, w, target, w, finish
        source, v = self._readable(what, x, op)
        target, w, finish = self._writable(what, out)
        need_same(what, v, w, v.count)
        source, v = apart(source, v, w, 0)
        return source, v, target, w, finish

    def reduce(
        self, x: Any, root: int = 0, op: str = "sum", *, out: Any = None, async_op: bool = False,
        algorithm: str | Schedule | None = None, timeout_s: float | None = None,
    ) -> Any:  # fmt: skip
        """The reduction of every rank's x on the root: into `out` or, without it, the root's x. Others keep theirs."""
        root, code = rank_of("reduce: root", root, self.world_size), op_code(op)
        if self.rank != root:
            source, v = self._readable("reduce", x, op)
            program = self._select("reduce", root, v, v.nbytes, algorithm)
            return self._run(program, v.address, 0, v.count, v.dtype, code, timeout_s, async_op, x, (source, x))
        source, v, target, w, finish = self._reduced_into("reduce", x, op, out)
        program = self._select("reduce", root, v, v.nbytes, algorithm)
        return self._run(program, v.address, w.address, v.count, v.dtype, code, timeout_s, async_op,
                         x if out is None else out, (source, target, x, out), finish)  # fmt: skip

    def broadcast(
        self, x: Any, root: int = 0, *, async_op: bool = False, algorithm: str | Schedule | None = None,
        timeout_s: float | None = None,
    ) -> Any:  # fmt: skip
        """Overwrites x on every rank with the root's."""
        root = rank_of("broadcast: root", root, self.world_size)
        finish = None
        if self.rank == root:
            source, v = self._readable("broadcast", x)
        else:
            source, v, finish = self._writable("broadcast", x)
        program = self._select("broadcast", root, v, v.nbytes, algorithm)
        return self._run(program, v.address, v.address, v.count, v.dtype, _SUM, timeout_s, async_op, x, (source, x),
                         finish)  # fmt: skip

    def all_gather(
        self, x: Any, *, out: Any = None, async_op: bool = False, algorithm: str | Schedule | None = None,
        timeout_s: float | None = None,
    ) -> Any:  # fmt: skip
        """Every rank's x, stacked: [world_size, *x.shape] (or `out`, of as many elements; x may be its own block)."""
        source, v = self._readable("all_gather", x)
        if out is None:
            out = self._stack_of(x)
        target, w, finish = self._writable("all_gather", out)
        need_same("all_gather", v, w, v.count * self.world_size)
        source, v = apart(source, v, w, self.rank * v.nbytes)
        program = self._select("all_gather", None, v, w.nbytes, algorithm)
        return self._run(program, v.address, w.address, w.count, v.dtype, _SUM, timeout_s, async_op, out,
                         (source, target, x, out), finish)  # fmt: skip

    def _stack_of(self, x: Any) -> Any:
        whole = native(x)
        return empty_like(whole, (self.world_size, *whole.shape))

    def all_gather_v(
        self, x: Any, *, out: Any = None, rows: Sequence[int] | None = None, async_op: bool = False,
        algorithm: str | Schedule | None = None, timeout_s: float | None = None,
    ) -> Any:  # fmt: skip
        """Every rank's x, one after the other along dimension 0; the lengths may differ.

        Args:
            rows: every rank's x.shape[0]; None: they are exchanged first.
        """
        what = "all_gather_v"
        seconds("timeout_s", timeout_s)
        source, v = self._readable(what, x)
        whole_x = native(x)
        need_rows(what, whole_x.shape)
        mine, width = int(whole_x.shape[0]), math.prod(source.shape[1:])
        made = self._made(what, v, out)
        if rows is None:
            rows = self._rows(what, mine, None if made is None or width == 0 else made[1].count // width)
        rows = block_rows(f"{what}: rows", rows, self.world_size)
        if rows[self.rank] != mine:
            raise InvalidArgument(f"{what}: rows {rows} do not fit {tuple(whole_x.shape)} on rank {self.rank}")
        if made is None:
            out = empty_like(whole_x, (sum(rows), *whole_x.shape[1:]))
            made = self._writable(what, out)
        target, w, finish = made
        need_same(what, v, w, sum(rows) * width)
        blocks = [row * width for row in rows]
        source, v = apart(source, v, w, sum(blocks[: self.rank]) * int(_C.item_size(v.dtype)))
        program = self._select("all_gather", None, v, w.nbytes, algorithm)
        return self._run(program, v.address, w.address, w.count, v.dtype, _SUM, timeout_s, async_op, out,
                         (source, target, x, out), finish, blocks=blocks)  # fmt: skip

    def _made(self, what: str, v: View, out: Any) -> tuple[Any, View, Any] | None:
        """The caller's output, whose number of rows is looked at later; None: it is to be made here."""
        if out is None:
            return None
        made = self._writable(what, out)
        need_same(what, v, made[1], made[1].count)
        return made

    def reduce_scatter(
        self, x: Any, op: str = "sum", *, out: Any = None, async_op: bool = False,
        algorithm: str | Schedule | None = None, timeout_s: float | None = None,
    ) -> Any:  # fmt: skip
        """This rank's block of the reduction of every rank's x, which is cut into world_size equal blocks along
        dimension 0: [x.shape[0] / world_size, ...] (or `out`, of as many elements; it may be x's own block). x is kept
        otherwise."""
        code = op_code(op)
        source, v = self._readable("reduce_scatter", x, op)
        need_blocks("reduce_scatter", _shape_of(x), self.world_size)
        if out is None:
            whole_x = native(x)
            out = empty_like(whole_x, block_shape("reduce_scatter", whole_x.shape, self.world_size))
        target, w, finish = self._writable("reduce_scatter", out)
        need_same("reduce_scatter", v, w, v.count // self.world_size)
        source, v = apart(source, v, w, -self.rank * w.nbytes)
        program = self._select("reduce_scatter", None, v, v.nbytes, algorithm)
        return self._run(program, v.address, w.address, v.count, v.dtype, code, timeout_s, async_op, out,
                         (source, target, x, out), finish)  # fmt: skip

    def reduce_scatter_v(
        self, x: Any, rows: Sequence[int], op: str = "sum", *, out: Any = None, async_op: bool = False,
        algorithm: str | Schedule | None = None, timeout_s: float | None = None,
    ) -> Any:  # fmt: skip
        """Like reduce_scatter with blocks of rows[r] rows for rank r."""
        what, code = "reduce_scatter_v", op_code(op)
        source, v = self._readable(what, x, op)
        shape = _shape_of(x)
        need_rows(what, shape)
        rows, width = block_rows(f"{what}: rows", rows, self.world_size), math.prod(source.shape[1:])
        if sum(rows) != shape[0]:
            raise InvalidArgument(f"{what}: rows {rows} do not fit x of shape {shape}")
        if out is None:
            out = empty_like(native(x), (rows[self.rank], *shape[1:]))
        target, w, finish = self._writable(what, out)
        need_same(what, v, w, rows[self.rank] * width)
        blocks = [row * width for row in rows]
        source, v = apart(source, v, w, -sum(blocks[: self.rank]) * int(_C.item_size(v.dtype)))
        program = self._select("reduce_scatter", None, v, v.nbytes, algorithm)
        return self._run(program, v.address, w.address, v.count, v.dtype, code, timeout_s, async_op, out,
                         (source, target, x, out), finish, blocks=blocks)  # fmt: skip

    def all_to_all(
        self, x: Any, *, out: Any = None, async_op: bool = False, algorithm: str | Schedule | None = None,
        timeout_s: float | None = None,
    ) -> Any:  # fmt: skip
        """x is cut into world_size equal blocks along dimension 0 and block r goes to rank r; the result (shape of x,
        or `out`) holds what came from rank r in block r."""
        source, v = self._readable("all_to_all", x)
        need_blocks("all_to_all", _shape_of(x), self.world_size)
        if out is None:
            whole_x = native(x)
            out = empty_like(whole_x, whole_x.shape)
        target, w, finish = self._writable("all_to_all", out)
        need_same("all_to_all", v, w, v.count)
        source, v = apart(source, v, w)
        program = self._select("all_to_all", None, v, v.nbytes, algorithm)
        return self._run(program, v.address, w.address, v.count, v.dtype, _SUM, timeout_s, async_op, out,
                         (source, target, x, out), finish)  # fmt: skip

    def all_to_all_v(
        self, x: Any, send_rows: Sequence[int], recv_rows: Sequence[int] | None = None, *, out: Any = None,
        async_op: bool = False, algorithm: str | Schedule | None = None, timeout_s: float | None = None,
    ) -> Any:  # fmt: skip
        """Like all_to_all with blocks of send_rows[r] rows for rank r and recv_rows[r] rows from it (None: they are
        exchanged first)."""
        what = "all_to_all_v"
        seconds("timeout_s", timeout_s)
        source, v = self._readable(what, x)
        shape = _shape_of(x)
        need_rows(what, shape)
        send_rows, width = block_rows(f"{what}: send_rows", send_rows, self.world_size), math.prod(source.shape[1:])
        if sum(send_rows) != shape[0]:
            raise InvalidArgument(f"{what}: send_rows {send_rows} do not fit x of shape {shape}")
        made = self._made(what, v, out)
        exchanged = recv_rows is None
        if recv_rows is None:
            numbers = np.array(send_rows, np.int64)
            recv_rows = self._on_host("all_to_all", numbers, np.empty_like(numbers)).tolist()
        recv_rows = block_rows(f"{what}: recv_rows", recv_rows, self.world_size)
        if not exchanged and made is not None:
            need_same(what, v, made[1], sum(recv_rows) * width)
        fits = made is None or made[1].count == sum(recv_rows) * width
        # All ranks cut into as many slices as the largest block of any rank needs, and give up where one cannot go on.
        agreed = np.array([max([*send_rows, *recv_rows], default=0) * width, 0 if fits else self.rank + 1], np.int64)
        largest, misfit = self._on_host("all_reduce", agreed, agreed, "max").tolist()
        if misfit:
            raise InvalidArgument(f"{what}: on rank {misfit - 1} the rows that come do not fit out")
        if made is None:
            out = empty_like(native(x), (sum(recv_rows), *shape[1:]))
            made = self._writable(what, out)
        target, w, finish = made
        need_same(what, v, w, sum(recv_rows) * width)
        source, v = apart(source, v, w)
        program = self._select("all_to_all", None, v, largest * self.world_size, algorithm)
        return self._run(program, v.address, w.address, 0, v.dtype, _SUM, timeout_s, async_op, out,
                         (source, target, x, out), finish, blocks=[r * width for r in send_rows],
                         output_blocks=[r * width for r in recv_rows], largest_block=largest)  # fmt: skip

    def gather(
        self, x: Any, root: int = 0, *, out: Any = None, async_op: bool = False,
        algorithm: str | Schedule | None = None, timeout_s: float | None = None,
    ) -> Any:  # fmt: skip
        """Every rank's x, stacked on the root: [world_size, *x.shape] (or `out`). None elsewhere."""
        root = rank_of("gather: root", root, self.world_size)
        source, v = self._readable("gather", x)
        if self.rank != root:
            program = self._select("gather", root, v, v.nbytes * self.world_size, algorithm)
            return self._run(program, v.address, 0, v.count * self.world_size, v.dtype, _SUM, timeout_s, async_op, None,
                             (source, x))  # fmt: skip
        if out is None:
            out = self._stack_of(x)
        target, w, finish = self._writable("gather", out)
        need_same("gather", v, w, v.count * self.world_size)
        source, v = apart(source, v, w)
        program = self._select("gather", root, v, v.nbytes * self.world_size, algorithm)
        return self._run(program, v.address, w.address, w.count, v.dtype, _SUM, timeout_s, async_op, out,
                         (source, target, x, out), finish)  # fmt: skip

    def scatter(
        self, x: Any = None, root: int = 0, *, out: Any = None, async_op: bool = False,
        algorithm: str | Schedule | None = None, timeout_s: float | None = None,
    ) -> Any:  # fmt: skip
        """This rank's block of the root's x, which is cut into world_size equal blocks along dimension 0, into `out`.
        x counts on the root only; `out` may be left out there only."""
        root = rank_of("scatter: root", root, self.world_size)
        if self.rank == root and x is None:
            raise InvalidArgument("scatter: the root needs x")
        if self.rank == root and out is None:
            whole_x = native(x)
            out = empty_like(whole_x, block_shape("scatter", whole_x.shape, self.world_size))
        if out is None:
            raise InvalidArgument(f"scatter: rank {self.rank} is not the root {root} and needs out")
        target, w, finish = self._writable("scatter", out)
        source, address = None, 0
        if self.rank == root:
            source, v = self._readable("scatter", x)
            need_blocks("scatter", _shape_of(x), self.world_size)
            need_same("scatter", v, w, v.count // self.world_size)
            source, v = apart(source, v, w)
            address = v.address
        program = self._select("scatter", root, w, w.nbytes * self.world_size, algorithm)
        return self._run(program, address, w.address, w.count * self.world_size, w.dtype, _SUM, timeout_s, async_op,
                         out, (source, target, out), finish)  # fmt: skip

    def barrier(
        self, *, async_op: bool = False, algorithm: str | Schedule | None = None, timeout_s: float | None = None
    ) -> Any:
        """Returns when every rank has called it."""
        plain = async_op is False and algorithm is None and record.current is None and not self._emulates
        if plain and self._core.barrier(seconds("timeout_s", timeout_s)):
            return None
        program = self._select("barrier", None, None, 0, algorithm)
        return self._run(program, 0, 0, 0, _C.DTYPES["uint8"], _SUM, timeout_s, async_op, None, ())

    # --- point to point ---
    def send(self, x: Any, peer: int, *, tag: int = 0, async_op: bool = False, timeout_s: float | None = None) -> Any:
        """Sends x to `peer`, which calls recv. Messages of a pair and tag arrive in order; everything posted moves at
        once. What is on a GPU is staged through host memory, here and in recv: the host waits for the copy."""
        peer, tag, limit = self._peer("send to", peer), _tag("send", tag), seconds("timeout_s", timeout_s)
        async_op = flag("async_op", async_op)
        source, v = self._readable("send", x, staged=True)
        label = spans.EARLIER if record.current is None else self._label("send", v.nbytes, peer=peer)
        core = self._core.send(v.address, v.nbytes, v.dtype, peer, limit, tag)
        work = self._launch(core, x, (source, x, *held([source])), label)
        return work if async_op else work.wait()

    def recv(
        self, x: Any, peer: int | None, *, tag: int = 0, async_op: bool = False, timeout_s: float | None = None
    ) -> Any:
        """Overwrites x with what `peer` (None: whichever rank is first, `Work.source` says which) sends under this tag;
        count and dtype must be the sender's."""
        source = _C.ANY_PEER if peer is None else self._peer("recv from", peer)
        tag, limit, async_op = _tag("recv", tag), seconds("timeout_s", timeout_s), flag("async_op", async_op)
        target, w, finish = self._writable("recv", x, staged=True)
        label = spans.EARLIER if record.current is None else self._label("recv", w.nbytes, peer=peer)
        core = self._core.recv(w.address, w.nbytes, w.dtype, source, limit, tag, finish)
        work = self._launch(core, x, (target, x, *held([target, x])), label, ends=False)
        return work if async_op else work.wait()

    def _peer(self, what: str, peer: Any) -> int:
        try:
            number = rank_of(what, peer, self.world_size)
        except InvalidArgument:
            number = self.rank
        if number == self.rank:
            raise InvalidArgument(f"{what} rank {peer!r} on rank {self.rank} of {self.world_size}")
        return number

    # --- memory, groups, ends ---
    def empty(self, shape: int | Sequence[int], dtype: Any = None, *, like: str | None = None) -> Any:
        """A zeroed array that local peers have mapped, so that collectives on it copy nothing more than they must.

        Args:
            dtype: torch's or NumPy's; None: float32.
            like: "torch" or "numpy"; None: torch if it is loaded (and dtype is not NumPy's).
        """
        return arena_array(shape, dtype, like)

    def exchange(self, blob: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order."""
        if not isinstance(blob, bytes | bytearray | memoryview):
            raise InvalidArgument(f"exchange: expected bytes, got {type(blob).__name__}")
        mine = np.frombuffer(blob, np.uint8)
        rows = self._rows("exchange", len(mine))
        gathered = self._on_host("all_gather", mine, np.empty(sum(rows), np.uint8), blocks=rows)
        ends = itertools.accumulate(rows, initial=0)
        return [gathered[lo:hi].tobytes() for lo, hi in itertools.pairwise(ends)]

    def _rows(self, what: str, mine: int, room: int | None = None) -> list[int]:
        """Every rank's rows. Raises InvalidArgument on every rank where those of all do not fit the `room` of one."""
        own = np.array([mine, -1 if room is None else room], np.int64)
        pairs = self._on_host("all_gather", own, np.empty((self.world_size, 2), np.int64)).tolist()
        total = sum(row for row, _ in pairs)
        for rank, (_, rows) in enumerate(pairs):
            if rows not in (-1, total):
                raise InvalidArgument(f"{what}: out has room for {rows} rows on rank {rank}, all ranks have {total}")
        return [row for row, _ in pairs]

    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """A communicator of the ranks that give the same color, by (key, rank); None for color None. Collective."""
        from paracomm.comm.group import connect

        color = None if color is None else whole("split: color", color, 0, 2**63 - 1)
        mine = np.array([-1 if color is None else color, whole("split: key", key, -(2**63), 2**63 - 1)], np.int64)
        everyone = self._on_host("all_gather", mine, np.empty((self.world_size, 2), np.int64)).tolist()
        if color is None:
            self.exchange(b"")
            self.exchange(b"")
            return None
        members = sorted((k, r) for r, (c, k) in enumerate(everyone) if c == color)
        ranks = [r for _, r in members]

        def exchange(blob: bytes) -> list[bytes]:
            everybodys = self.exchange(blob)
            return [everybodys[r] for r in ranks]

        transport, interface, master_address, host_id, connect_timeout_s, tuning = self._settings
        part = connect(
            ranks.index(self.rank), len(ranks), exchange, transport=transport, timeout_s=self._core.timeout_s,
            connect_timeout_s=connect_timeout_s, interface=interface, master_address=master_address, host_id=host_id,
            **tuning,
        )  # fmt: skip
        if part.world_size == self.world_size:
            part.name = self.name
        return part

    def check(self) -> None:
        """Raises what the communicator has failed with, here or on another rank; returns while it is well."""
        self._core.check()

    def abort(self, why: str = "abort() was called") -> None:
        """Gives up on every rank: whoever waits, here and elsewhere, raises Error."""
        self._core.abort(f"rank {self.rank}: {why}")

    def close(self) -> None:
        """Leaves. Peers that still need this rank raise PeerLost. Calling it again does nothing.

        What was launched before is completed first, if the others do their part within DRAIN_S seconds; receives, and
        what is late, raise Error.
        """
        self._drain()
        self._core.close()
        self._in_flight.clear()
        if self.device is not None:
            self.device.forget()
        _open.discard(self)

    def _drain(self) -> None:
        end = time.monotonic() + DRAIN_S
        pending = [core for core, _, ends in self._in_flight if ends and not core.done()]
        try:
            self._core.kick()
        except Error:  # a forked child, which has nothing under way
            return
        while pending and time.monotonic() < end:
            time.sleep(0.0002)
            pending = [core for core in pending if not core.done()]

    def __deepcopy__(self, memo: Any) -> Communicator:
        """Itself: a copy of what talks to these ranks talks to them, too."""
        return self

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- measuring ---
    def native_time_all_reduce(
        self, nbytes: int, iterations: int, arena: bool = False, algorithm: str | None = None
    ) -> list[float]:
        """Seconds of each of `iterations` in-place float32 sums of nbytes, timed inside the core; collective."""
        nbytes, iterations = whole("nbytes", nbytes, 0, MOST_ELEMENTS), whole("iterations", iterations, 0, 2**31 - 1)
        arena = flag("arena", arena)
        program, _ = self._select("all_reduce", None, None, nbytes, algorithm)
        barrier = self._choose("barrier", None, 0)
        return list(self._core.time_all_reduce(program, barrier, max(1, nbytes // 4), iterations, arena))


def _checked(table: dict[str, Any] | None) -> dict[str, Any]:
    """The table, {} for None. Raises InvalidArgument for what is none."""
    if table is None:
        return {}
    tune.check(table)
    return table


def _never(x: Any, op: str, out: Any) -> None:
    """In place of the core's fast_all_reduce where it can do nothing."""


def _shape_of(x: Any) -> tuple[int, ...]:
    return x.shape if isinstance(x, Several) else tuple(native(x).shape)


def _tag(what: str, tag: Any) -> int:
    return whole(f"{what}: tag", tag, -(2**31), 2**31 - 1)
