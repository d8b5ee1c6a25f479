"""Callbacks: signs the bytes that are sent, tries again while that makes sense, knows where a callback may not go.

Delivers one body to one receiver and says what became of it. What the body holds, whether a callback is owed and when
another delivery is due, others decide.

A body that `ccrun.ijson.dumps` printed can be verified by parsing it and printing it again, in JavaScript always. In Python
(`json.dumps(…, separators=(",", ":"))`) it can be unless the body holds a character outside printable ASCII (DEL included) or
a number with a magnitude from 1e-9 up to 1e-4: Python spells those otherwise, one text cannot suit both, and JavaScript wins.
A receiver that verifies the raw bytes, which every Standard Webhooks library does, has no such limits.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import datetime as dt
import email.utils
import hmac
import io
import ipaddress
import itertools
import random
import socket
import time
from typing import Final

import aiohttp
import attrs
import stamina
import stamina.instrumentation
from yarl import URL

from ccrun.errors import CcrunError
from ccrun.task import Secret

#: Receivers answer at once and work later; one that needs longer than this is not well.
TRY_SECONDS: Final = 10.0
#: With the pauses between them, five tries span about half a minute: the time in which a receiver is deployed anew.
ATTEMPTS: Final = 5
#: The worker waits for its delivery, and a worker costs money. What is not delivered by then, a sweep delivers later.
TOTAL_SECONDS: Final = 60.0
#: Pauses of about 1, 3, 9 and 27 s.
FIRST_PAUSE_SECONDS: Final = 1.0
PAUSE_GROWTH: Final = 3
#: A receiver that wants to be left alone for longer than a day is misconfigured.
MAX_RETRY_AFTER_SECONDS: Final = 24 * 3600.0

USER_AGENT: Final = "cloudrun-claude-code/async-task"
#: Marks a secret that holds its key in base64 (Standard Webhooks).
KEY_PREFIX: Final = "whsec_"

#: Server errors, and the few others that pass by themselves: Request Timeout, Too Early, Too Many Requests.
_PASSING: Final = frozenset({408, 425, 429, *range(500, 600)})

#: The only IPv6 block that IANA has opened for the public. What lies outside is local, or leads to an IPv4 address of
#: anybody's choice (NAT64, ::/96, ::ffff:0:0:0/96), and `ipaddress.is_global` lets much of it pass.
_PUBLIC_IPV6: Final = ipaddress.IPv6Network("2000::/3")
#: What some release of Python calls global and IANA's registries of special addresses do not: IETF protocols (one cloud
#: has its metadata server there), 6to4 relays, Teredo and 6to4 (which lead to IPv4 addresses), documentation.
_NOT_PUBLIC: Final = tuple(
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "2001::/32", "2002::/16", "3fff::/20")
)


# Otherwise stamina would look for its hooks, and import them, when the first retry is due: in the event loop.
stamina.instrumentation.get_on_retry_hooks()


@attrs.frozen(kw_only=True)
class Patience:
    """How long a delivery goes on."""

    #: One try: from the look-up of the name until the status of the answer.
    try_seconds: float = TRY_SECONDS
    attempts: int = ATTEMPTS
    #: All tries and pauses. A try is begun only when it can have its full time.
    total_seconds: float = TOTAL_SECONDS
    #: Each further pause is `PAUSE_GROWTH` times as long; all are shortened by up to half at random.
    first_pause_seconds: float = FIRST_PAUSE_SECONDS


@attrs.frozen(kw_only=True)
class Guard:
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


@attrs.frozen(kw_only=True)
class Delivery:
    """What became of a delivery."""

    delivered: bool
    attempts: int
    #: One sentence about the last try; holds nothing of the URL. None when delivered.
    error: str | None = None
    #: Whether the answer was one that does not change by asking again.
    final: bool = False
    #: How long the receiver itself asked to be left alone.
    retry_after_seconds: float | None = None


def sign(body: bytes, *, webhook_id: str, secret: Secret, timestamp: int) -> dict[str, str]:
    """Return the headers that go with a body.

    `X-Webhook-Signature` is the hex HMAC-SHA256 of `{timestamp}.{body}` under the secret's UTF-8 bytes.
    `webhook-signature` is that of the Standard Webhooks specification, of `{id}.{timestamp}.{body}`. Its key is what
    stands in base64 after `whsec_`; a secret of another form is used as it is, and a library is given its base64.

    Args:
        webhook_id: The same for each try, so that a receiver sees a repetition; holds no dot.
        timestamp: Unix time in seconds. Receivers commonly refuse one that is five minutes off.
    """
    secret_bytes = secret.reveal().encode()
    ours = hmac.digest(secret_bytes, b"%d.%b" % (timestamp, body), "sha256")
    standard = hmac.digest(_standard_key(secret), b"%b.%d.%b" % (webhook_id.encode(), timestamp, body), "sha256")
    return {
        "Content-Type": "application/json",
        "User-Agent": USER_AGENT,
        "X-Webhook-Signature": f"sha256={ours.hex()}",
        "X-Webhook-Timestamp": str(timestamp),
        "webhook-id": webhook_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(standard).decode()}",
    }


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


async def deliver(
    url: Secret, body: bytes, *, webhook_id: str, secret: Secret, guard: Guard, patience: Patience | None = None
) -> Delivery:
    """POST a body until a receiver takes it or there is no sense in going on. Never raises but when it is cancelled.

    A 2xx is success. No answer, 5xx, 408, 425 and 429 are tried again, each time signed anew, after what `Retry-After`
    asks for and a growing pause; any other answer is final. Redirects are not followed; the body of an answer is not read.

    Args:
        url: http or https; `user:password@` in it becomes Basic authentication.
        webhook_id: See `sign`.
        patience: By default, that of a worker.
    """
    patience = patience or Patience()
    clock = asyncio.get_running_loop().time
    try_seconds = min(patience.try_seconds, patience.total_seconds)
    last_start = clock() + patience.total_seconds - try_seconds
    pauses = (
        patience.first_pause_seconds * PAUSE_GROWTH**tries * random.uniform(0.5, 1)  # noqa: S311 - not a secret
        for tries in itertools.count()
    )

    def pause_after(error: Exception) -> float | bool:
        if not isinstance(error, _Undelivered) or error.final:
            return False
        seconds = (error.retry_after_seconds or 0.0) + next(pauses)
        return seconds if clock() + seconds <= last_start else False

    attempts = 0
    try:
        async for attempt in stamina.retry_context(pause_after, attempts=patience.attempts, timeout=None):
            with attempt:
                attempts = attempt.num
                headers = sign(body, webhook_id=webhook_id, secret=secret, timestamp=int(time.time()))
                await _post(url, body, headers, guard, try_seconds)
    except _Undelivered as error:
        return Delivery(
            delivered=False,
            attempts=attempts,
            error=error.message,
            final=error.final,
            retry_after_seconds=error.retry_after_seconds,
        )
    return Delivery(delivered=True, attempts=attempts)


class _Undelivered(CcrunError):
    """The receiver did not take the callback."""

    def __init__(self, message: str, *, final: bool = False, retry_after_seconds: float | None = None) -> None:
        self.final = final
        self.retry_after_seconds = retry_after_seconds
        super().__init__(message)


class _NotPublic(OSError):
    """An OSError, so that aiohttp goes on to the next address of the name, as after a connection that failed."""


def _standard_key(secret: Secret) -> bytes:
    text = secret.reveal()
    if text.startswith(KEY_PREFIX):
        try:
            # Padding may be missing, and what there is too much of is passed over.
            return base64.b64decode(text.removeprefix(KEY_PREFIX) + "==")
        except binascii.Error:
            pass
    return text.encode()


def _public_socket(address_info: aiohttp.AddrInfoType) -> socket.socket:
    # The one place where the address is known for certain: literals in any spelling pass by the resolver, and what a name
    # resolved to a moment ago says nothing about now.
    family, kind, protocol, _, address = address_info
    if not is_public(str(address[0])):
        raise _NotPublic
    return socket.socket(family, kind, protocol)


def _session(guard: Guard, host: str) -> aiohttp.ClientSession:
    """Return a session for one request, which takes nothing from the environment, from before or from elsewhere."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            socket_factory=None if guard.trusts(host) else _public_socket, use_dns_cache=False, force_close=True
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        trust_env=False,
    )


