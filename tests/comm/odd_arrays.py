"""Arrays that programs really pass and the core must not guess about: each with its values, read back as NumPy's."""

from __future__ import annotations

import array
import ctypes
import mmap
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

SENTINEL = 55
VALUES = ((1, 2, 3, 4), (2, 4, 1, 3))
RIGHT, REFUSED, EITHER = "right", "refused", "right or refused"


@dataclass
class Made:
    """An argument, and how to tell what has become of it."""

    array: Any
    numbers: Callable[[], np.ndarray] | None
    """The elements now, flat, as NumPy's of a dtype that holds them exactly; None: it has none that can be read."""
    intact: Callable[[], bool] = lambda: True
    """Whether the memory around the elements is as it was."""


@dataclass(frozen=True)
class Kind:
    name: str
    make: Callable[[int], Made]
    """Of a rank, with that rank's values."""
    count: int
    partner: Callable[[int], Any]
    """A good array of `count` zeros for the other argument of a call."""
    read: str = RIGHT
    """What a call does that only reads it."""
    written: str = RIGHT
    reduced: str = RIGHT
    """What a reduction of it does, in addition."""


def numbers(x: Any) -> np.ndarray:
    """The elements, flat, a copy."""
    if isinstance(x, torch.Tensor):
        return _of_torch(x)
    if isinstance(x, np.ndarray | np.generic):
        return np.array(x).reshape(-1).astype(x.dtype.newbyteorder("="))
    if isinstance(x, array.array):
        return np.array(x, dtype=x.typecode)
    if isinstance(x, ctypes.Array):
        return np.array(list(x), np.float32)
    if isinstance(x, mmap.mmap):
        return np.frombuffer(x[:], np.uint8).copy()
    return np.array(memoryview(x)).reshape(-1)


