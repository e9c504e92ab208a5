"""What the extension was built from and what it does on this CPU; raises ImportError where there is no extension."""

from typing import Any

from paracomm import _C


def build_info() -> dict[str, Any]:
    """Version, file, compiler, the vector instructions that reductions use here, transports, and GPUs.

    "cuda" is what built the code for GPUs, or None; "why_no_gpu" is None where a GPU can be used.
    """
    gpus, why_no_gpu = _C.gpus()
    return {
        "version": _C.__version__,
        "extension": _C.__file__,
        "compiler": _C.compiler,
        "reduce_isa": _C.reduce_isa(),
        "transports": ["local", "shm", "tcp"],
        "cuda": _C.cuda,
        "gpus": gpus,
        "why_no_gpu": None if gpus else why_no_gpu,
        "emulated_gpus": _C.emulated_gpus(),
    }
