"""The proxy through which an agent in a sandbox reaches other servers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from helpers.service import WAIT_SECONDS
from standins.forward_proxy import ForwardProxy

from ccrun.egress import Egress
from ccrun.worker.egress_proxy import MAX_HEAD_BYTES, MAX_REFUSED, EgressProxy, HostPolicy

LOOPBACK = frozenset({"127.0.0.1"})
EVERYWHERE = HostPolicy(private=LOOPBACK)


@contextlib.asynccontextmanager
async def serving(policy: HostPolicy, egress: Egress | None = None) -> AsyncIterator[tuple[EgressProxy, int]]:
    """Serve the proxy. Yield it and its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    proxy = EgressProxy(policy, egress or Egress())
    async with proxy.serve(listener):
        yield proxy, listener.getsockname()[1]


@contextlib.asynccontextmanager
async def target(heads: list[bytes]) -> AsyncIterator[int]:
    """Serve HTTP: record the heads of requests and answer with `hello`. Yield the port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def exchange(port: int, request: bytes) -> bytes:
    """Send bytes to the proxy; return all that it sends until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        async with asyncio.timeout(WAIT_SECONDS):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_http_request_is_forwarded() -> None:
    """The server gets the path and the headers of the request, without those of the connection to the proxy."""
    heads: list[bytes] = []
    async with target(heads) as server, serving(EVERYWHERE) as (_, port):
        response = await exchange(
            port,
            f"GET http://127.0.0.1:{server}/a?b=%2F HTTP/1.1\r\nHost: 127.0.0.1\r\nProxy-Connection: keep-alive\r\n"
            "Connection: keep-alive\r\nX-Other: 1\r\n\r\n".encode(),
        )
    assert response.endswith(b"\r\n\r\nhello")
    assert [b"GET /a?b=%2F HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Other: 1\r\nConnection: close\r\n\r\n"] == heads


async def test_tunnel_forwards_both_directions() -> None:
    """After CONNECT, all bytes pass."""
    heads: list[bytes] = []
    async with target(heads) as server, serving(EVERYWHERE) as (_, port):
        response = await exchange(port, f"CONNECT 127.0.0.1:{server} HTTP/1.1\r\n\r\nGET /x HTTP/1.1\r\n\r\n".encode())
    assert response.startswith(b"HTTP/1.1 200 Connection established\r\n\r\nHTTP/1.1 200 OK")
    assert [b"GET /x HTTP/1.1\r\n\r\n"] == heads


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "017700000001", "0.0.0.0", "localhost", "LOCALHOST."),
        *("10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.0.9", "224.0.0.1", "240.0.0.1", "192.0.0.9"),
        *(
            "[::1]",
            "[::]",
            "[::ffff:127.0.0.1]",
            "[::ffff:a00:1]",
            "[64:ff9b::7f00:1]",
            "[fe80::1]",
            "[fd00::1]",
            "[2002:7f00:1::]",
        ),
    ],
)
@pytest.mark.parametrize("method", ["CONNECT", "GET"])
async def test_address_that_is_not_public_is_refused(host: str, method: str) -> None:
    """In any spelling, no server of the machine or of a private network is reached."""
    heads: list[bytes] = []
    async with target(heads) as server, serving(HostPolicy()) as (proxy, port):
        name = f"{host}:{server}"
        where = name if method == "CONNECT" else f"http://{name}/"
        response = await exchange(port, f"{method} {where} HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
    assert response.partition(b"\r\n")[0] in (b"HTTP/1.1 403 Forbidden", b"HTTP/1.1 502 Bad Gateway")
    assert [] == heads
    assert response.startswith(b"HTTP/1.1 502") or len(proxy.refused) == 1


async def test_name_with_a_private_address_is_refused_although_it_is_allowed() -> None:
    """The address of the connection decides: an allowed name may resolve to anything."""
    heads: list[bytes] = []
    async with target(heads) as server, serving(HostPolicy(allowed=(frozenset({"localhost"}),))) as (_, port):
        response = await exchange(port, f"CONNECT localhost:{server} HTTP/1.1\r\n\r\n".encode())
    assert response.endswith(b"The agent may not reach localhost: it has no public address.\n")
    assert [] == heads


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("index.example", True),
        ("INdex.example.", True),
        ("files.packages.example", True),
        ("packages.example", False),
        ("evilpackages.example", False),
        ("index.example.evil.example", False),
        ("8.8.8.8", False),
    ],
)
async def test_only_listed_hosts_are_allowed(host: str, allowed: bool) -> None:
    """Others are refused, and remembered with their port. The operator's proxy shows which are passed on."""
    lists = (
        frozenset({"index.example", "*.packages.example"}),
        frozenset({"index.example", "*.packages.example", "other.example"}),
    )
    async with ForwardProxy({}) as upstream:
        egress = Egress(agent_https_proxy=upstream.url)
        async with serving(HostPolicy(allowed=lists), egress) as (proxy, port):
            response = await exchange(port, f"CONNECT {host}:443 HTTP/1.1\r\n\r\n".encode())
    assert (b"502" if allowed else b"403") == response[9:12]
    assert ([] if allowed else [f"{host.lower().rstrip('.')}:443"]) == list(proxy.refused)
    assert len(upstream.requests) == allowed


