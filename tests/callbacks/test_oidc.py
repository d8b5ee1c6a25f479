from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import attrs
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from helpers.callbacks import QUICK, Handler, receiver, respond, send

from ccrun.callbacks.deliver import Delivery
from ccrun.callbacks.oidc import IdentityTokens

TOKEN = "made-up.identity.token"
#: One attempt.
ONCE = attrs.evolve(QUICK, attempts=1)


async def issue(request: web.Request) -> web.Response:
    """Respond as the metadata server does."""
    assert request.headers["Metadata-Flavor"] == "Google"
    assert request.path == "/computeMetadata/v1/instance/service-accounts/default/identity"
    return web.Response(text=f"{TOKEN}.{request.query['audience']}".replace(".", "_").replace("_", ".", 2))


@contextlib.asynccontextmanager
async def metadata_server(handler: Handler = issue) -> AsyncIterator[str]:
    """Start a metadata server; yield its host and port."""
    app = web.Application()
    app.router.add_get("/{path:.*}", handler)
    async with TestServer(app) as server:
        yield f"127.0.0.1:{server.port}"


async def test_named_receiver_gets_a_token() -> None:
    """The audience is the one of its origin. The signature is there as well."""
    async with receiver(respond(204)) as scripted, metadata_server() as host:
        origin = scripted.url.removesuffix("/hook")
        tokens = IdentityTokens(audiences={origin: "client-1"}, metadata_host=host)
        assert Delivery(delivered=True, attempts=1) == await send(scripted.url, tokens=tokens)
        [(headers, _)] = scripted.requests
        assert "Bearer made-up.identity.token_client-1" == headers["authorization"]
        assert "x-webhook-signature" in headers


async def test_no_other_receiver_gets_a_token() -> None:
    """Neither another host nor another port, nor one that names the origin elsewhere in its URL."""
    async with receiver(respond(204)) as other, receiver(respond(204)) as named, metadata_server() as host:
        tokens = IdentityTokens(audiences={named.url.removesuffix("/hook"): "a"}, metadata_host=host)
        named_host = named.url.removesuffix("/hook").removeprefix("http://")
        for url in (
            other.url,
            named.url.replace("127.0.0.1", "localhost"),
            f"{other.url}?{named_host}",
            other.url.replace("http://", "http://127.0.0.1@"),
        ):
            assert Delivery(delivered=True, attempts=1) == await send(url, tokens=tokens)
        received = [headers for headers, _ in (*other.requests, *named.requests)]
        assert [] == [headers for headers in received if "token" in str(headers)]


async def test_token_leaves_the_credentials_of_the_url() -> None:
    """It then has a header of its own, which Cloud Run checks first."""
    async with receiver(respond(204)) as scripted, metadata_server() as host:
        tokens = IdentityTokens(audiences={scripted.url.removesuffix("/hook"): "a"}, metadata_host=host)
        await send(scripted.url.replace("http://", "http://user:pass@"), tokens=tokens)
        [(headers, _)] = scripted.requests
        assert headers["authorization"].startswith("Basic ")
        assert "Bearer made-up.identity.token_a" == headers["x-serverless-authorization"]


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (respond(404), "it responded with 404"),
        (respond(302, Location="/x"), "it responded with 302"),
        (respond(200), "it responded with 200"),
    ],
)
async def test_receiver_gets_no_request_without_a_token(handler: Handler, reason: str) -> None:
    """It would reject the request for ever. The delivery is tried again later."""
    async with receiver(respond(204)) as scripted, metadata_server(handler) as host:
        tokens = IdentityTokens(audiences={scripted.url.removesuffix("/hook"): "a"}, metadata_host=host)
        error = f"The metadata server issued no identity token for the receiver: {reason}."
        assert Delivery(delivered=False, attempts=1, error=error) == await send(
            scripted.url, tokens=tokens, policy=ONCE
        )
        assert [] == scripted.requests


async def test_machine_without_a_metadata_server_is_named() -> None:
    """The error says what is missing."""
    async with receiver(respond(204)) as scripted:
        tokens = IdentityTokens(audiences={scripted.url.removesuffix("/hook"): "a"}, metadata_host="127.0.0.1:9")
        delivery = await send(scripted.url, tokens=tokens, policy=ONCE)
        assert "The metadata server issued no identity token for the receiver: it cannot be reached." == delivery.error
