"""The operator's proxies and certificate authorities."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from pytest_aiohttp import AiohttpServer
from standins.tls import self_signed

from ccrun import config
from ccrun.egress import Egress, open_egress
from ccrun.errors import ConfigError
from ccrun.task import Secret

PROXY = "http://proxy.corp:3128"
WITH_PASSWORD = "http://me:made-up-password@proxy.corp:3128"


async def opened(**variables: str) -> Egress:
    """Return what these variables describe."""
    return await asyncio.to_thread(lambda: open_egress(config.load(variables, on_terminal=False)))


# --- proxies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("https://example.com/x", "http://secure:1"),
        ("http://example.com:8080/x", "http://plain:1"),
        ("https://corp.example/x", None),
        ("https://a.corp.example/x", None),
        ("https://notcorp.example/x", "http://secure:1"),
        ("https://b.dotted.example/x", None),
        ("http://10.1.2.3:99/x", None),
        ("http://127.0.0.1:8080/x", None),
        ("http://localhost/x", None),
        ("http://[::1]/x", None),
    ],
)
def test_proxy_depends_on_scheme_and_host(url: str, proxy: str | None) -> None:
    """`NO_PROXY` has names with those below them, and addresses. What is on this machine is never behind a proxy."""
    egress = Egress(
        http_proxy=Secret("http://plain:1"),
        https_proxy=Secret("http://secure:1"),
        no_proxy="corp.example, .dotted.example,10.1.2.3",
    )
    assert proxy == egress.proxy_for(url)
    assert egress.proxy_for("https://example.com") != Egress(no_proxy="*", https_proxy=Secret(PROXY)).proxy_for(
        "https://example.com"
    )


async def test_variables_may_have_both_spellings() -> None:
    """As in curl, the lower one comes first. The scheme may be missing."""
    egress = await opened(HTTPS_PROXY="http://upper:1", https_proxy="lower:1", http_proxy="http://plain:1/")
    assert ("http://lower:1", "http://plain:1") == (
        egress.proxy_for("https://example.com"),
        egress.proxy_for("http://example.com"),
    )


@pytest.mark.parametrize(
    ("variables", "of_agent"),
    [
        ({"HTTPS_PROXY": PROXY}, {"https_proxy": PROXY, "HTTPS_PROXY": PROXY}),
        ({"HTTPS_PROXY": WITH_PASSWORD}, {}),
        (
            {"HTTPS_PROXY": WITH_PASSWORD, "AGENT_PROXY": "http://open.corp:1", "NO_PROXY": "corp"},
            {
                **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://open.corp:1"),
                "NO_PROXY": "corp",
            },
        ),
        ({"HTTPS_PROXY": PROXY, "AGENT_PROXY": "none"}, {}),
    ],
)
async def test_agent_gets_no_password(variables: dict[str, str], of_agent: dict[str, str]) -> None:
    """The agent has the proxies of the operator unless their URL has a password, or what `AGENT_PROXY` says."""
    egress = await opened(**variables)
    assert of_agent == egress.agent_variables(None)
    assert ("AGENT_PROXY" in variables or bool(of_agent)) == (egress.agent_gets_proxies or "AGENT_PROXY" in variables)
    assert "made-up-password" not in f"{egress!r} {egress.shown}"
    assert (Secret("made-up-password"),) * (WITH_PASSWORD in variables.values()) == egress.secrets


def test_log_shows_proxies_without_passwords() -> None:
    """The start of the service logs them."""
    egress = Egress(https_proxy=Secret(WITH_PASSWORD), no_proxy="corp")
    assert {"httpsProxy": PROXY, "noProxy": "corp"} == egress.shown


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("HTTPS_PROXY", "socks5://proxy:1", "the URL of an HTTP proxy, such as http://proxy.example:3128"),
        ("HTTP_PROXY", "http://proxy/path", "the URL of an HTTP proxy, such as http://proxy.example:3128"),
        ("AGENT_PROXY", WITH_PASSWORD, "the URL of an HTTP proxy without user and password, or none"),
    ],
)
async def test_invalid_proxy_is_an_error(name: str, value: str, allowed: str) -> None:
    """The error does not repeat the value."""
    with pytest.raises(ConfigError, match=f"^{name} must be {allowed}") as caught:
        await opened(**{name: value})
    assert "made-up-password" not in str(caught.value)


# --- certificates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS"])
async def test_authority_of_the_operator_is_trusted(aiohttp_server: AiohttpServer, tmp_path: Path, name: str) -> None:
    """A server with a certificate of a company's own authority can be reached; git and the agent get that authority too."""

    async def hello(request: web.Request) -> web.Response:
        return web.Response(text="hello")

    app = web.Application()
    app.router.add_get("/", hello)
    context, file = self_signed(tmp_path)
    server = await aiohttp_server(app, ssl=context)
    egress = await opened(**{name: str(file)})
    for tls, is_trusted in ((egress.tls, True), (Egress().tls, False)):
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as session:
            try:
                async with session.get(f"https://localhost:{server.port}/") as response:
                    assert ("hello", True) == (await response.text(), is_trusted)
            except aiohttp.ClientConnectorCertificateError:
                assert not is_trusted
    assert egress.ca_bundle is not None
    assert file.read_bytes() in egress.ca_bundle
    bundle = tmp_path / "bundle.pem"
    assert str(bundle) == egress.git_variables(bundle)["GIT_SSL_CAINFO"]
    assert {str(bundle)} == set(egress.agent_variables(bundle).values())


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS"])
@pytest.mark.parametrize("content", [None, "", "no certificate", "ä"])
async def test_file_without_certificates_is_an_error(tmp_path: Path, name: str, content: str | None) -> None:
    """It is found when a service or a worker starts, not at the first connection."""
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=f"^{name} must name a readable file with certificates in PEM form\\.$"):
        await opened(**{name: str(file)})
