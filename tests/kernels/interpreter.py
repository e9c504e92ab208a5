"""Triton's interpreter made honest, so that what passes here means something on a GPU.

The stock one runs a kernel's programs one after the other on NumPy. `install()` mends and adds, for KNOWN versions:

    bfloat16      it computes on the bit patterns, and truncates; here as torch: float32 inside, rounded to nearest
                  even; atomics are refused
    dot           "tf32", "tf32x3", "bf16x3" and "bf16x6" split and round their operands as the compiler's code does;
                  sizes that hardware has no dot for are refused
    masked loads  without `other` what is masked off is anything on a GPU: here NaN, or the largest integer
    bounds        an address outside of the tensors that the kernel was given raises IndexError; beyond a descriptor's
                  shape zeros are read and nothing is written, as by hardware
    races         an address that one program writes and another reads or writes raises RaceError (atomics among
                  themselves may meet); programs of a launch are taken to run at the same time, in any order
    speed         a call of a device function patches the language again each time; here once a launch

Left: fp8 casts are wrong; weak memory order, and what threads of one program do to each other, are not modelled; races
are looked for by an element's first byte, so that programs must not mix widths on one tensor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import triton
import triton.language as tl
import triton.runtime.interpreter as stock
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size

KNOWN = ("3.7.1",)
"""Versions whose interpreter was read, and on which tests/kernels/test_interpreter.py ran."""

Handle = stock.TensorHandle


class RaceError(RuntimeError):
    """Two programs of a launch touch one address, and at least one writes it."""


# --- bfloat16, which NumPy lacks: bits in uint16 ---
def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits, to nearest, ties to even; NaN stays NaN, as torch's."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def plain(handle: Any) -> np.ndarray:
    """Its values in a type that NumPy computes with."""
    return widened(handle.data) if is_bfloat16(handle) else handle.data


def as_bfloat16(values: np.ndarray) -> Any:
    return Handle(values if values.dtype == bool else narrowed(values), tl.bfloat16)


def tf32(values: np.ndarray) -> np.ndarray:
    """float32 with 10 bits of mantissa, to nearest, ties away from zero as cvt.rna.tf32 does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32)


def parts(values: np.ndarray, rounded: Any, count: int) -> list[np.ndarray]:
    """`count` values of the lower precision whose sum is `values`, or close to it."""
    found = []
    for _ in range(count):
        found.append(rounded(values))
        values = values - found[-1]
    return found


_names = stock._ir.INPUT_PRECISION
SPLITS = {
    _names.TF32: (tf32, 1, 0),
    _names.TF32x3: (tf32, 2, 1),
    _names.BF16x3: (lambda values: widened(narrowed(values)), 2, 1),
    _names.BF16x6: (lambda values: widened(narrowed(values)), 3, 2),
}
"""How a product of float32 is made of lower ones: (rounding, parts, the largest sum of parts' numbers that is kept)."""