def _of_torch(x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        if isinstance(x, AsyncCollectiveTensor):
            x = x.wait()
        if isinstance(x, DTensor):
            x = x.to_local()
        if type(x) is not torch.Tensor and not hasattr(type(x), "inner_of"):
            x = x.detach().as_subclass(torch.Tensor)
        if hasattr(type(x), "inner_of"):
            x = x.inner  # type: ignore[attr-defined]
        if x.is_quantized:
            x = x.int_repr()
        if x.layout != torch.strided:
            x = x.to_dense()
        x = x.detach().resolve_conj().resolve_neg()
        if x.dtype == torch.complex32:
            x = x.to(torch.complex64)
        elif x.dtype.is_floating_point and x.dtype not in (torch.float64, torch.float32, torch.float16):
            x = x.float()
        return x.clone().numpy().reshape(-1)


def values(rank: int, count: int, dtype: Any = np.float32) -> np.ndarray:
    found = np.resize(np.array(VALUES[rank]), count)
    return (found % 2).astype(bool) if np.dtype(dtype) == bool else found.astype(dtype)


# --- views of larger memory, for NumPy and torch alike ---
Shape = tuple[int, ...]
VIEWS: dict[str, tuple[Shape, Callable[[Any], Any]]] = {
    "contiguous": ((4,), lambda b: b[:]),
    "inner": ((8,), lambda b: b[2:6]),
    "every second": ((9,), lambda b: b[1::2]),
    "column": ((4, 3), lambda b: b[:, 1]),
    "transposed": ((2, 2), lambda b: b.T),
    "0-d": ((3,), lambda b: b[1:2].reshape(())),
    "no elements": ((0,), lambda b: b[:]),
    "no rows": ((0, 3), lambda b: b[:]),
    "no columns": ((4, 0), lambda b: b[:]),
    "4-d with ones": ((1, 4, 1, 2), lambda b: b[:, :, :, :1]),
}
NUMPY_VIEWS: dict[str, tuple[Shape, Callable[[Any], Any]]] = {
    "negative stride": ((4,), lambda b: b[::-1]),
    "negative strides of two": ((4, 4), lambda b: b[::-2, ::-2]),
    "Fortran": ((2, 2), lambda b: b.T),
}


def _np_strided(base: np.ndarray, shape: Shape, strides: Shape, offset: int = 0) -> np.ndarray:
    size = base.itemsize
    return np.lib.stride_tricks.as_strided(base[offset:], shape, tuple(size * s for s in strides), writeable=True)


def _viewed(base: Any, view: Callable[[Any], Any], rank: int, writable: bool = True) -> Made:
    """`base` is filled with sentinels; its view gets the rank's values."""
    torchs = isinstance(base, torch.Tensor)
    index = np.arange(base.numel() if torchs else base.size).reshape(base.shape)
    inside = set(np.array(view(torch.from_numpy(index) if torchs else index)).reshape(-1).tolist())
    seen = view(base)
    _fill(seen, rank)
    before = numbers(base)
    outside = np.array([i for i in range(len(before)) if i not in inside], int)

    def intact() -> bool:
        return bool(np.array_equal(numbers(base)[outside], before[outside], equal_nan=before.dtype.kind in "fc"))

    if not writable:
        seen.flags.writeable = False
    return Made(seen, lambda: numbers(seen), intact)


def _fill(seen: Any, rank: int) -> None:
    if isinstance(seen, torch.Tensor):
        with torch.no_grad():
            new = torch.from_numpy(np.resize(np.array(VALUES[rank]), seen.numel())).reshape(seen.shape)
            seen.copy_(new % 2 if seen.dtype == torch.bool else new)
    else:
        seen[...] = values(rank, seen.size, seen.dtype).reshape(seen.shape)


# --- NumPy ---
def _numpy_kinds() -> list[Kind]:
    found = []

    def add(name: str, dtype: Any, base: Shape, view: Callable[[Any], Any], **expect: Any) -> None:
        def make(rank: int) -> Made:
            return _viewed(np.full(base, 0 if np.dtype(dtype) == bool else SENTINEL, dtype), view, rank, writable)

        writable = expect.pop("writable", True)
        count = view(np.zeros(base, dtype)).size
        found.append(Kind(f"numpy {name}", make, count, lambda n: np.zeros(n, np.dtype(dtype)), **expect))

    for name, (base, view) in (VIEWS | NUMPY_VIEWS).items():
        add(f"float32 {name}", np.float32, base, view)
    for dtype in ("f8", "f2", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?"):
        add(f"{np.dtype(dtype).name} every second", dtype, *VIEWS["every second"])
        add(f"{np.dtype(dtype).name} contiguous", dtype, *VIEWS["contiguous"])
    add("read-only", np.float32, *VIEWS["inner"], writable=False, written=REFUSED)
    add("read-only strided", np.float32, *VIEWS["column"], writable=False, written=REFUSED)
    add("stride 0", np.float32, (3,), lambda b: _np_strided(b, (4,), (0,), 1), written=EITHER)
    add("stride 0 of two", np.float32, (2,), lambda b: _np_strided(b, (2, 2), (0, 1)), written=EITHER)
    add("overlapping rows", np.float32, (3,), lambda b: _np_strided(b, (2, 2), (1, 1)), written=EITHER)
    for dtype in ("c8", "c16", "g"):
        add(f"{np.dtype(dtype).name}", dtype, *VIEWS["inner"], read=EITHER, written=EITHER, reduced=EITHER)
    add("big-endian", ">f4", *VIEWS["inner"], read=EITHER, written=EITHER, reduced=EITHER)
    add("big-endian int32", ">i4", *VIEWS["every second"], read=EITHER, written=EITHER, reduced=EITHER)
    add(
        "unaligned",
        np.uint8,
        (24,),
        lambda b: b[1:17].view(np.float32) if b.dtype == np.uint8 else b[1:17],
        read=EITHER,
        written=EITHER,
        reduced=EITHER,
    )
    found[-1] = Kind("numpy unaligned", _unaligned, 4, lambda n: np.zeros(n, np.float32), EITHER, EITHER, EITHER)

    def odd(name: str, make: Callable[[], Any], expect: str = EITHER, count: int = 4, dtype: Any = np.float32) -> None:
        def made(rank: int) -> Made:
            x = make()
            if expect != REFUSED:
                _fill(x, rank)
            return Made(x, None if expect == REFUSED else lambda: numbers(x))

        found.append(Kind(f"numpy {name}", made, count, lambda n: np.zeros(n, dtype), expect, expect, expect))

    odd("object", lambda: np.array([1, 2, 3, 4], object), REFUSED)
    odd("text", lambda: np.array(["a", "b", "c", "d"]), REFUSED)
    odd("bytes", lambda: np.array([b"a", b"b", b"c", b"d"]), REFUSED)
    odd("datetime64", lambda: np.zeros(4, "M8[s]"), REFUSED)
    odd("timedelta64", lambda: np.zeros(4, "m8[s]"), REFUSED)
    odd("structured", lambda: np.zeros(4, [("a", "f4"), ("b", "i4")]), REFUSED)
    odd("void", lambda: np.zeros(4, "V4"), REFUSED)
    odd("subclass", lambda: np.zeros(4, np.float32).view(_Subclass))
    odd("matrix", lambda: np.asmatrix(np.zeros((2, 2), np.float32)))
    odd("masked", lambda: np.ma.masked_array(np.zeros(4, np.float32), [0, 1, 0, 0]), REFUSED)
    odd("memmap", _memmap)
    scalar = Kind(
        "numpy scalar",
        lambda rank: Made(np.float32(VALUES[rank][0]), None),
        1,
        lambda n: np.zeros(n, np.float32),
        EITHER,
        REFUSED,
        EITHER,
    )
    return [*found, scalar]


def _memmap() -> np.ndarray:
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.float32, "w+", shape=4)  # type: ignore[call-overload]


class _Subclass(np.ndarray):
    pass


def _unaligned(rank: int) -> Made:
    base = np.full(24, SENTINEL, np.uint8)
    seen = base[1:17].view(np.float32)
    _fill(seen, rank)
    return Made(seen, lambda: numbers(seen), lambda: set(base[[0, *range(17, 24)]].tolist()) == {SENTINEL})


# --- buffers ---
def _buffer_kinds() -> list[Kind]:
    found = []

    def add(
        name: str, make: Callable[[np.ndarray], Any], written: str, dtype: Any = np.uint8, read: str = EITHER
    ) -> None:
        def made(rank: int) -> Made:
            x = make(values(rank, 4, dtype))
            return Made(x, lambda: numbers(x))

        found.append(Kind(f"buffer {name}", made, 4, lambda n: np.zeros(n, dtype), read, written, EITHER))

    add("bytes", lambda v: v.tobytes(), REFUSED)
    add("bytearray", lambda v: bytearray(v.tobytes()), EITHER)
    add("array.array", lambda v: array.array("f", v.tolist()), EITHER, np.float32)
    add("array.array double", lambda v: array.array("d", v.tolist()), EITHER, np.float64)
    add("memoryview", lambda v: memoryview(bytearray(v.tobytes())), EITHER)
    add("memoryview read-only", lambda v: memoryview(v.tobytes()), REFUSED)
    add("memoryview strided", lambda v: _every_second(v), EITHER)
    add("memoryview backwards", lambda v: memoryview(bytearray(v.tobytes()))[::-1], EITHER)
    add("memoryview float", lambda v: memoryview(v), EITHER, np.float32)
    add("mmap", _mapped, EITHER)
    add("ctypes", lambda v: (ctypes.c_float * 4)(*v.tolist()), EITHER, np.float32)
    add("empty bytearray", lambda v: bytearray(), EITHER)
    found[-1] = Kind(
        "buffer empty bytearray",
        lambda rank: Made(bytearray(), lambda: np.zeros(0, np.uint8)),
        0,
        lambda n: np.zeros(n, np.uint8),
        EITHER,
        EITHER,
        EITHER,
    )
    released = Kind("buffer released memoryview", lambda rank: Made(_released(), None), 4, _plain, REFUSED, REFUSED)
    return [*found, released]


def _every_second(v: np.ndarray) -> memoryview:
    whole = bytearray(b"\x37" * (2 * len(v)))
    found = memoryview(whole)[::2]
    for i, one in enumerate(v.tolist()):
        found[i] = one
    return found


def _mapped(v: np.ndarray) -> mmap.mmap:
    found = mmap.mmap(-1, len(v))
    found[:] = v.tobytes()
    return found


def _released() -> memoryview:
    found = memoryview(bytearray(4))
    found.release()
    return found


def _plain(count: int) -> np.ndarray:
    return np.zeros(count, np.float32)


# --- what is no array ---
class Hostile:
    """Answers each protocol of arrays as `answer` says."""

    def __init__(self, protocol: str, answer: Any) -> None:
        self._protocol, self._answer = protocol, answer

    def __getattr__(self, name: str) -> Any:
        if name != self._protocol or name.startswith("_p"):
            raise AttributeError(name)
        if isinstance(self._answer, type) and issubclass(self._answer, BaseException):
            raise self._answer("hostile")
        return self._answer


class DlpackOf:
    def __init__(self, answer: Callable[[], Any], device: Any = (1, 0)) -> None:
        self._answer, self._device = answer, device

    def __dlpack__(self, **_: Any) -> Any:
        return self._answer()

    def __dlpack_device__(self) -> Any:
        return self._device


def _raise(error: BaseException) -> Any:
    raise error


class _Managed(ctypes.Structure):
    """DLManagedTensor with its DLTensor, of DLPack 0.8."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_kept: list[Any] = []  # capsules do not own what they point to


def _capsule(address: int | None, shape: Sequence[int], code: int = 2, bits: int = 32, lanes: int = 1) -> Any:
    sizes = (ctypes.c_int64 * max(1, len(shape)))(*shape)
    managed = _Managed(address, 1, 0, len(shape), code, bits, lanes, sizes, None, 0, None, None)
    _kept.append((sizes, managed))
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(ctypes.addressof(managed), b"dltensor", None)


SCALARS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "text": lambda: "abc",
    "5": lambda: 5,
    "3.5": lambda: 3.5,
    "True": lambda: True,
    "NaN": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "2**62": lambda: 1 << 62,
    "2**200": lambda: 1 << 200,
    "-1": lambda: -1,
    "1j": lambda: 1j,
    "[]": list,
    "{}": dict,
    "()": tuple,
    "object": object,
    "type": lambda: int,
    "function": lambda: len,
    "Ellipsis": lambda: ...,
}


def _junk_kinds() -> list[Kind]:
    interface = {"shape": (4,), "typestr": "<f4", "version": 3}
    made: dict[str, Callable[[], Any]] = {
        **SCALARS,
        "list": lambda: [1.0, 2.0, 3.0, 4.0],
        "class of torch.Tensor": lambda: torch.Tensor,
        "__dlpack__ that raises": lambda: DlpackOf(lambda: _raise(KeyError("hostile"))),
        "__dlpack__ that gives None": lambda: DlpackOf(lambda: None),
        "__dlpack__ of no known device": lambda: DlpackOf(lambda: None, (99, 7)),
        "__dlpack__ of a null address": lambda: DlpackOf(lambda: _capsule(None, [4])),
        "__dlpack__ of negative size": lambda: DlpackOf(lambda: _capsule(None, [-4])),
        "__dlpack__ of vectors": lambda: DlpackOf(lambda: _capsule(None, [4], lanes=4)),
        "__dlpack__ of unknown code": lambda: DlpackOf(lambda: _capsule(None, [4], code=77, bits=3)),
        "__cuda_array_interface__ of {}": lambda: Hostile("__cuda_array_interface__", {}),
        "__cuda_array_interface__ of 5": lambda: Hostile("__cuda_array_interface__", 5),
        "__cuda_array_interface__ of null": lambda: Hostile(
            "__cuda_array_interface__", interface | {"data": (0, False)}
        ),
        "__cuda_array_interface__ of junk": lambda: Hostile(
            "__cuda_array_interface__", {"shape": "x", "typestr": 4, "data": None, "version": "y"}
        ),
        "__array_interface__ of {}": lambda: Hostile("__array_interface__", {}),
        "__array_interface__ of null": lambda: Hostile("__array_interface__", interface | {"data": (0, False)}),
        "__getattr__ that raises": lambda: Hostile("__dlpack__", RuntimeError),
    }
    return [
        Kind(f"junk {name}", lambda rank, make=make: Made(make(), None), 4, _plain, REFUSED, REFUSED)
        for name, make in made.items()
    ]


# --- torch ---
TORCH_DTYPES = (
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


class UsersTensor(torch.Tensor):
    """A subclass that adds nothing: it has memory as any tensor."""


class Wrapper(torch.Tensor):
    """A subclass without memory of its own; its elements are in `inner`."""

    inner: torch.Tensor

    @staticmethod
    def inner_of(x: torch.Tensor) -> Wrapper:
        found: Any = torch.Tensor._make_wrapper_subclass(Wrapper, x.shape, dtype=x.dtype)
        found.inner = x
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} of a Wrapper")


def _torch_kinds(backend: bool) -> list[Kind]:
    """`backend`: torch.distributed's, which moves every dtype and sums complex numbers; ours may refuse."""
    found = []
    here = RIGHT if backend else EITHER

    def add(name: str, dtype: Any, base: Shape, view: Callable[[Any], Any], change: Any = None, **expect: Any) -> None:
        def make(rank: int) -> Made:
            whole = torch.full(base, 0 if dtype == torch.bool else SENTINEL).to(dtype)
            if change is None:
                return _viewed(whole, view, rank)
            made = _viewed(whole, view, rank)
            made.array = x = change(made.array)
            return Made(x, lambda: numbers(x), made.intact)

        count = view(torch.zeros(base)).numel()
        like = torch.float32 if name.startswith("imag") else dtype
        found.append(Kind(f"torch {name}", make, count, lambda n: torch.zeros(n).to(like), **expect))

    for name, (base, view) in VIEWS.items():
        add(f"float32 {name}", torch.float32, base, view)
    for dtype in TORCH_DTYPES:
        name = str(dtype).removeprefix("torch.")
        for shape in ("contiguous", "every second", "0-d"):
            add(f"{name} {shape}", dtype, *VIEWS[shape])
    for dtype in FLOAT8:
        name = str(dtype).removeprefix("torch.")
        for shape in ("contiguous", "every second"):
            add(f"{name} {shape}", dtype, *VIEWS[shape], read=here, written=here, reduced=EITHER)
    for dtype in (torch.complex64, torch.complex128):
        name = str(dtype).removeprefix("torch.")
        for shape in ("contiguous", "every second", "0-d", "no elements"):
            add(f"{name} {shape}", dtype, *VIEWS[shape], read=here, written=here, reduced=here)
    add("complex32", torch.complex32, *VIEWS["contiguous"], read=EITHER, written=EITHER, reduced=EITHER)
    # torch.distributed itself calls view_as_real, which refuses these.
    for shape, name in (("inner", "conjugated"), ("column", "conjugated strided")):
        add(name, torch.complex64, *VIEWS[shape], lambda x: x.conj(), read=EITHER, written=EITHER, reduced=EITHER)
    add("imag of conjugated", torch.complex64, *VIEWS["inner"], lambda x: x.conj().imag)
    add("imag of conjugated, one", torch.complex64, (1,), lambda b: b[:], lambda x: x.conj().imag)
    add("negated view", torch.float32, *VIEWS["inner"], lambda x: torch._neg_view(x))
    add("negated view, one", torch.float32, (1,), lambda b: b[:], lambda x: torch._neg_view(x))
    add("stride 0", torch.float32, (3,), lambda b: b[1:2].expand(4), written=EITHER)
    found[-1] = _overlapping("stride 0", lambda b: b[1:2].expand(4))
    found.append(_overlapping("stride 0 of two", lambda b: b[:2].expand(2, 2)))
    found.append(_overlapping("overlapping rows", lambda b: b.as_strided((2, 2), (1, 1))))
    add("Parameter", torch.float32, *VIEWS["contiguous"], torch.nn.Parameter)
    add("Parameter strided", torch.float32, *VIEWS["column"], torch.nn.Parameter)
    add("requires_grad", torch.float32, *VIEWS["contiguous"], lambda x: x.requires_grad_())
    add("requires_grad strided", torch.float32, *VIEWS["column"], lambda x: x.detach().requires_grad_())
    found.append(_strange("view of a leaf", _view_of_leaf, RIGHT))
    found.append(_strange("user's subclass", lambda v: v.as_subclass(UsersTensor), EITHER))
    found.append(_strange("Buffer", lambda v: torch.nn.Buffer(v), RIGHT))
    found.append(_strange("inference", _inference, RIGHT))
    found.append(_strange("inference strided", lambda v: _inference(torch.stack([v, v], 1))[:, 0], RIGHT))
    found.append(_strange("of NumPy", lambda v: torch.from_numpy(v.numpy().copy()), RIGHT))
    found.append(_strange("in shared memory", lambda v: v.share_memory_(), RIGHT))
    found.append(_strange("AsyncCollectiveTensor", _async, here))
    found.append(_strange("AsyncCollectiveTensor strided", lambda v: _async(torch.stack([v, v], 1)[:, 0]), here))
    found.append(_strange("sparse COO", lambda v: v.to_sparse(), EITHER))
    found.append(_strange("sparse CSR", lambda v: v.reshape(2, 2).to_sparse_csr(), EITHER))
    found.append(_strange("mkldnn", lambda v: v.to_mkldnn(), EITHER))
    quantised = [("quint8", torch.quint8), ("qint8", torch.qint8), ("qint32", torch.qint32)]
    for name, dtype in quantised:
        found.append(_strange(name, lambda v, d=dtype: torch.quantize_per_tensor(v, 1.0, 0, d), EITHER, sums=False))
    unreadable: dict[str, Callable[[torch.Tensor], Any]] = {
        "Wrapper": Wrapper.inner_of,
        "DTensor": _dtensor,
        "meta": lambda v: v.to("meta"),
        "freed": lambda v: _freed(v, 0),
        "freed, one byte left": lambda v: _freed(v, 1),
        "freed strided": lambda v: _freed(torch.stack([v, v], 1)[:, 0], 0),
        "freed in part": lambda v: _freed(v, 8),
        "ZeroTensor": lambda v: torch._efficientzerotensor(4),
        "functional": lambda v: torch._to_functional_tensor(v),
        "nested": lambda v: torch.nested.nested_tensor([v[:1], v[1:]], layout=torch.strided),
        "jagged": lambda v: torch.nested.nested_tensor([v[:1], v[1:]], layout=torch.jagged),
        "bits": lambda v: torch.empty(4, dtype=torch.bits8),
        "float4": lambda v: torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "storage": lambda v: v.untyped_storage(),
    }
    for name, change in unreadable.items():
        expect = EITHER if name in ("bits", "float4", "ZeroTensor", "nested") else REFUSED
        found.append(Kind(f"torch {name}", _unreadable(change), 4, _float32, expect, expect, expect))
    fake = Kind("torch FakeTensor", _unreadable(_fake), 4, _float32, *[EITHER if backend else REFUSED] * 3)
    return [*found, fake]


def _float32(count: int) -> torch.Tensor:
    return torch.zeros(count)


def _unreadable(change: Callable[[torch.Tensor], Any]) -> Callable[[int], Made]:
    return lambda rank: Made(change(torch.tensor(VALUES[rank], dtype=torch.float32)), None)


def _overlapping(name: str, view: Callable[[Any], Any]) -> Kind:
    """Elements that share memory; torch refuses to write them."""

    def make(rank: int) -> Made:
        base = torch.tensor([SENTINEL, *VALUES[rank]], dtype=torch.float32)
        seen = view(base[1:])
        inside = set(view(torch.arange(5)[1:]).reshape(-1).tolist())
        outside = [i for i in range(5) if i not in inside]
        before = base[outside].clone()
        return Made(seen, lambda: numbers(seen), lambda: bool(torch.equal(base[outside], before)))

    return Kind(f"torch {name}", make, 4, _float32, written=EITHER)


def _strange(name: str, change: Callable[[torch.Tensor], Any], expect: str, sums: bool = True) -> Kind:
    def make(rank: int) -> Made:
        x = change(torch.tensor(VALUES[rank], dtype=torch.float32))
        return Made(x, lambda: numbers(x))

    def partner(count: int) -> torch.Tensor:
        if not sums:
            whole: torch.Tensor = change(torch.zeros(count))
            return whole
        return torch.zeros(count)

    return Kind(f"torch {name}", make, 4, partner, expect, expect, expect if sums else EITHER)


def _view_of_leaf(v: torch.Tensor) -> torch.Tensor:
    return torch.stack([v, v]).requires_grad_()[0]


def _inference(v: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return v.clone()


def _async(v: torch.Tensor) -> Any:
    return AsyncCollectiveTensor(v)


@cache
def _mesh() -> Any:
    if dist.is_initialized():
        return DeviceMesh("cpu", list(range(dist.get_world_size())), _init_backend=False)
    mesh = DeviceMesh("cpu", [0], _init_backend=False, _rank=0)
    return mesh


def _dtensor(v: torch.Tensor) -> Any:
    return DTensor.from_local(v, _mesh(), [Replicate()], run_check=False)


def _fake(v: torch.Tensor) -> Any:
    return FakeTensorMode().from_tensor(v)


def _freed(v: torch.Tensor, nbytes: int) -> torch.Tensor:
    v.untyped_storage().resize_(nbytes)
    return v


@cache
def kinds(backend: bool) -> list[Kind]:
    """Of arguments of our own collectives, or of torch.distributed's."""
    if backend:
        return [*_torch_kinds(True), *_junk_kinds()]
    return [*_numpy_kinds(), *_buffer_kinds(), *_junk_kinds(), *_torch_kinds(False)]
