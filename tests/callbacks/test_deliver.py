from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime as dt
import hashlib
import hmac
import os
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from helpers.javascript import RECEIVERS, node_with_packages
from hypothesis import example, given, settings
from hypothesis import strategies as st
from standardwebhooks import Webhook

from ccrun import ijson, javascript_json
from ccrun.callbacks.deliver import Delivery, RetryPolicy, _retry_after, deliver
from ccrun.callbacks.guard import CallbackGuard, is_public
from ccrun.callbacks.sign import sign
from ccrun.task import Secret

SECRET = Secret("made-up secret, ünïcödé")
BODY = b'{"taskId":"t-1","status":"completed"}'
EVERYWHERE = CallbackGuard(everywhere=True)
PUBLIC_ONLY = CallbackGuard()
QUICK = RetryPolicy(attempt_seconds=5, attempts=4, total_seconds=20, first_delay_seconds=0.01)


async def send(
    url: str, body: bytes = BODY, guard: CallbackGuard = EVERYWHERE, policy: RetryPolicy = QUICK
) -> Delivery:
    """Deliver as the tests commonly do: quickly, and to loopback too."""
    return await deliver(Secret(url), body, webhook_id="msg-t-1", secret=SECRET, guard=guard, policy=policy)


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_signature_covers_timestamp_and_body() -> None:
    """The headers are those that the guide describes and those of the Standard Webhooks specification."""
    headers = sign(b'{"a":1}', webhook_id="msg-1", secret=Secret("abc"), timestamp=1700000000)
    ours = hmac.new(b"abc", b'1700000000.{"a":1}', hashlib.sha256).hexdigest()
    standard = base64.b64encode(hmac.new(b"abc", b'msg-1.1700000000.{"a":1}', hashlib.sha256).digest()).decode()
    assert {
        "Content-Type": "application/json",
        "User-Agent": "cloudrun-claude-code/async-task",
        "X-Webhook-Signature": f"sha256={ours}",
        "X-Webhook-Timestamp": "1700000000",
        "webhook-id": "msg-1",
        "webhook-timestamp": "1700000000",
        "webhook-signature": f"v1,{standard}",
    } == headers


@pytest.mark.parametrize(
    ("secret", "given_to_library"),
    [
        (f"whsec_{base64.b64encode(bytes(32)).decode()}", f"whsec_{base64.b64encode(bytes(32)).decode()}"),
        ("whsec_YWJjZA", "whsec_YWJjZA"),
        ("0123abcd" * 8, base64.b64encode(b"0123abcd" * 8).decode()),
        ("ünïcödé", base64.b64encode("ünïcödé".encode()).decode()),
        ("whsec_a", base64.b64encode(b"whsec_a").decode()),
    ],
)
def test_standard_webhooks_library_verifies(secret: str, given_to_library: str) -> None:
    """The reference library verifies, given a `whsec_` secret as it is and any other in base64."""
    body = '{"é":"\u2028"}'.encode()
    headers = sign(body, webhook_id="msg-1", secret=Secret(secret), timestamp=int(time.time()))
    assert Webhook(given_to_library).verify(body, headers) == {"é": "\u2028"}


# --- receivers as users write them -----------------------------------------------------------------------------------


