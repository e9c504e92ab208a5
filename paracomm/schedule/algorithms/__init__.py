"""One file a family; importing this package registers them all."""

from . import direct, one_shot, ring

__all__ = ["direct", "one_shot", "ring"]