async def test_host_must_be_in_each_list() -> None:
    """A request cannot allow more than the operator does."""
    policy = HostPolicy(allowed=(frozenset({"a.example"}), frozenset({"b.example"})))
    assert [False, False] == [policy.allows(host) for host in ("a.example", "b.example")]


@pytest.mark.parametrize("method", ["CONNECT", "GET"])
async def test_proxy_of_the_operator_is_used(method: str) -> None:
    """Connections go through it, and it gets the name of the host."""
    heads: list[bytes] = []
    async with target(heads) as server, ForwardProxy({"index.example": server}) as upstream:
        egress = Egress(agent_http_proxy=upstream.url, agent_https_proxy=upstream.url)
        async with serving(HostPolicy(), egress) as (_, port):
            first = "CONNECT index.example:443" if method == "CONNECT" else "GET http://index.example/x"
            inner = "GET /x HTTP/1.1\r\n\r\n" if method == "CONNECT" else ""
            response = await exchange(port, f"{first} HTTP/1.1\r\nHost: index.example\r\n\r\n{inner}".encode())
    assert response.endswith(b"hello")
    assert heads[0].startswith(b"GET /x HTTP/1.1\r\n")
    assert {"index.example"} == upstream.hosts


async def test_proxy_of_the_operator_reaches_no_private_address() -> None:
    """An address is checked even though the operator's proxy connects to it."""
    async with ForwardProxy({}) as upstream, serving(HostPolicy(), Egress(agent_https_proxy=upstream.url)) as (_, port):
        responses = [
            await exchange(port, f"CONNECT {host}:443 HTTP/1.1\r\n\r\n".encode())
            for host in ("127.0.0.1", "0x7f.1", "[::1]", "169.254.0.9")
        ]
    assert [b"403"] * 4 == [response[9:12] for response in responses]
    assert [] == upstream.requests


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n",
        b"GET https://a.example/ HTTP/1.1\r\n\r\n",
        b"CONNECT a.example HTTP/1.1\r\n\r\n",
        b"CONNECT a.example:99999 HTTP/1.1\r\n\r\n",
        b"CONNECT :443 HTTP/1.1\r\n\r\n",
        b"CONNECT a.example:443/x HTTP/1.1\r\n\r\n",
        b"CONNECT [::1:443 HTTP/1.1\r\n\r\n",
        b"GET ftp://a.example/ HTTP/1.1\r\n\r\n",
        b"GET http:///x HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"get http://a.example/ HTTP/1.1\r\n\r\n",
        "CONNECT exämple.org:443 HTTP/1.1\r\n\r\n".encode(),
    ],
)
async def test_other_request_is_400(request_: bytes) -> None:
    """What is no request to a proxy is answered, and nothing is connected to."""
    async with serving(EVERYWHERE) as (_, port):
        assert (await exchange(port, request_)).startswith(b"HTTP/1.1 400 Bad Request\r\n")


async def test_long_head_ends_the_connection() -> None:
    """A head without an end does not fill the memory."""
    async with serving(EVERYWHERE) as (_, port):
        assert b"" == await exchange(port, b"GET http://a.example/ HTTP/1.1\r\nX: " + b"x" * 4 * MAX_HEAD_BYTES)


async def test_server_that_cannot_be_reached_is_502() -> None:
    """The response names the host."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        closed = unused.getsockname()[1]
    async with serving(EVERYWHERE) as (_, port):
        response = await exchange(port, f"CONNECT 127.0.0.1:{closed} HTTP/1.1\r\n\r\n".encode())
    assert response.endswith(b"127.0.0.1 cannot be reached (ConnectionRefusedError).\n")


async def test_refused_hosts_are_bounded() -> None:
    """An agent cannot fill the record."""
    async with serving(HostPolicy(allowed=(frozenset(),))) as (proxy, port):
        for number in range(MAX_REFUSED + 10):
            await exchange(port, f"CONNECT h{number}.example:443 HTTP/1.1\r\n\r\n".encode())
    assert MAX_REFUSED == len(proxy.refused)