async def _post(url: Secret, body: bytes, headers: dict[str, str], guard: Guard, seconds: float) -> None:
    """Send one request; return if it is answered with a 2xx, else raise `_Undelivered`."""
    try:
        target = URL(url.reveal())
        if target.raw_user or target.raw_password:
            # By hand, since aiohttp takes them as Latin-1.
            credentials = aiohttp.encode_basic_auth(target.user or "", target.password or "")
            headers = {**headers, "Authorization": credentials}
            target = target.with_user(None)
        async with _session(guard, target.raw_host or "") as session:
            async with asyncio.timeout(seconds):
                # As a file, which aiohttp sends piece by piece.
                answer = await session.post(target, data=io.BytesIO(body), headers=headers, allow_redirects=False)
            answer.close()
    except TimeoutError:
        raise _Undelivered(f"The receiver did not answer within {seconds:g} s.") from None
    except (aiohttp.ClientError, ValueError) as error:
        raise _explained(error) from None
    status = answer.status
    if 200 <= status < 300:
        return
    if 300 <= status < 400:
        raise _Undelivered(
            f"The receiver answered {status} to another address; redirects are not followed.", final=True
        )
    raise _Undelivered(
        f"The receiver answered {status}.",
        final=status not in _PASSING,
        retry_after_seconds=_retry_after(answer.headers.get("Retry-After"), dt.datetime.now(dt.UTC)),
    )


def _explained(error: aiohttp.ClientError | ValueError) -> _Undelivered:
    match error:
        case aiohttp.ClientConnectorError(os_error=_NotPublic()):
            return _Undelivered("The callback's address is not public.", final=True)
        case aiohttp.ClientConnectorCertificateError():
            return _Undelivered("The receiver's certificate cannot be trusted.")
        case aiohttp.ClientSSLError():
            return _Undelivered("No secure connection to the receiver could be made.")
        case aiohttp.ClientConnectorDNSError():
            return _Undelivered("The receiver's name could not be looked up.")
        case aiohttp.ClientConnectorError():
            return _Undelivered("The receiver could not be connected to.")
        case aiohttp.ClientResponseError():
            return _Undelivered("The receiver's answer is not HTTP.")
        case aiohttp.NonHttpUrlClientError() | ValueError():
            return _Undelivered("The callback's address is not a valid URL.", final=True)
        case _:
            return _Undelivered("The receiver closed the connection without an answer.")


def _retry_after(wish: str | None, now: dt.datetime) -> float | None:
    """Return the seconds that a `Retry-After` asks for (RFC 9110, section 10.2.3): a number of them, or a date."""
    if wish is None:
        return None
    if wish.isascii() and wish.isdigit():
        seconds = float(wish)
    else:
        try:
            date = email.utils.parsedate_to_datetime(wish)
        except (ValueError, OverflowError):
            return None
        # A date without a zone is in UTC like every date of HTTP.
        seconds = (date.replace(tzinfo=date.tzinfo or dt.UTC) - now).total_seconds()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)
