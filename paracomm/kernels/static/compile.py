"""Compiles kernels for a GPU that is not there. Triton brings the assembler and the tools that read its output."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from paracomm.errors import Error
from paracomm.kernels.static.case import Case

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Binary:
    """A compiled case. registers: of a thread; stack, shared: bytes of a thread and of a block; warps: of a block, with
    those that specialisation added; code: nvdisasm's text; ptx: what it came from."""

    case: Case
    arch: int
    registers: int
    stack: int
    shared: int
    warps: int
    code: str
    ptx: str


def compile_case(case: Case, arch: int) -> Binary:
    """`case` for sm_`arch`. Raises Error, with the compiler's words, where it does not compile."""
    names = list(case.fn.arg_names)
    unknown = (set(case.types) | set(case.constants)) ^ set(names)
    if unknown:
        raise Error(f"case '{case.name}': {sorted(unknown)} are not what {case.fn.__name__} takes: {names}")
    signature = {name: case.types.get(name, "constexpr") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if (signature[name].startswith("*") or signature[name] in ("i32", "i64")) and name not in case.unaligned
    }
    source = ASTSource(fn=case.fn, signature=signature, constexprs=dict(case.constants), attrs=aligned)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        raise Error(f"case '{case.name}' does not compile for sm_{arch}: {type(error).__name__}: {error}") from error
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise Error(f"case '{case.name}': cuobjdump printed no usage of resources: {usage[:200]}")
    return Binary(
        case, arch, int(found[1]), int(found[2]) + int(found[4]), compiled.metadata.shared, compiled.metadata.num_warps,
        code, compiled.asm["ptx"],
    )  # fmt: skip


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(TOOLS / name), *arguments], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        raise Error(f"{name} failed: {done.stderr.strip()[:300]}")
    return done.stdout
