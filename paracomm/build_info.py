"""What the extension was built from and what it does on this CPU; raises ImportError where there is no extension."""

import os
from typing import Any

from paracomm import _C

DEVICES = {
    "": "arrays on GPUs go over device memory between the ranks of a host, and through host memory between hosts",
    "emulated": "PARACOMM_DEVICE=emulated: arrays on the CPU are memory of emulated GPUs",
    "host": "PARACOMM_DEVICE=host: arrays on GPUs go through host memory",
}
"""What the values of PARACOMM_DEVICE mean; see paracomm.comm.device."""


def build_info() -> dict[str, Any]:
    """Version, file, compiler, the vector instructions that reductions use here, transports, and GPUs.

    "cuda" is what built the code for GPUs, or None; "why_no_gpu" is None where a GPU can be used; "devices" is what
    PARACOMM_DEVICE makes of arrays.
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
        "devices": _devices(),
    }


def _devices() -> str:
    value = os.environ.get("PARACOMM_DEVICE", "")
    unknown = (
        f"PARACOMM_DEVICE={value} is unknown, and every communicator refuses it: expected emulated, host or nothing"
    )
    return DEVICES.get(value, unknown)
