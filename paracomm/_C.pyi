"""The C++ core of paracomm. Use the package; this module may change without notice."""

import collections.abc
import typing

import numpy
import numpy.typing

class Program:
    def __init__(
        self,
        *,
        name: str,
        collective: int,
        rank: int,
        world_size: int,
        root: int,
        chunks: int,
        scratch_chunks: int,
        volume: int,
        levels: int,
        pair_depth: int,
        fingerprint: int,
        ops: numpy.typing.NDArray[numpy.int32],
    ) -> None: ...

class Listener:
    def __init__(self, *, interface: str = "", master_address: str = "", host_id: str = "") -> None: ...
    def publish(self) -> bytes: ...
    @property
    def host_id(self) -> str: ...
    @property
    def ip(self) -> str: ...

class Work:
    def done(self) -> bool: ...
    def wait(self, timeout_s: float = -1.0) -> None: ...
    @property
    def began_ns(self) -> int: ...
    @property
    def ended_ns(self) -> int: ...
    @property
    def source(self) -> int: ...

class Communicator:
    def abort(self, why: str) -> None: ...
    def add_program(self, program: Program) -> int: ...
    def bytes_sent(self, peer: int) -> int: ...
    def check(self) -> None: ...
    def choose(self, collective: int, root: int, nbytes: int) -> int: ...
    def close(self) -> None: ...
    def dump_plan(
        self,
        program: int,
        input: int,
        output: int,
        count: int,
        dtype: int,
        op: int,
        timeout_s: float = -1.0,
        blocks: collections.abc.Sequence[int] = [],
        output_blocks: collections.abc.Sequence[int] = [],
        largest_block: int = 0,
    ) -> str: ...
    def barrier(self, timeout_s: float) -> bool: ...
    def fast_all_reduce(self) -> typing.Any: ...
    def recv(self, data: int, nbytes: int, dtype: int, peer: int, timeout_s: float = -1.0, tag: int = 0) -> Work: ...
    def run(
        self,
        program: int,
        input: int,
        output: int,
        count: int,
        dtype: int,
        op: int,
        timeout_s: float = -1.0,
        blocks: collections.abc.Sequence[int] = [],
        output_blocks: collections.abc.Sequence[int] = [],
        largest_block: int = 0,
    ) -> None: ...
    def seconds_waiting(self) -> float: ...
    def send(self, data: int, nbytes: int, dtype: int, peer: int, timeout_s: float = -1.0, tag: int = 0) -> Work: ...
    def set_choice(self, collective: int, root: int, entries: collections.abc.Sequence[tuple[int, int]]) -> None: ...
    def submit(
        self,
        program: int,
        input: int,
        output: int,
        count: int,
        dtype: int,
        op: int,
        timeout_s: float = -1.0,
        blocks: collections.abc.Sequence[int] = [],
        output_blocks: collections.abc.Sequence[int] = [],
        largest_block: int = 0,
    ) -> Work: ...
    def time_all_reduce(self, program: int, barrier: int, count: int, iterations: int, arena: bool) -> list[float]: ...
    def transport(self, peer: int) -> str: ...
    @property
    def cores(self) -> int: ...
    @property
    def host_indices(self) -> list[int]: ...
    @property
    def hosts(self) -> list[str]: ...
    @property
    def local_ranks(self) -> list[int]: ...
    @property
    def rank(self) -> int: ...
    @property
    def timeout_s(self) -> float: ...
    @property
    def world_size(self) -> int: ...

class Arena:
    @staticmethod
    def process() -> Arena: ...
    def allocate(self, nbytes: int) -> numpy.typing.NDArray[numpy.uint8]: ...
    def contains(self, address: int, nbytes: int) -> bool: ...
    @property
    def bytes_in_use(self) -> int: ...
    @property
    def size(self) -> int: ...

def block_bytes(bits: int, block: int) -> int: ...
def connect(
    rank: int,
    listener: Listener,
    blobs: collections.abc.Sequence[bytes],
    *,
    connect_timeout_s: float,
    timeout_s: float,
    window_bytes: int = 0,
    staging_bytes: int = 0,
    sockets_per_peer: int = 0,
    cores: int = 0,
    lag: int = 0,
) -> Communicator: ...
def decode_blocks(bits: int, block: int, data: int, count: int, add: bool, out: int) -> None: ...
def encode_blocks(
    bits: int,
    block: int,
    x: int,
    residual: int,
    divisor: float,
    count: int,
    blocks: int,
    residual_out: int,
    out: int,
) -> None: ...
def fill_normal(seed: int, stream: int, step: int, first: int, count: int, out: int) -> None: ...
def item_size(dtype: int) -> int: ...
def keep_mask(
    seed: int,
    stream: int,
    step: int,
    bases: int,
    n_bases: int,
    offsets: int,
    n_offsets: int,
    threshold: int,
    out: int,
) -> None: ...
def limit_reduce_isa(isa: str) -> None: ...
def local_communicators(world_size: int, *, timeout_s: float, window_bytes: int = 0) -> list[Communicator]: ...
def emulated_gpus() -> int: ...
def gpus() -> tuple[int, str]: ...
def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]: ...
def reduce_isa() -> str: ...
def view(array: typing.Any) -> tuple[int, int, int, bool, bool]: ...

ANY_PEER: int
COLLECTIVES: dict[str, int]
DTYPES: dict[str, int]
REDUCE_OPS: dict[str, int]
__version__: str
compiler: str
cuda: str | None
