from __future__ import annotations

import attrs
import pytest
from helpers.callbacks import (
    PUBLIC_ONLY,
    QUICK,
    receiver,
    respond,
    send,
)

from ccrun.callbacks.deliver import Delivery
from ccrun.callbacks.guard import CallbackGuard, is_public

LOOPBACK_HOSTS = [
    "127.0.0.1",
    "127.1",
    "0x7f.1",
    "0x7f000001",
    "0177.0.0.1",
    "017700000001",
    "2130706433",
    "0",
    "0.0.0.0",
    "127.8.8.8",
    "①②⑦.⓪.⓪.①",
    "127。0。0。1",
    "127%2E0%2E0%2E1",
    "localhost",
    "LOCALHOST.",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[::ffff:0:127.0.0.1]",
    "user:made-up@127.0.0.1",
]


@pytest.mark.parametrize("host", LOOPBACK_HOSTS)
async def test_no_notation_of_loopback_is_connected_to(host: str) -> None:
    """Delivery makes no connection to loopback, however the host is written."""
    async with receiver(respond(200)) as scripted:
        port = scripted.url.split(":")[2]
        delivery = await send(f"http://{host}:{port}", guard=PUBLIC_ONLY, policy=attrs.evolve(QUICK, attempts=1))
        assert not delivery.delivered
        assert scripted.requests == []


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "①②⑦.⓪.⓪.①",
        "127。0。0。1",
        "0x7f.1",
        "localhost",
        "[::1]",
        "169.254.169.254",
        "[64:ff9b::a9fe:a9fe]",
    ],
)
async def test_private_address_is_rejected(host: str) -> None:
    """The delivery fails finally, and its error does not have the address."""
    error = "The callback's address is not public."
    assert Delivery(delivered=False, attempts=1, error=error, final=True) == await send(
        f"http://{host}/", guard=PUBLIC_ONLY
    )


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.255.255.254",
        "0.0.0.0",
        "10.0.0.1",
        "100.64.0.1",
        "100.100.100.200",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::8.8.8.8",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::ffff:0:127.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b::8.8.8.8",
        "64:ff9b:1::1",
        "100::1",
        "2001::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:2::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:808:808::1",
        "3fff::1",
        "4000::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%lo",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
        "",
        "localhost",
        "8.8.8.8.",
        "[::ffff:127.0.0.1]",
        "[2606:4700:4700::1111]",
        "①②⑦.⓪.⓪.①",
        "127。0。0。1",
        "0x7f.1",
        "2130706433",
        "127.1",
        "0177.0.0.1",
        "8.8.8.8/32",
    ],
)
def test_other_addresses_are_not_public(address: str) -> None:
    """Private, reserved, embedded and malformed addresses are not public."""
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "::ffff:8.8.8.8", "2606:4700:4700::1111", "2a00:1450:4001::1"]
)
def test_addresses_of_the_internet_are_public(address: str) -> None:
    """Addresses of the public internet are public, also when they are mapped to IPv6."""
    assert is_public(address)


@pytest.mark.parametrize(
    ("allowed", "host", "trusted"),
    [
        ("hooks.example.com", "hooks.example.com", True),
        ("hooks.example.com", "HOOKS.example.com.", True),
        ("Hooks.Example.com", "hooks.example.com", True),
        ("hooks.example.com", "x.hooks.example.com", False),
        ("*.example.com", "a.example.com", True),
        ("*.example.com", "a.b.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "badexample.com", False),
        ("*.example.com", "example.com.evil.net", False),
        ("10.0.0.5", "10.0.0.5", True),
        ("::1", "::1", True),
        ("", "example.com", False),
        ("*", "example.com", False),
    ],
)
def test_guard_trusts_allowed_hosts(allowed: str, host: str, trusted: bool) -> None:
    """A host is trusted if its name equals an allowed name, or matches an allowed `*.` pattern."""
    assert trusted is CallbackGuard(allowed_hosts=frozenset({allowed})).trusts(host)


async def test_allowed_host_may_be_private() -> None:
    """An allowed host may have a private address; the same address is rejected under another name."""
    async with receiver(respond(200)) as scripted:
        allowed_url = scripted.url.replace("127.0.0.1", "localhost")
        guard = CallbackGuard(allowed_hosts=frozenset({"localhost"}))
        assert Delivery(delivered=True, attempts=1) == await send(allowed_url, guard=guard)
        assert not (await send(scripted.url, guard=guard)).delivered
        assert len(scripted.requests) == 1
