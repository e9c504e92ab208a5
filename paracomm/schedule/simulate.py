"""Replay of a schedule on a described machine, in the alpha-beta-gamma model.

A message of b bytes takes alpha + beta*b seconds and keeps its sender's outgoing and its receiver's incoming port busy
for that long; between hosts it may also have to share the hosts' ports. Reducing or copying b bytes inside a rank takes
gamma*b of that rank's time. Messages start in the order of the schedule, as soon as their data is there, their target
is free and the ports are.

A batch of operations (one call of a verb) that uses every port at most once and has no conflict inside is one step of
array arithmetic, and batches are consumed while the author writes them: rings of thousands of ranks need no list.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidArgument
from .registry import get
from .schedule import FIRST_SCRATCH, REDUCE, IntArray, Schedule

Floats = NDArray[np.float64]
Index = NDArray[np.intp]
SMALL_BATCH = 6  # below this, plain arithmetic is faster than arrays


class Link(NamedTuple):
    """What a message costs: alpha_s seconds, and beta_s seconds a byte."""

    alpha_s: float
    beta_s: float


@dataclass(frozen=True)
class Topology:
    """Where ranks are and what lies between them.

    Attributes:
        hosts: host number of every rank.
        inside: link between two ranks of one host.
        between: link between two hosts, unless `links` has another for the pair (source host, target host).
        shared_ports: all messages that leave (enter) a host pass its one outgoing (incoming) port, at beta_s a byte.
        gamma_s: seconds to reduce or copy one byte, one number or one a rank.
    """

    hosts: tuple[int, ...]
    inside: Link
    between: Link
    gamma_s: float | tuple[float, ...] = 0.0
    shared_ports: bool = True
    links: dict[tuple[int, int], Link] = field(default_factory=dict)

    @classmethod
    def flat(cls, world_size: int, alpha_s: float, beta_s: float, gamma_s: float = 0.0) -> Topology:
        """Every two ranks are joined by an equal link of their own."""
        link = Link(alpha_s, beta_s)
        return cls((0,) * world_size, link, link, gamma_s)

    @property
    def world_size(self) -> int:
        return len(self.hosts)


@dataclass(frozen=True)
class Simulation:
    """What a replay showed.

    Attributes:
        time_s: when the last operation ends.
        busy_s: [world_size] seconds in which each rank's outgoing port was busy.
        link_bytes: bytes that went from one rank to another, where any did.
        host_bytes: the same between hosts.
    """

    time_s: float
    busy_s: Floats
    link_bytes: dict[tuple[int, int], float]
    host_bytes: dict[tuple[int, int], float]


def simulate(schedule: Schedule, nbytes: float, topology: Topology) -> Simulation:
    """Replay a schedule.

    Args:
        nbytes: bytes of the data buffer (of one rank's input for all_to_all).

    Raises:
        InvalidArgument: the topology is of another world size.
    """
    replay = _Replay(schedule.world_size, schedule.chunks, _chunk_bytes(schedule, nbytes), topology)
    for batch in schedule.batches:
        replay.consume(batch)
    return replay.result()


def simulate_algorithm(
    collective: str, name: str, nbytes: float, topology: Topology, root: int | None = None, **params: Any
) -> Simulation:
    """Replay an algorithm while it is being written, without keeping its operations."""
    stream = get(collective, name).write(_Stream.on(nbytes, topology), topology.world_size, root, **params)
    return stream.replay.result()


def _chunk_bytes(schedule: Schedule, nbytes: float) -> float:
    return 0.0 if schedule.collective == "barrier" else nbytes / schedule.chunks


class _Stream(Schedule):
    """Hands operations to the replay instead of keeping them."""

    replay: _Replay

    @classmethod
    def on(cls, nbytes: float, topology: Topology) -> Any:
        def make(*header: Any) -> _Stream:
            stream = cls(*header)
            size = _chunk_bytes(stream, nbytes)
            stream.replay = _Replay(stream.world_size, stream.chunks, size, topology)
            return stream

        return make

    def _emit(self, batch: IntArray) -> None:
        self.replay.consume(batch)


class _Replay:
    def __init__(self, world_size: int, chunks: int, chunk_bytes: float, topology: Topology) -> None:
        if topology.world_size != world_size:
            raise InvalidArgument(f"the topology has {topology.world_size} ranks, the schedule {world_size}")
        self.n, self.chunks, self.chunk_bytes, self.topology = world_size, chunks, chunk_bytes, topology
        self.host = np.array(topology.hosts)
        self.single_host = bool((self.host == self.host[0]).all())
        self.gamma: Floats = np.broadcast_to(np.asarray(topology.gamma_s, np.float64), (world_size,))
        self.written: dict[int, Floats] = {}  # buffer -> [rank * width + chunk]: when it was last written
        self.free: dict[int, Floats] = {}  # when it may be written again: it is written, and all readers are done
        self.width: dict[int, int] = {}
        hosts = int(self.host.max()) + 1
        self.out, self.into, self.cpu = np.zeros(world_size), np.zeros(world_size), np.zeros(world_size)
        self.host_out, self.host_in = np.zeros(hosts), np.zeros(hosts)
        self.busy = np.zeros(world_size)
        self.sent: list[tuple[Index, float]] = []  # messages of equal size: source * n + target, bytes
        self.sent_one: dict[int, float] = {}
        self.last_sr, self.last_dr, self.last_bytes = np.zeros(0, np.intp), np.zeros(0, np.intp), 0.0
        self.end = 0.0
        self.alphas, self.betas = self._links(hosts)

    def _links(self, hosts: int) -> tuple[Floats, Floats]:
        t = self.topology
        table = np.empty((hosts, hosts, 2))
        table[:] = t.between
        table[np.arange(hosts), np.arange(hosts)] = t.inside
        for pair, link in t.links.items():
            table[pair] = link
        return table[..., 0].ravel(), table[..., 1].ravel()

    def consume(self, batch: IntArray) -> None:
        columns = np.ascontiguousarray(batch.T, dtype=np.intp)
        kind, sr, sb, _, dr, db, _, span = columns
        uniform = len(batch) > SMALL_BATCH and all((column == column[0]).all() for column in (kind, sb, db, span))
        for buffer in (int(sb[0]), int(db[0])) if uniform else np.unique(columns[[2, 5]]).tolist():
            self._make_room(buffer, columns)
        if uniform and self._independent(columns):
            step = self._local if sr[0] == dr[0] else self._transfers
            step(int(kind[0]), sr, self._cells(columns[1:4], int(span[0])), int(sb[0]),
                 dr, self._cells(columns[4:7], int(span[0])), int(db[0]), int(span[0]))  # fmt: skip
        else:
            for op in batch.tolist():
                self._one(*op)

    def _make_room(self, buffer: int, columns: Index) -> None:
        _, _, _, sc, _, _, dc, span = columns
        need = int(max(sc.max(), dc.max()) + span.max()) if buffer >= FIRST_SCRATCH else self.chunks
        have = self.width.get(buffer, 0)
        if have < need:
            wide = max(need, 2 * have)
            for times in (self.written, self.free):
                grown = np.zeros((self.n, wide))
                if have:
                    grown[:, :have] = times[buffer].reshape(self.n, have)
                times[buffer] = grown.reshape(-1)
            self.width[buffer] = wide

    def _independent(self, columns: Index) -> bool:
        """Every port is used at most once, and no operation touches what another one writes."""
        _, sr, sb, sc, dr, db, dc, span = columns
        if np.bincount(sr, minlength=self.n).max() > 1 or np.bincount(dr, minlength=self.n).max() > 1:
            return False
        crossing = int(np.count_nonzero(sr != dr))
        if crossing == 0:
            return True
        if crossing < len(sr):
            return False
        if sb[0] == db[0]:
            read = np.full(self.n, -1 << 40)
            read[sr] = sc
            if (abs(read[dr] - dc) < span[0]).any():
                return False
        if self.single_host or not self.topology.shared_ports:
            return True
        a, b = self.host[sr], self.host[dr]
        away = a != b
        return not away.any() or bool(np.bincount(a[away]).max() <= 1 and np.bincount(b[away]).max() <= 1)

    def _cells(self, region: Index, span: int) -> Index:
        rank, buffer, chunk = region
        first: Index = rank * self.width[int(buffer[0])] + chunk
        return first if span == 1 else (first[:, None] + np.arange(span)).ravel()

    def _local(self, kind: int, sr: Index, src: Index, sb: int, dr: Index, dst: Index, db: int, span: int) -> None:
        ready = np.maximum(self.written[sb].take(src), self.free[db].take(dst)).reshape(-1, span).max(axis=1)
        done = np.maximum(ready, self.cpu[dr]) + self.gamma[dr] * (span * self.chunk_bytes)
        self.cpu[dr] = done
        self._touch(sb, src, db, dst, np.repeat(done, span))

    def _touch(self, sb: int, src: Index, db: int, dst: Index, done: Floats, read: Floats | None = None) -> None:
        """Sources are read until `read` (done if not given), targets are written by `done`."""
        free = self.free[sb]
        free[src] = np.maximum(free.take(src), done if read is None else read)
        self.written[db][dst] = done
        self.free[db][dst] = done
        self.end = max(self.end, float(done.max()))

    def _transfers(self, kind: int, sr: Index, src: Index, sb: int, dr: Index, dst: Index, db: int, span: int) -> None:
        nbytes = span * self.chunk_bytes
        start, free = self.written[sb].take(src), self.free[db].take(dst)
        if span > 1:
            start, free = start.reshape(-1, span).max(axis=1), free.reshape(-1, span).max(axis=1)
        start = np.maximum(np.maximum(start, self.out[sr]), self.into[dr])
        if kind != REDUCE:
            start = np.maximum(start, free)
        if self.single_host:
            cost: Any = self.alphas[0] + self.betas[0] * nbytes
        else:
            cost = self._between(sr, dr, start, nbytes)
        done = start + cost
        self.out[sr] = done
        self.into[dr] = done
        self._count(sr, dr, nbytes, cost)
        read = done if span == 1 else np.repeat(done, span)
        if kind == REDUCE:
            done = np.maximum(np.maximum(done, free), self.cpu[dr]) + self.gamma[dr] * nbytes
            self.cpu[dr] = done
        self._touch(sb, src, db, dst, done if span == 1 else np.repeat(done, span), read)

    def _between(self, sr: Index, dr: Index, start: Floats, nbytes: float) -> Floats:
        """The cost of each message; `start` is moved to when the hosts' ports are free."""
        a, b = self.host[sr], self.host[dr]
        pair = a * len(self.host_out) + b
        cost: Floats = self.alphas[pair] + self.betas[pair] * nbytes
        if self.topology.shared_ports:
            away = np.flatnonzero(a != b)
            out, into = a[away], b[away]
            start[away] = np.maximum(start[away], np.maximum(self.host_out[out], self.host_in[into]))
            passed = start[away] + self.betas[pair[away]] * nbytes
            self.host_out[out] = passed
            self.host_in[into] = passed
        return cost

    def _count(self, sr: Index, dr: Index, nbytes: float, cost: Any) -> None:
        self.busy[sr] += cost
        same = len(sr) == len(self.last_sr) and np.array_equal(sr, self.last_sr) and np.array_equal(dr, self.last_dr)
        if not same:
            self._flush()
            self.last_sr, self.last_dr = sr, dr
        self.last_bytes += nbytes

    def _flush(self) -> None:
        self.sent.append((self.last_sr * self.n + self.last_dr, self.last_bytes))
        self.last_bytes = 0.0

    def _one(self, kind: int, sr: int, sb: int, sc: int, dr: int, db: int, dc: int, span: int) -> None:
        nbytes = span * self.chunk_bytes
        src, dst = sr * self.width[sb] + sc, dr * self.width[db] + dc
        being_read = self.free[sb][src : src + span]
        ready = float(self.written[sb][src : src + span].max())
        free = float(self.free[db][dst : dst + span].max())
        if sr == dr:
            done = max(ready, free, float(self.cpu[dr])) + float(self.gamma[dr]) * nbytes
            self.cpu[dr] = done
        else:
            start = max(ready, float(self.out[sr]), float(self.into[dr]), 0.0 if kind == REDUCE else free)
            a, b = int(self.host[sr]), int(self.host[dr])
            pair = a * len(self.host_out) + b
            if a != b and self.topology.shared_ports:
                start = max(start, float(self.host_out[a]), float(self.host_in[b]))
                self.host_out[a] = self.host_in[b] = start + float(self.betas[pair]) * nbytes
            cost = float(self.alphas[pair] + self.betas[pair] * nbytes)
            done = start + cost
            self.out[sr] = self.into[dr] = done
            self.busy[sr] += cost
            self.sent_one[sr * self.n + dr] = self.sent_one.get(sr * self.n + dr, 0.0) + nbytes
            if kind == REDUCE:
                np.maximum(being_read, done, out=being_read)
                done = max(done, free, float(self.cpu[dr])) + float(self.gamma[dr]) * nbytes
                self.cpu[dr] = done
        if sr == dr or kind != REDUCE:
            np.maximum(being_read, done, out=being_read)
        self.written[db][dst : dst + span] = done
        self.free[db][dst : dst + span] = done
        self.end = max(self.end, done)

    def result(self) -> Simulation:
        self._flush()
        one = np.fromiter(self.sent_one, np.intp), np.fromiter(self.sent_one.values(), np.float64)
        keys = np.concatenate([one[0], *(keys for keys, _ in self.sent)])
        sizes = np.concatenate([one[1], *(np.full(len(keys), size) for keys, size in self.sent)])
        used, group = np.unique(keys, return_inverse=True)
        total = np.bincount(group, weights=sizes)
        link = {divmod(k, self.n): size for k, size in zip(used.tolist(), total.tolist(), strict=True) if size}
        between: dict[tuple[int, int], float] = {}
        for (a, b), nbytes in link.items():
            pair = (int(self.host[a]), int(self.host[b]))
            if pair[0] != pair[1]:
                between[pair] = between.get(pair, 0.0) + nbytes
        return Simulation(self.end, self.busy, link, between)
