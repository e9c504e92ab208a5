"""What this process has sent over TCP, as its kernel counts it: for engines that do not count themselves."""

from __future__ import annotations

import contextlib
import os
import socket
import struct

# struct tcp_info of linux/tcp.h: bytes that the peer has acknowledged.
BYTES_ACKED = 120


def tcp_bytes_acked() -> dict[int, int]:
    """Bytes that peers have acknowledged so far, for every TCP socket of this process, by inode.

    Sockets that were closed are gone from it. Raises OSError where the kernel does not count (Linux before 4.1).
    """
    found: dict[int, int] = {}
    for name in os.listdir("/proc/self/fd"):
        # A descriptor may be closed meanwhile, by whichever thread owns it.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            kind, _, inode = os.readlink(f"/proc/self/fd/{name}").partition(":[")
            if kind == "socket":
                count = _acked(int(name))
                if count is not None:
                    found[int(inode.rstrip("]"))] = count
    return found


def _acked(descriptor: int) -> int | None:
    try:
        copy = socket.socket(fileno=os.dup(descriptor))
    except OSError:
        return None  # closed, or of a family that Python does not know
    with copy:
        if copy.family not in (socket.AF_INET, socket.AF_INET6) or copy.type != socket.SOCK_STREAM:
            return None
        info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        if len(info) < BYTES_ACKED + 8:
            raise OSError("this kernel's TCP_INFO does not count bytes")
        return int(struct.unpack_from("Q", info, BYTES_ACKED)[0])
