"""Arrays of float32 as blocks of small integers with a scale each, and back, in the vector code of the core.

A message is whole blocks, so that it cuts at any of them: 4 + block * bits / 8 bytes each (src/codec/codec.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paracomm import _C
from paracomm.comm.arrays import DTYPE_NAMES, View, host_view
from paracomm.errors import InvalidArgument

_FLOAT32, _UINT8 = _C.DTYPES["float32"], _C.DTYPES["uint8"]


@dataclass(frozen=True)
class BlockCodec:
    """Blocks of `block` elements at `bits` bits: |x - decode(encode(x))| <= `error` * the block's largest magnitude.

    A level q of 8 bits stands for q / 127 of the largest magnitude, one of 4 bits for q |q| / 49. A block with an
    infinity or a NaN decodes to NaN throughout; one whose largest magnitude is below `top` * 2^-126 decodes to zeros.

    Raises InvalidArgument unless bits is 8 or 4 and block a multiple of 32 up to 1024.
    """

    bits: int
    block: int

    def __post_init__(self) -> None:
        _C.block_bytes(self.bits, self.block)

    @property
    def top(self) -> int:
        """The integer that a block's largest magnitude becomes, in units of the scale."""
        return 127 if self.bits == 8 else 49

    @property
    def error(self) -> float:
        """The most that an element is off, as a share of its block's largest magnitude: 1/254, or 13/98 (4 bits)."""
        return (0.5 if self.bits == 8 else 6.5) / self.top

    def blocks(self, count: int) -> int:
        """How many blocks hold `count` elements."""
        return -(-count // self.block)

    def nbytes(self, blocks: int) -> int:
        """Bytes of a message of so many blocks, scales included."""
        return blocks * int(_C.block_bytes(self.bits, self.block))

    def encode(self, x: Any, out: Any, *, residual: Any = None, kept: Any = None, divisor: float = 1.0) -> None:
        """Writes y = (x + residual) / divisor to `out`, and what that loses, (y - decoded) * divisor, to `kept`.

        Args:
            x: float32 [count], read only.
            out: uint8 [nbytes(b)] with b >= blocks(count); blocks beyond x hold zeros.
            residual, kept: float32 [count] or None; they may be the same array. `kept` is zero in blocks that are not
                finite, so that an overflow does not stay.

        Raises InvalidArgument for other dtypes, strides or sizes.
        """
        source, target = _dense("x", x, _FLOAT32), _dense("out", out, _UINT8)
        blocks, rest = divmod(target.nbytes, self.nbytes(1))
        if rest or blocks < self.blocks(source.count):
            raise InvalidArgument(
                f"encode: out has {target.nbytes} bytes, expected a multiple of {self.nbytes(1)} from "
                f"{self.nbytes(self.blocks(source.count))} on for {source.count} elements"
            )
        _need_like("residual", residual, source)
        _need_like("kept", kept, source)
        _C.encode_blocks(self.bits, self.block, x, residual, divisor, kept, out)

    def decode(self, message: Any, out: Any, *, add: bool = False) -> None:
        """Writes (or adds) the first elements of `message`, uint8, to `out`, float32 [count]. Raises as encode."""
        source, target = _dense("message", message, _UINT8), _dense("out", out, _FLOAT32)
        if source.nbytes < self.nbytes(self.blocks(target.count)):
            raise InvalidArgument(f"decode: a message of {source.nbytes} bytes has fewer than {target.count} elements")
        _C.decode_blocks(self.bits, self.block, message, add, out)


def _dense(name: str, array: Any, dtype: int) -> View:
    found = host_view(array)
    if found.dtype != dtype or not found.contiguous:
        raise InvalidArgument(
            f"{name} is {'' if found.contiguous else 'strided '}{DTYPE_NAMES[found.dtype]}, "
            f"expected contiguous {DTYPE_NAMES[dtype]}"
        )
    return found


def _need_like(name: str, array: Any, x: View) -> None:
    found = x if array is None else _dense(name, array, _FLOAT32)
    if found.count != x.count:
        raise InvalidArgument(f"{name} has {found.count} elements, expected {x.count}")