@contextmanager
def running(*command: str) -> Iterator[str]:
    """Run a receiver that prints its port; the URL at which it takes callbacks."""
    environment = {"PATH": os.environ["PATH"], "CLOUDRUN_CALLBACK_SECRET": SECRET.reveal(), "PYTHONUTF8": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/webhooks/claude-complete"
        finally:
            process.kill()


@pytest.fixture(scope="module")
def express() -> Iterator[str]:
    """The guide's Node receiver under the real Express, which is installed on first use."""
    node = node_with_packages()
    with running(node, str(RECEIVERS / "express_receiver.js")) as url:
        yield url


@pytest.fixture(scope="module")
def flask() -> Iterator[str]:
    """The guide's Python receiver under the real Flask."""
    with running(sys.executable, str(RECEIVERS / "flask_receiver.py")) as url:
        yield url


def payload(metadata: Any) -> bytes:
    """Return a callback as it is sent, with metadata that a request brought."""
    return javascript_json.dumps(
        {"taskId": "t-1", "status": "completed", "exitCode": 0, "error": None, "metadata": metadata}
    )


def nested(depth: int) -> Any:
    """Return a value of so many levels."""
    value: Any = 1.5
    for _ in range(depth // 2):
        value = {"a": [value]}
    return value


VERIFIED = Delivery(delivered=True, attempts=1)
NUMBERS = st.one_of(
    st.integers(-ijson.MAX_INTEGER, ijson.MAX_INTEGER), st.floats(allow_nan=False, allow_infinity=False)
)


def metadata_of(names: st.SearchStrategy[str], texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Return a strategy for metadata."""
    leaves = st.one_of(st.none(), st.booleans(), NUMBERS, texts)
    values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(names, inner), max_leaves=20)
    return st.dictionaries(names, values)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
NAMES = TEXTS | st.integers(0, 30).map(str) | st.sampled_from(["__proto__", "4294967294", "4294967295", "01", ""])


@settings(max_examples=150, deadline=None)
@given(metadata=metadata_of(NAMES, TEXTS))
@example(metadata={"b": 1, "10": 2, "9": 3, "a": 4, "__proto__": {"__proto__": 5}, "toJSON": 6})
@example(metadata={"n": [1.0, 1e21, -0.0, 1e-7, 0.000001, 5e-324, 2**53 - 1]})
@example(metadata={"s": '\u2028\u2029\x00\x1f\x7f\b\t\n\f\r"\\/ é 😀'})
@example(metadata=nested(ijson.MAX_DEPTH - 2))
async def test_node_recipe_verifies_any_metadata(express: str, metadata: Any) -> None:
    """The guide's Node receiver verifies a callback with whatever I-JSON metadata a request may bring."""
    assert await send(express, payload(metadata)) == VERIFIED


ASCII = st.text(st.characters(max_codepoint=0x7E))


def is_spelled_alike(value: Any) -> bool:
    """Return whether Python and JavaScript spell each number in the value alike."""
    match value:
        case float():
            return not 1e-9 <= abs(value) < 1e-4
        case list():
            return all(map(is_spelled_alike, value))
        case dict():
            return all(map(is_spelled_alike, value.values()))
    return True


@settings(max_examples=75, deadline=None)
@given(metadata=metadata_of(ASCII | st.integers(0, 30).map(str), ASCII).filter(is_spelled_alike))
@example(metadata={"b": 1, "10": 2, "9": 3, "n": [1.0, 1e21, -0.0, 0.0001, 9.9e-10, 5e-324, 1e20, 1e16]})
@example(metadata={"s": '\x00\x1f\b\t\n\f\r"\\/~'})
@example(metadata=nested(ijson.MAX_DEPTH - 2))
async def test_python_recipe_verifies_ascii_metadata(flask: str, metadata: Any) -> None:
    """The guide's Python receiver verifies a callback that holds nothing which Python spells in its own way."""
    assert await send(flask, payload(metadata)) == VERIFIED


@pytest.mark.parametrize("metadata", [{"s": "\x7f"}, {"s": "é"}, {"n": 0.00001}, {"n": 1e-9}, {"n": 9.9e-5}])
async def test_javascript_wins_where_one_text_cannot_suit_both(express: str, flask: str, metadata: Any) -> None:
    """What Python spells otherwise only the Node receiver verifies; this is the limit that the module tells of."""
    assert await send(express, payload(metadata)) == VERIFIED
    assert Delivery(delivered=False, attempts=1, error="The receiver answered 401.", final=True) == await send(
        flask, payload(metadata)
    )


async def test_recipes_refuse_a_changed_body(express: str, flask: str) -> None:
    """The receivers of these tests do verify: a signature by another secret is refused."""
    refused = Delivery(delivered=False, attempts=1, error="The receiver answered 401.", final=True)
    for url in (express, flask):
        delivery = await deliver(
            Secret(url), BODY, webhook_id="msg-t-1", secret=Secret("another"), guard=EVERYWHERE, policy=QUICK
        )
        assert refused == delivery


# --- receivers that fail ---------------------------------------------------------------------------------------------


@attrs.define
class Receiver:
    """Answers as a script says, its last line for ever, and keeps what it got."""

    script: list[Callable[[web.Request], Awaitable[web.StreamResponse]]]
    got: list[tuple[dict[str, str], bytes]] = attrs.field(factory=list)
    url: str = ""

    async def take(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        self.got.append(({name.lower(): value for name, value in request.headers.items()}, await request.read()))
        return await self.script[min(len(self.got), len(self.script)) - 1](request)


def answer(status: int, **headers: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return a line of a script."""

    async def give(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return give


@asynccontextmanager
async def receiver(*script: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[Receiver]:
    """A receiver on loopback."""
    scripted = Receiver(list(script))
    app = web.Application(client_max_size=64 * 1024**2)
    app.router.add_route("*", "/{path:.*}", scripted.take)
    async with TestServer(app) as server:
        scripted.url = str(server.make_url("/hook"))
        yield scripted


Conversation = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def raw_receiver(converse: Conversation) -> AsyncIterator[str]:
    """A receiver on loopback that need not speak HTTP; its URL."""
    conversations: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        conversations.add(task)
        try:
            with contextlib.suppress(ConnectionError, EOFError):
                await converse(reader, writer)
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
        for conversation in conversations:
            conversation.cancel()
        await asyncio.wait(conversations)


async def test_tries_again_until_it_is_taken() -> None:
    """A receiver that fails twice gets the same bytes under the same ID a third time, and never again after that."""
    async with receiver(answer(500), answer(503), answer(204)) as scripted:
        assert Delivery(delivered=True, attempts=3) == await send(scripted.url)
        assert [body for _, body in scripted.got] == [BODY] * 3
        assert {"msg-t-1"} == {headers["webhook-id"] for headers, _ in scripted.got}


async def test_each_try_is_signed_anew_and_retry_after_is_honoured() -> None:
    """The second try comes no sooner than the receiver asked for, with a timestamp and a signature of its own."""
    async with receiver(answer(429, Retry_After="1"), answer(200)) as scripted:
        began = time.monotonic()
        assert Delivery(delivered=True, attempts=2) == await send(scripted.url)
        assert time.monotonic() - began >= 1
        first, second = (int(headers["x-webhook-timestamp"]) for headers, _ in scripted.got)
        assert second > first
        for headers, body in scripted.got:
            stamped = int(headers["x-webhook-timestamp"])
            expected = sign(body, webhook_id="msg-t-1", secret=SECRET, timestamp=stamped)
            assert {name.lower(): value for name, value in expected.items()}.items() <= headers.items()


async def test_sends_the_length_of_the_body() -> None:
    """A body of any size is sent whole, with its length, as receivers behind a proxy need it."""
    body = b'"' + b"x" * 3_000_000 + b'"'
    async with receiver(answer(200)) as scripted:
        assert Delivery(delivered=True, attempts=1) == await send(scripted.url, body)
        [(headers, got)] = scripted.got
        assert body == got
        assert str(len(body)) == headers["content-length"]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 599])
async def test_gives_up_after_its_attempts(status: int) -> None:
    """A receiver that goes on failing is left alone after the last attempt, and may be asked again another day."""
    async with receiver(answer(status)) as scripted:
        expected = Delivery(delivered=False, attempts=4, error=f"The receiver answered {status}.")
        assert expected == await send(scripted.url)
        assert len(scripted.got) == 4


@pytest.mark.parametrize("status", [400, 401, 404, 410, 413, 422])
async def test_a_refusal_is_final(status: int) -> None:
    """An answer that would be the same the next time is not asked for again."""
    async with receiver(answer(status), answer(200)) as scripted:
        expected = Delivery(delivered=False, attempts=1, error=f"The receiver answered {status}.", final=True)
        assert expected == await send(scripted.url)
        assert len(scripted.got) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(status: int) -> None:
    """A redirect is told and not followed: it could lead inside, with the body and its signature."""
    async with receiver(answer(status, Location="/elsewhere"), answer(200)) as scripted:
        error = f"The receiver answered {status} to another address; redirects are not followed."
        assert Delivery(delivered=False, attempts=1, error=error, final=True) == await send(scripted.url)
        assert len(scripted.got) == 1


async def test_does_not_wait_longer_than_it_has_time() -> None:
    """A receiver that wants to be left alone for longer than the delivery lasts is; what it asked for is passed on."""
    async with receiver(answer(503, Retry_After="3600"), answer(200)) as scripted:
        began = time.monotonic()
        error = "The receiver answered 503."
        assert Delivery(delivered=False, attempts=1, error=error, retry_after_seconds=3600) == await send(scripted.url)
        assert time.monotonic() - began < 5
        assert len(scripted.got) == 1


async def test_total_time_is_bounded() -> None:
    """No try is begun that could not have its full time, so tries and pauses together keep within the total."""
    policy = RetryPolicy(attempt_seconds=0.2, attempts=1000, total_seconds=1, first_delay_seconds=0.001)
    async with receiver(answer(500)) as scripted:
        began = time.monotonic()
        delivery = await send(scripted.url, policy=policy)
        assert time.monotonic() - began < 1
        assert 2 <= delivery.attempts == len(scripted.got) < 1000


async def hang(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """Never read, never answer."""
    await asyncio.Event().wait()


async def drip_head(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one header after the other, without end."""
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X-Header: x\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("conversation", [hang, drip_head])
@pytest.mark.parametrize("size", [100, 32_000_000])
async def test_a_receiver_that_hangs_costs_a_bounded_time(conversation: Conversation, size: int) -> None:
    """A receiver that does not answer, or never ends its answer's head, is given up for this try, read or unread."""
    policy = RetryPolicy(attempt_seconds=0.2, attempts=2, total_seconds=10, first_delay_seconds=0.01)
    async with raw_receiver(conversation) as url:
        began = time.monotonic()
        delivery = await send(url, b"1" * size, policy=policy)
        assert time.monotonic() - began < 5
        error = "The receiver did not answer within 0.2 s."
        assert Delivery(delivered=False, attempts=2, error=error) == delivery


async def test_a_reset_is_tried_again() -> None:
    """A connection that is reset before the answer counts as no answer."""
    resets = 2

    async def reset_twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal resets
        await reader.readuntil(b"\r\n\r\n")
        if resets:
            resets -= 1
            sock: socket.socket = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            await reader.read()

    async with raw_receiver(reset_twice) as url:
        assert Delivery(delivered=True, attempts=3) == await send(url)


async def test_tells_what_kind_of_no_answer() -> None:
    """Each way of not answering is told in its own sentence, which holds nothing of the URL."""

    async def close(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.com ESMTP\r\n")
        await writer.drain()
        await reader.read()

    once = attrs.evolve(QUICK, attempts=1)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    async with raw_receiver(close) as closing, raw_receiver(babble) as babbling:
        urls = {
            closing: "The receiver closed the connection without an answer.",
            babbling: "The receiver's answer is not HTTP.",
            babbling.replace("http:", "https:"): "No secure connection to the receiver could be made.",
            f"http://user:made-up@127.0.0.1:{port}/path?token=made-up": "The receiver could not be connected to.",
            "http://user:made-up@name.invalid/path?token=made-up": "The receiver's name could not be looked up.",
        }
        assert urls == {url: (await send(url, policy=once)).error for url in urls}


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hook",
        "/hook",
        "ftp://example.com/",
        "file:///etc/passwd",
        "http://",
        "http://[::1",
        "http://example.com:99999/",
        f"http://{'a' * 70}.example.com/",
        "http://us%3Aer:pw@127.0.0.1:1/",
    ],
)
async def test_what_is_no_url_is_final(url: str) -> None:
    """A URL that cannot be called is told, and nothing of it is repeated."""
    error = "The callback's address is not a valid URL."
    assert Delivery(delivered=False, attempts=1, error=error, final=True) == await send(url)


@pytest.mark.parametrize("pause", [0.0, 0.05])
async def test_the_body_of_an_answer_is_not_read(pause: float) -> None:
    """An answer counts by its status, whether its body is huge or drips without end."""
    written = 0

    async def flood(request: web.Request) -> web.StreamResponse:
        nonlocal written
        response = web.StreamResponse(headers={"Content-Encoding": "gzip"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                await response.write(b"x" * 1024**2 if pause == 0 else b"x")
                written += 1
                await asyncio.sleep(pause)
        return response

    async with receiver(flood) as scripted:
        began = time.monotonic()
        assert Delivery(delivered=True, attempts=1) == await send(scripted.url)
        assert time.monotonic() - began < 2
    assert written < 100


async def test_cancelling_ends_the_delivery() -> None:
    """A delivery that is cancelled is over at once, and so is its connection."""
    connected, closed = asyncio.Event(), asyncio.Event()

    async def watch(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        connected.set()
        await reader.read()
        closed.set()

    async with raw_receiver(watch) as url:
        task = asyncio.create_task(send(url))
        async with asyncio.timeout(5):
            await connected.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await closed.wait()


async def test_cancelling_ends_a_pause() -> None:
    """A delivery that is cancelled between two tries is over at once too."""
    answered = asyncio.Event()

    async def fail(request: web.Request) -> web.StreamResponse:
        asyncio.get_running_loop().call_later(0.1, answered.set)
        return await answer(500)(request)

    async with receiver(fail) as scripted:
        task = asyncio.create_task(send(scripted.url, policy=RetryPolicy(first_delay_seconds=10)))
        async with asyncio.timeout(5):
            await answered.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert len(scripted.got) == 1


# --- credentials and surroundings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("userinfo", "credentials"),
    [("user:pass", "user:pass"), ("us%40er:p%C3%A4ss%E2%82%AC", "us@er:päss€"), ("user", "user:"), (":pass", ":pass")],
)
async def test_userinfo_becomes_basic_authentication(userinfo: str, credentials: str) -> None:
    """User and password of the URL are sent as HTTP clients do, in UTF-8 (RFC 7617), never as part of the URL."""
    async with receiver(answer(200)) as scripted:
        await send(scripted.url.replace("http://", f"http://{userinfo}@"))
        [(headers, _)] = scripted.got
        assert f"Basic {base64.b64encode(credentials.encode()).decode()}" == headers["authorization"]
        assert "@" not in headers["host"]


async def test_takes_no_proxy_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the environment would make the connection for us, past the guard."""
    async with receiver(answer(200)) as proxy, receiver(answer(200)) as scripted:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        assert Delivery(delivered=True, attempts=1) == await send(scripted.url)
        assert proxy.got == []


async def test_a_certificate_that_cannot_be_trusted_gets_no_body(tmp_path: Path) -> None:
    """Nothing is sent to a receiver that cannot prove its name."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(
            name, name, key.public_key(), 1, now - dt.timedelta(hours=1), now + dt.timedelta(hours=1)
        )
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "server.pem"
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    scripted = Receiver([answer(200)])
    app = web.Application()
    app.router.add_post("/", scripted.take)
    server = TestServer(app, scheme="https")
    await server.start_server(ssl=context)
    delivery = await send(f"https://localhost:{server.port}/", policy=attrs.evolve(QUICK, attempts=1))
    await server.close()
    assert delivery.error == "The receiver's certificate cannot be trusted."
    assert scripted.got == []


# --- where a callback may not go -------------------------------------------------------------------------------------

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
async def test_loopback_is_refused_in_any_spelling(host: str) -> None:
    """No spelling of loopback is connected to, whether it is refused as an address, as a name or as a URL."""
    async with receiver(answer(200)) as scripted:
        port = scripted.url.split(":")[2]
        delivery = await send(f"http://{host}:{port}", guard=PUBLIC_ONLY, policy=attrs.evolve(QUICK, attempts=1))
        assert not delivery.delivered
        assert scripted.got == []


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
async def test_a_refused_address_is_told(host: str) -> None:
    """The refusal is told in one sentence without the address."""
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
def test_is_not_public(address: str) -> None:
    """Nothing but an address of the public internet counts as public, least of all what is no address."""
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "::ffff:8.8.8.8", "2606:4700:4700::1111", "2a00:1450:4001::1"]
)
def test_is_public(address: str) -> None:
    """Addresses of the public internet are public."""
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
    """A host is trusted by its exact name, or by a name above it that begins with a star."""
    assert trusted is CallbackGuard(allowed_hosts=frozenset({allowed})).trusts(host)


async def test_an_allowed_host_may_be_private() -> None:
    """A host that is named may have any address; the same address under another name may not."""
    async with receiver(answer(200)) as scripted:
        named = scripted.url.replace("127.0.0.1", "localhost")
        guard = CallbackGuard(allowed_hosts=frozenset({"localhost"}))
        assert Delivery(delivered=True, attempts=1) == await send(named, guard=guard)
        assert not (await send(scripted.url, guard=guard)).delivered
        assert len(scripted.got) == 1


# --- what Retry-After says -------------------------------------------------------------------------------------------

NOW = dt.datetime(2025, 1, 10, 12, 0, 0, tzinfo=dt.UTC)


@pytest.mark.parametrize(
    ("wish", "seconds"),
    [
        (None, None),
        ("0", 0),
        ("120", 120),
        ("9" * 5000, 24 * 3600),
        ("Fri, 10 Jan 2025 12:00:30 GMT", 30),
        ("Fri, 10 Jan 2025 11:00:00 GMT", 0),
        ("Fri, 10 Jan 2025 12:00:30 -0000", 30),
        ("Fri, 10 Jan 2035 12:00:00 GMT", 24 * 3600),
        ("-1", None),
        ("1.5", None),
        ("²", None),
        ("soon", None),
        ("", None),
    ],
)
def test_retry_after(wish: str | None, seconds: float | None) -> None:
    """Seconds and dates are understood and bounded; what is neither is passed over."""
    assert seconds == _retry_after(wish, NOW)


@given(wish=st.text() | st.from_regex(r"[A-Z][a-z]{2}, [0-9]+ [A-Z][a-z]{2} [0-9]+ [0-9]+:[0-9:]+ [+-]?[0-9A-Z]+"))
@example(wish="Fri, 10 Jan 99999 12:00:30 GMT")
@example(wish="Fri, 10 Jan 2025 12:00:30 +99999999999999999999")
@example(wish="Fri, 31 Dec 9999 23:59:59 -2359")
@example(wish="Mon, 01 Jan 0001 00:00:00 +2359")
def test_retry_after_survives_anything(wish: str) -> None:
    """No header of a receiver breaks the delivery."""
    seconds = _retry_after(wish, NOW)
    assert seconds is None or 0 <= seconds <= 24 * 3600
