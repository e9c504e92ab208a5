"""One kernel at one configuration, as a launcher would compile it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

POINTERS = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "int32": "*i32",
    "int64": "*i64",
    "bool": "*i1",
}


@dataclass(frozen=True)
class Case:
    """A kernel to compile.

    Args:
        name: of the configuration, unique among all kernels' cases of an architecture: "attention_forward d128 bf16".
        fn: the @triton.jit function.
        types: of its arguments by name, in Triton's signature form ("*bf16", "i32", "fp32", a tensor descriptor
            "tensordesc<bf16[128, 64]>"); arguments that are missing are constants.
        constants: values of the others.
        warps, stages: num_warps and num_stages.
        matmul: it multiplies matrices on tensor cores.
        tma: it loads by tensor descriptors. specialised: its warps have different work.
        unaligned: integer arguments that are not multiples of 16; pointers and all others are.
    """

    name: str
    fn: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2
    matmul: bool = False
    tma: bool = False
    specialised: bool = False
    unaligned: frozenset[str] = field(default_factory=frozenset)