class _Builder:
    """What replaces methods of the stock builder; each falls back on what it replaces."""

    @staticmethod
    def cast_impl(fall_back: Any, self: Any, src: Any, dst_type: Any) -> Any:
        to = dst_type.scalar
        if is_bfloat16(src) and to != tl.bfloat16:
            return Handle(widened(src.data).astype(stock._get_np_dtype(dst_type)), to)
        if to == tl.bfloat16 and not is_bfloat16(src):
            return as_bfloat16(src.data.astype(np.float32))
        return fall_back(self, src, dst_type)

    @staticmethod
    def create_fp_to_fp(fall_back: Any, self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if rounding_mode in (None, stock._ir.ROUNDING_MODE.RTNE) and dst_type.scalar.primitive_bitwidth >= 16:
            return self.cast_impl(src, dst_type)
        return fall_back(self, src, dst_type, rounding_mode)

    @staticmethod
    def binary_op(fall_back: Any, self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if is_bfloat16(lhs):
            return as_bfloat16(op(widened(lhs.data), widened(rhs.data)))
        return fall_back(self, lhs, rhs, op)

    @staticmethod
    def ternary_op(fall_back: Any, self: Any, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
        if is_bfloat16(other) and op is not np.where:
            return as_bfloat16(op(*(widened(each.data) for each in (lhs, rhs, other))))
        return fall_back(self, lhs, rhs, other, op)

    @staticmethod
    def unary_op(fall_back: Any, self: Any, arg: Any, op: Any) -> Any:
        return as_bfloat16(op(widened(arg.data))) if is_bfloat16(arg) else fall_back(self, arg, op)

    @staticmethod
    def create_fma(fall_back: Any, self: Any, x: Any, y: Any, z: Any) -> Any:
        if is_bfloat16(z):
            return as_bfloat16(plain(x) * plain(y) + plain(z))
        if z.data.dtype == np.float32:  # one rounding, as the hardware's
            exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
            return Handle(exact.astype(np.float32), z.dtype.scalar)
        return fall_back(self, x, y, z)

    @staticmethod
    def create_dot(fall_back: Any, self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if a.dtype.scalar not in (tl.float16, tl.bfloat16, tl.float32):
            return fall_back(self, a, b, d, precision, imprecise)
        x, y = (plain(each).astype(np.float32) for each in (a, b))
        names = stock._ir.INPUT_PRECISION
        if a.dtype.scalar != tl.float32 or precision == names.IEEE:
            product = x @ y
        elif precision in SPLITS:
            rounded, count, most = SPLITS[precision]
            xs, ys = parts(x, rounded, count), parts(y, rounded, count)
            terms = [(i, j) for i in range(count) for j in range(count) if i + j <= most]
            product = sum(xs[i] @ ys[j] for i, j in sorted(terms, key=sum, reverse=True))  # the smallest first
        else:
            raise NotImplementedError(f"a dot of precision {precision}")
        return Handle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    @staticmethod
    def create_masked_load(
        fall_back: Any, self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **options: Any
    ) -> Any:
        watch.note(ptrs, mask, write=False)
        if other is None and mask is not None and not mask.data.all():
            dtype = ptrs.get_element_ty()
            other = Handle(np.full(ptrs.data.shape, poison(dtype), stock._get_np_dtype(dtype)), dtype)
        return fall_back(self, ptrs, mask, other, *rest, **options)

    @staticmethod
    def create_masked_store(fall_back: Any, self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.note(ptrs, mask, write=True)
        return fall_back(self, ptrs, value, mask, *rest)

    @staticmethod
    def create_atomic_rmw(fall_back: Any, self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        watch.note(ptr, mask, write=True, atomic=True)
        if is_bfloat16(val):
            raise NotImplementedError("atomics on bfloat16")
        return fall_back(self, op, ptr, val, mask, *rest)

    @staticmethod
    def create_atomic_cas(fall_back: Any, self: Any, ptr: Any, *rest: Any) -> Any:
        watch.note(ptr, None, write=True, atomic=True)
        return fall_back(self, ptr, *rest)

    @staticmethod
    def set_grid_idx(fall_back: Any, self: Any, x: int, y: int, z: int) -> Any:
        watch.program = (x, y, z)
        return fall_back(self, x, y, z)


def poison(dtype: Any) -> Any:
    """What stands for "anything" in an element of `dtype`."""
    if dtype == tl.bfloat16:
        return 0x7FC0
    return np.nan if dtype.is_floating() else np.iinfo(stock._get_np_dtype(dtype)).max if dtype != tl.int1 else True


def _in_float32(fall_back: Any) -> Any:
    """Reductions and scans of bfloat16 combine in float32 and round once."""

    def wide(tensor: Any) -> Any:
        if tensor.dtype.scalar != tl.bfloat16:
            return tensor
        return tl.core.tensor(
            Handle(widened(tensor.handle.data), tl.float32), tl.block_type(tl.float32, list(tensor.shape))
        )

    def narrow(found: Any, tensor: Any) -> Any:
        if tensor.dtype.scalar != tl.bfloat16 or found.dtype.scalar != tl.float32:
            return found
        kind = tl.block_type(tl.bfloat16, list(found.shape)) if found.shape else tl.bfloat16
        return tl.core.tensor(as_bfloat16(found.handle.data), kind)

    def apply_impl(self: Any, tensors: Any) -> Any:
        found = fall_back(self, tuple(map(wide, tensors)))
        found = found if isinstance(found, (list, tuple)) else (found,)
        return tuple(narrow(*pair) for pair in zip(found, tensors, strict=False))

    return apply_impl


# --- memory ---
class Watch:
    """What the programs of the launch at hand touch."""

    def __init__(self) -> None:
        self.launches = 0
        self.program = (0, 0, 0)
        self._starts: np.ndarray | None = None
        self._ends = np.empty(0, np.uint64)
        self._touched: list[tuple[tuple[int, int, int], bool, bool, np.ndarray]] = []

    def begin(self, tensors: list[Any]) -> None:
        self.launches += 1
        spans = sorted(span(tensor) for tensor in tensors if tensor.numel())
        merged: list[list[int]] = []
        for start, end in spans:
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        self._starts = np.array([start for start, _ in merged], np.uint64)
        self._ends = np.array([end for _, end in merged], np.uint64)
        self._touched = []

    def note(self, ptrs: Any, mask: Any, *, write: bool, atomic: bool = False) -> None:
        if self._starts is None:
            return
        addresses = ptrs.data.reshape(-1)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, ptrs.data.shape).reshape(-1).astype(bool)]
        if not addresses.size:
            return
        nbytes = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        place = np.searchsorted(self._starts, addresses, side="right") - 1
        inside = (place >= 0) & (addresses + np.uint64(nbytes) <= self._ends[np.maximum(place, 0)])
        if not inside.all():
            raise IndexError(
                f"{'store' if write else 'load'} out of bounds: {int((~inside).sum())} of {addresses.size} elements, "
                f"program {self.program}"
            )
        self._touched.append((self.program, write, atomic, np.unique(addresses)))

    def end(self) -> None:
        """Raises RaceError where programs met."""
        touched, self._touched, self._starts = self._touched, [], None
        written = [(program, addresses) for program, write, atomic, addresses in touched if write and not atomic]
        if not written:
            return
        numbers = {program: number for number, program in enumerate({each[0] for each in touched})}
        addresses = np.concatenate([each for _, each in written])
        owners = np.concatenate([np.full(each.size, numbers[program]) for program, each in written])
        order = np.argsort(addresses, kind="stable")
        addresses, owners = addresses[order], owners[order]
        meet = (addresses[1:] == addresses[:-1]) & (owners[1:] != owners[:-1])
        if meet.any():
            raise RaceError(f"{int(meet.sum())} addresses are written by two programs")
        for program, write, atomic, others in touched:
            if write and not atomic:
                continue
            place = np.minimum(np.searchsorted(addresses, others), addresses.size - 1)
            meet = (addresses[place] == others) & (owners[place] != numbers[program])
            if meet.any():
                raise RaceError(
                    f"program {program} {'updates' if atomic else 'reads'} {int(meet.sum())} addresses that another "
                    "program writes"
                )


watch = Watch()


def span(tensor: Any) -> tuple[int, int]:
    """The bytes [begin, end) that a tensor's elements lie in."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def tensors_in(arguments: Any) -> list[Any]:
    found: list[Any] = []
    for each in arguments:
        each = each.base if hasattr(each, "block_shape") else each
        if isinstance(each, tuple):
            found += tensors_in(each)
        elif hasattr(each, "data_ptr"):
            found.append(each)
    return found


def _watched(run: Any, prepare: Any) -> tuple[Any, Any]:
    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        on_host = prepare(self, args, kwargs)
        watch.begin(tensors_in([*on_host[0], *on_host[1].values()]))
        return on_host

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            run(self, *args, **kwargs)
        except BaseException:
            watch._starts = None
            raise
        watch.end()

    return call, init_args


def _patch_language(_: Any) -> Any:
    """All of the language at once, so that device functions and Triton's own library find it so."""
    scope = stock._LangPatchScope()
    for lang in (tl, tl.core):
        stock._patch_builtin(lang, stock.interpreter_builder, scope)
        stock._patch_builtin(lang.tensor, stock.interpreter_builder, scope)
        stock._patch_lang_tensor(lang.tensor, scope)
        stock._patch_lang_core(lang, scope)
    stock._patch_builtin(tl.math, stock.interpreter_builder, scope)
    stock._patch_builtin(tl.core.tensor_descriptor_base, stock.interpreter_builder, scope)
    return scope


def _device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.rewrite()(*args, **kwargs)


def install() -> None:
    """Mends the interpreter of this process, once. Raises RuntimeError for a Triton that nobody looked at."""
    if triton.__version__ not in KNOWN:
        raise RuntimeError(
            f"tests/kernels/interpreter.py knows the interpreter of Triton {', '.join(KNOWN)}; this is "
            f"{triton.__version__}: compare triton/runtime/interpreter.py, run tests/kernels/test_interpreter.py, add "
            "it"
        )
    builder = stock.InterpreterBuilder
    if getattr(builder, "_honest", False):
        return
    builder._honest = True
    for name, replacement in vars(_Builder).items():
        if isinstance(replacement, staticmethod):
            setattr(builder, name, _bound(replacement.__func__, getattr(builder, name)))
    allowed = ("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6")  # as the compiler for NVIDIA
    stock.interpreter_builder.options = replace(stock.interpreter_builder.options, allowed_dot_input_precisions=allowed)
    stock.interpreter_builder.codegen_fns["min_dot_size"] = min_dot_size(GPUTarget("cuda", 80, 32))
    for each in (stock.ReduceOps, stock.ScanOps):
        each.apply_impl = _in_float32(each.apply_impl)
    executor = stock.GridExecutor
    executor.__call__, executor._init_args_hst = _watched(executor.__call__, executor._init_args_hst)
    stock._patch_lang = _patch_language
    stock.InterpretedFunction.__call__ = _device_function


def _bound(replacement: Any, fall_back: Any) -> Any:
    return lambda self, *args, **kwargs: replacement(fall_back, self, *args, **kwargs)
