"""Where a callback may not go: checked on the address that is connected to."""

from __future__ import annotations

import ipaddress
import socket
from typing import Final

import aiohttp
import attrs

#: The only IPv6 block that IANA has opened for the public. What lies outside is local, or leads to an IPv4 address of
#: anybody's choice (NAT64, ::/96, ::ffff:0:0:0/96), and `ipaddress.is_global` lets much of it pass.
_PUBLIC_IPV6: Final = ipaddress.IPv6Network("2000::/3")
#: What some release of Python calls global and IANA's registries of special addresses do not: IETF protocols (one cloud
#: has its metadata server there), 6to4 relays, Teredo and 6to4 (which lead to IPv4 addresses), documentation.
_NOT_PUBLIC: Final = tuple(
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "2001::/32", "2002::/16", "3fff::/20")
)


@attrs.frozen(kw_only=True)
class CallbackGuard:
    """Where a callback may go: to public addresses, and to the rest of the network only as this says."""

    #: Everywhere, as on a developer's machine.
    everywhere: bool = False
    #: To whatever address these hosts have: exact names or addresses, or `*.example.com` for all names below one. ASCII, so
    #: international names in their `xn--` form.
    allowed_hosts: frozenset[str] = frozenset()

    def trusts(self, host: str) -> bool:
        """Return whether a callback to the host may go to an address that is not public."""
        host = host.lower().rstrip(".")
        names = (name.lower().rstrip(".") for name in self.allowed_hosts)
        return self.everywhere or any(
            host.endswith(name[1:]) if name.startswith("*.") else host == name for name in names
        )


def is_public(address: str) -> bool:
    """Return whether an IP address, as a socket is given it, belongs to the public internet.

    False for whatever is not an address, so that a name never passes for one.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip
    return (
        ip.is_global
        and not ip.is_multicast
        and (ip.version == 4 or ip in _PUBLIC_IPV6)
        and not any(ip in network for network in _NOT_PUBLIC)
    )


class AddressNotPublic(OSError):
    """An OSError, so that aiohttp goes on to the next address of the name, as after a connection that failed."""


def public_socket(address_info: aiohttp.AddrInfoType) -> socket.socket:
    # The one place where the address is known for certain: literals in any spelling pass by the resolver, and what a name
    # resolved to a moment ago says nothing about now.
    family, kind, protocol, _, address = address_info
    if not is_public(str(address[0])):
        raise AddressNotPublic
    return socket.socket(family, kind, protocol)
