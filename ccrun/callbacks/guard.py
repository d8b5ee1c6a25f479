"""Where callbacks must not go, checked on the address of each connection."""

from __future__ import annotations

import ipaddress
import socket
from typing import Final

import aiohttp
import attrs

#: The only IPv6 block of public addresses. Those outside are local or map to any IPv4 address (NAT64, ::/96,
#: ::ffff:0:0:0/96), and `ipaddress.is_global` accepts many of them.
_PUBLIC_IPV6: Final = ipaddress.IPv6Network("2000::/3")
#: Special addresses in IANA's registries that some release of Python calls global: IETF protocols (the metadata server of one
#: cloud is there), 6to4 relays, Teredo and 6to4 (which map to IPv4 addresses), documentation.
_NOT_PUBLIC: Final = tuple(
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "2001::/32", "2002::/16", "3fff::/20")
)


@attrs.frozen(kw_only=True)
class CallbackGuard:
    """Where callbacks may go: to public addresses, and to others only if a field allows it."""

    #: To all addresses, on a developer's machine.
    everywhere: bool = False
    #: To all addresses of these hosts: names, addresses, or `*.example.com` for all names below one. In ASCII, with
    #: international names in the `xn--` form.
    allowed_hosts: frozenset[str] = frozenset()

    def trusts(self, host: str) -> bool:
        """Return whether callbacks to this host may go to an address that is not public."""
        host = host.lower().rstrip(".")
        names = (name.lower().rstrip(".") for name in self.allowed_hosts)
        return self.everywhere or any(
            host.endswith(name[1:]) if name.startswith("*.") else host == name for name in names
        )


def is_public(address: str) -> bool:
    """Return whether this is an IP address of the public internet. False for a name."""
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
    """The address is not public. An OSError, so that aiohttp tries the next address of the name."""


def public_socket(address_info: aiohttp.AddrInfoType) -> socket.socket:
    """Return a socket for an address, as the `socket_factory` of aiohttp.

    Raises:
        AddressNotPublic: The address is not public.
    """
    # Checked here, where the address of the connection is certain: literals in any form do not pass the resolver, and a name may
    # resolve to another address than a moment ago.
    family, kind, protocol, _, address = address_info
    if not is_public(str(address[0])):
        raise AddressNotPublic
    return socket.socket(family, kind, protocol)
