"""Which interface a rank would use: the one with the route to the master."""

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

SIOCGIFADDR = 0x8915
# RFC 5737: an address that no network has, so that the answer is the default route.
NOWHERE = "192.0.2.1"


def route_to(host: str | None) -> tuple[str | None, str | None]:
    """This machine's address on the route to `host` (None: on the default route), and that interface's name.

    Nothing is sent: connecting a UDP socket only asks the kernel for the route.
    """
    try:
        family, kind, _, _, target = socket.getaddrinfo(host or NOWHERE, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            address = str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return None, None
    return address, interface_of(address)


def interface_of(address: str) -> str | None:
    """The interface that has this IPv4 or IPv6 address, None if none has."""
    wanted = ipaddress.ip_address(address)
    if wanted.version == 6:
        table = Path("/proc/net/if_inet6")
        for line in table.read_text().splitlines() if table.exists() else []:
            digits, *_, name = line.split()
            if int(digits, 16) == int(wanted):
                return name
        return None
    if wanted.is_loopback:
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an IPv4 address
            if answer[20:24] == wanted.packed:
                return name
    return None
