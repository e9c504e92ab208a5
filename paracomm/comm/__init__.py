"""Communicators over torch, NumPy and DLPack arrays. The only room that touches the C++ core."""

from paracomm.comm.communicator import Communicator
from paracomm.comm.group import connect
from paracomm.comm.work import Work

__all__ = ["Communicator", "Work", "connect"]
