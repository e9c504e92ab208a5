"""Collective communication as data, and Transformers trained on it."""

from paracomm.version import __version__

__all__ = ["__version__"]
