"""What torch calls when it is imported (entry point `torch.backends`): makes the name "paracomm" known to
`torch.distributed`. It must cost next to nothing and never raise, or `import torch` would fail for everybody; so
nothing is imported here before the first process group is made."""

from __future__ import annotations

import atexit
import sys
from typing import Any

NAME = "paracomm"
closes_at_exit = False
"""Communicators are closed at exit by `_close`."""


def register() -> None:
    """Registers the backend, unless torch has no distributed package or knows the name already."""
    close_at_exit()
    try:
        import torch.distributed as dist

        if dist.is_available() and NAME.upper() not in dist.Backend._plugins:
            dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu", "cuda"])
    except Exception as error:
        import warnings

        warnings.warn(f"the torch.distributed backend {NAME!r} is not available: {error}", RuntimeWarning)


def close_at_exit() -> None:
    """Registers, once, the exit handler that closes communicators. Handlers run in the reverse order: those that a
    program registers after it imported torch (or paracomm) run before, and can still communicate."""
    global closes_at_exit
    if not closes_at_exit:
        closes_at_exit = True
        atexit.register(_close)


def _close() -> None:
    communicators = sys.modules.get("paracomm.comm.communicator")
    if communicators is not None:
        communicators.close_all()


def _create(options: Any, settings: Any) -> Any:
    from paracomm.backend import create

    return create(options, settings)
