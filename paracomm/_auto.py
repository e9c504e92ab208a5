"""What torch calls when it is imported (entry point `torch.backends`): makes the name "paracomm" known to
`torch.distributed`. It must cost next to nothing and never raise, or `import torch` would fail for everybody; so
nothing is imported here before the first process group is made."""

from __future__ import annotations

from typing import Any

from paracomm import background

NAME = "paracomm"


def register() -> None:
    """Registers the backend, unless torch has no distributed package or knows the name already."""
    background.close_at_exit()
    try:
        import torch.distributed as dist

        if dist.is_available() and NAME.upper() not in dist.Backend._plugins:
            dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu", "cuda"])
    except Exception as error:
        import warnings

        warnings.warn(f"the torch.distributed backend {NAME!r} is not available: {error}", RuntimeWarning)


def _create(options: Any, settings: Any) -> Any:
    from paracomm.backend import create

    return create(options, settings)
