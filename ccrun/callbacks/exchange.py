"""One HTTP/1.1 request to a receiver, of whose response only the status counts.

Written by hand, since every HTTP client parses the whole head of a response: a receiver that accepts a callback, and then sends a
long header, an unknown encoding, contradictory lengths or half a body, would count as one that does not.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import re
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Final
from urllib.parse import quote, unquote, urlsplit

import aiohappyeyeballs
import attrs

from ccrun.callbacks.guard import AddressNotPublic, CallbackGuard, is_public, public_socket
from ccrun.egress import Egress
from ccrun.errors import CcrunError

#: Bytes of a status line, and of a line of a header. Servers send less than 8 KiB.
MAX_LINE_BYTES: Final = 64 * 1024
#: Lines of the head of a response that are searched for `Retry-After`.
MAX_HEAD_LINES: Final = 1000
#: Responses before the final one, such as 103 Early Hints (RFC 9110, section 15.2).
MAX_INTERIM_RESPONSES: Final = 10
#: Seconds before the next address of a name is tried beside the first (RFC 8305).
NEXT_ADDRESS_SECONDS: Final = 0.25
#: Bytes of a request that are written in one step.
WRITE_BYTES: Final = 64 * 1024

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: [^\r\n]*)?\r?\n")
#: The printable characters of ASCII: what of a URL is sent as it was given.
_AS_GIVEN: Final = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


class ExchangeError(CcrunError):
    """The receiver did not respond.

    Args:
        final: Whether a retry would not change that.
    """

    def __init__(self, message: str, *, final: bool = False) -> None:
        self.final = final
        super().__init__(message)


class AddressForbidden(ExchangeError):
    """The callback must not go to this address."""

    def __init__(self) -> None:
        super().__init__("The callback's address is not public.", final=True)


@attrs.frozen(kw_only=True)
class Response:
    """The response of a receiver.

    Args:
        retry_after: The header `Retry-After`; not read if the status is a success.
    """

    status: int
    retry_after: str | None = None


@attrs.frozen(kw_only=True)
class _Target:
    """Where a request goes: the parts of a URL.

    Args:
        host: In ASCII, without brackets.
        path: Path and query, as they were given.
        authorization: The value of a header for the user and password of the URL.
    """

    is_secure: bool
    host: str
    port: int
    path: str
    authorization: str | None

    @classmethod
    def parse(cls, url: str) -> _Target:
        """Parse a URL.

        Raises:
            ExchangeError: It is not valid.
        """
        try:
            parts = urlsplit(url)
            is_secure = parts.scheme == "https"
            host = (parts.hostname or "").encode("ascii" if ":" in (parts.hostname or "") else "idna").decode()
            port = parts.port or (443 if is_secure else 80)
            user, password = (
                unquote(parts.username or "", errors="strict"),
                unquote(parts.password or "", errors="strict"),
            )
            is_valid = parts.scheme in ("http", "https") and bool(host) and ":" not in user
        except ValueError:
            is_valid = False
        if not is_valid:
            raise ExchangeError("The callback's address is not a valid URL.", final=True)
        path = (parts.path or "/") + (f"?{parts.query}" if "?" in url.partition("#")[0] else "")
        credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
        return cls(
            is_secure=is_secure,
            host=host,
            port=port,
            # Anything else cannot be in a request line: letters of other alphabets, which are sent in UTF-8.
            path=quote(path, safe=_AS_GIVEN),
            authorization=f"Basic {credentials}" if user or password else None,
        )

    @property
    def address(self) -> str:
        """Host and port, as in the header `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_secure else 80) else f"{host}:{self.port}"


async def post(url: str, body: bytes, headers: Mapping[str, str], *, guard: CallbackGuard, egress: Egress) -> Response:
    """Send a POST request. The caller has a timeout.

    Args:
        url: http or https. `user:password@` in it becomes Basic authentication. Path and query are sent as they are.

    Raises:
        ExchangeError: The receiver cannot be reached, or does not respond with HTTP.
        AddressForbidden: The receiver has no public address, and the guard requires one.
    """
    target = _Target.parse(url)
    proxy = egress.proxy_for(url)
    lines = {
        "Host": target.address,
        **headers,
        "Accept": "*/*",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    if target.authorization is not None:
        lines["Authorization"] = target.authorization
    async with contextlib.AsyncExitStack() as stack:
        if proxy is None:
            sock = await _connect(target.host, target.port, guard if not guard.trusts(target.host) else None)
            reader, writer = await stack.enter_async_context(
                _streams(sock, target if target.is_secure else None, egress)
            )
            path = target.path
        else:
            if not guard.trusts(target.host):
                await _check_host(target.host)
            via = _Target.parse(proxy)
            try:
                sock = await _connect(via.host, via.port, None)
            except ExchangeError:
                raise ExchangeError("The proxy could not be connected to.") from None
            reader, writer = await stack.enter_async_context(_streams(sock, None, egress))
            path = target.path if target.is_secure else f"http://{target.address}{target.path}"
            if target.is_secure:
                await _tunnel(reader, writer, target, via)
                with _tls_errors():
                    await writer.start_tls(await _context(egress), server_hostname=target.host)
            elif via.authorization is not None:
                lines["Proxy-Authorization"] = via.authorization
        head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
        sending = asyncio.create_task(_send(writer, head.encode("latin-1") + body))
        stack.push_async_callback(_cancelled, sending)
        return await _response(reader)


# --- connections -----------------------------------------------------------------------------------------------------


async def _connect(host: str, port: int, guard: CallbackGuard | None) -> socket.socket:
    """Return a socket that is connected to an address of a host.

    Args:
        guard: Limits the addresses; None for all.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ExchangeError("The receiver's name could not be looked up.") from None
    try:
        return await aiohappyeyeballs.start_connection(
            found,
            happy_eyeballs_delay=NEXT_ADDRESS_SECONDS,
            interleave=1,
            socket_factory=None if guard is None else public_socket,
        )
    except AddressNotPublic:
        raise AddressForbidden from None
    except OSError:
        if guard is not None and not any(is_public(str(address[0])) for *_, address in found):
            raise AddressForbidden from None
        raise ExchangeError("The receiver could not be connected to.") from None


async def _check_host(host: str) -> None:
    """Check the addresses of a name that a proxy connects to. The proxy may know names that this machine does not."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return
    if not all(is_public(str(address[0])) for *_, address in found):
        raise AddressForbidden


@contextlib.asynccontextmanager
async def _streams(
    sock: socket.socket, secured: _Target | None, egress: Egress
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Yield the streams of a connection.

    Args:
        secured: The receiver whose certificate is checked; None for a connection without TLS.
    """
    with _tls_errors():
        reader, writer = await asyncio.open_connection(
            sock=sock,
            limit=MAX_LINE_BYTES,
            ssl=await _context(egress) if secured else None,
            server_hostname=secured.host if secured else None,
        )
    try:
        yield reader, writer
    finally:
        # Without waiting for the receiver, which may still send a body.
        writer.transport.abort()


async def _tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: _Target, via: _Target) -> None:
    """Let a proxy connect to the receiver (RFC 9110, section 9.3.6)."""
    host = f"[{target.host}]" if ":" in target.host else target.host
    address = f"{host}:{target.port}"
    authorization = f"Proxy-Authorization: {via.authorization}\r\n" if via.authorization is not None else ""
    writer.write(f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n{authorization}\r\n".encode("latin-1"))
    response = await _response(reader)
    if not 200 <= response.status < 300:
        raise ExchangeError(f"The proxy responded with {response.status}.")
    while (await _line(reader)).strip():
        pass


async def _context(egress: Egress) -> ssl.SSLContext:
    return egress.tls if isinstance(egress.tls, ssl.SSLContext) else await asyncio.to_thread(_system_context)


@contextlib.contextmanager
def _tls_errors() -> Iterator[None]:
    try:
        yield
    except ssl.SSLCertVerificationError:
        raise ExchangeError("The receiver's certificate cannot be trusted.") from None
    except (OSError, ValueError):
        raise ExchangeError("No secure connection to the receiver could be made.") from None


@functools.cache
def _system_context() -> ssl.SSLContext:
    return ssl.create_default_context()


# --- the exchange ----------------------------------------------------------------------------------------------------


async def _send(writer: asyncio.StreamWriter, content: bytes) -> None:
    # A receiver may respond and close the connection before it has read everything, which is no error.
    with contextlib.suppress(OSError):
        for start in range(0, len(content), WRITE_BYTES):
            writer.write(content[start : start + WRITE_BYTES])
            await writer.drain()


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def _response(reader: asyncio.StreamReader) -> Response:
    """Read a response as far as it counts."""
    for _ in range(MAX_INTERIM_RESPONSES):
        match = _STATUS_LINE.fullmatch(await _line(reader))
        if match is None:
            break
        status = int(match[1])
        if 200 <= status < 300:
            return Response(status=status)
        retry_after = await _retry_after(reader)
        if status >= 200:
            return Response(status=status, retry_after=retry_after)
    raise ExchangeError("The receiver's response is not HTTP.")


async def _retry_after(reader: asyncio.StreamReader) -> str | None:
    """Read the rest of a head, and return the header `Retry-After`. Whatever is wrong with the head is no error."""
    found = None
    with contextlib.suppress(ExchangeError):
        for _ in range(MAX_HEAD_LINES):
            name, _colon, value = (await _line(reader)).decode("latin-1").strip().partition(":")
            if not name:
                break
            if name.lower() == "retry-after":
                found = value.strip()
    return found


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as end:
        if end.partial:
            raise ExchangeError("The receiver's response is not HTTP.") from None
    except asyncio.LimitOverrunError:
        raise ExchangeError("The receiver's response is not HTTP.") from None
    except OSError:
        pass
    raise ExchangeError("The receiver closed the connection without a response.")
