"""Which model API a task uses, and what authenticates its requests."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from helpers.claude import task
from helpers.proxy import CREDENTIAL
from helpers.worker import Agent, WorkerSetup, agent, worker_setup
from multidict import CIMultiDict

from ccrun.errors import CcrunError, CredentialUnusable
from ccrun.task import Secret, Status
from ccrun.testing.model import Say, ScriptedModel, sequence
from ccrun.worker.credential import choose_upstream
from ccrun.worker.dependencies import WorkerDependencies
from ccrun.worker.upstream import OAUTH_BETA, CredentialKind, Upstream

__all__ = ["agent", "worker_setup"]

#: The operator's base URL in these tests.
OPERATORS = "http://127.0.0.1:9"


def upstream(**fields: Any) -> Upstream:
    """Return a model API with a made-up API key, unless these fields say otherwise."""
    defaults = {"url": OPERATORS, "credential": Secret(CREDENTIAL), "kind": CredentialKind.API_KEY}
    return Upstream(**{**defaults, **fields})


async def sent(api: Upstream, headers: CIMultiDict[str]) -> CIMultiDict[str]:
    """Return the headers that the model API gets for a request of the agent with these headers."""
    return await api.headers("POST", OPERATORS, headers, b"")


# --- headers ---------------------------------------------------------------------------------------------------------


async def test_only_known_headers_are_forwarded() -> None:
    """Headers of the API and its client are forwarded; credentials, cookies and headers for gateways are not."""
    passed = {
        "anthropic-version": "1",
        "anthropic-beta": "a",
        "User-Agent": "cli",
        "X-Stainless-Lang": "js",
        "X-App": "cli",
    }
    dropped = {
        "X-Api-Key": "t",
        "Authorization": "Bearer t",
        "Proxy-Authorization": "t",
        "Cookie": "t",
        "Host": "h",
        "Connection": "close, anthropic-version",
        "Transfer-Encoding": "chunked",
        "Expect": "100-continue",
        "X-Original-URL": "/v1/files",
        "X-HTTP-Method-Override": "GET",
        "Forwarded": "for=x",
        "Accept-Encoding": "gzip",
    }
    headers = CIMultiDict({**passed, **dropped})
    common = {**passed, "Accept-Encoding": "identity"}
    assert await sent(upstream(), headers) == CIMultiDict({**common, "X-Api-Key": CREDENTIAL})
    assert await sent(upstream(kind=CredentialKind.OAUTH), headers) == CIMultiDict(
        [*common.items(), ("Authorization", f"Bearer {CREDENTIAL}"), ("anthropic-beta", OAUTH_BETA)]
    )
    assert await sent(upstream(kind=CredentialKind.BEARER), headers) == CIMultiDict(
        {**common, "Authorization": f"Bearer {CREDENTIAL}"}
    )


async def test_custom_headers_are_added() -> None:
    """They replace those of the agent, and the one for the credential."""
    custom = (("X-Team", Secret("made-up-team")), ("x-api-key", Secret("other")), ("anthropic-beta", Secret("b")))
    headers = await sent(upstream(custom_headers=custom), CIMultiDict({"Accept": "text/html", "anthropic-beta": "a"}))
    expected = {"accept": "text/html", "x-team": "made-up-team", "x-api-key": "other", "anthropic-beta": "b"}
    assert {"accept-encoding": "identity", **expected} == {name.lower(): value for name, value in headers.items()}


@pytest.mark.parametrize("credential", ["", "a b", "made-up\nkey", "made-up\r\nX-Injected: 1", "schlüssel"])
def test_credential_that_cannot_be_a_header_value_is_rejected(credential: str) -> None:
    """The error does not contain the credential."""
    with pytest.raises(CredentialUnusable) as rejection:
        upstream(credential=Secret(credential))
    assert not credential or credential not in str(rejection.value)


def chosen(deps: WorkerDependencies, **fields: Any) -> Upstream:
    """Return the model API of a task with these fields."""
    api = choose_upstream(deps, task(**fields))
    assert isinstance(api, Upstream)
    return api


# --- the choice ------------------------------------------------------------------------------------------------------


def secrets(prefix: str, names: list[str]) -> dict[str, Any]:
    """Return made-up secrets by name."""
    return {f"{prefix}{name}": Secret(f"{prefix}{name}") for name in names}


NAMES = ["auth_token", "api_key", "oauth_token"]
KINDS = [CredentialKind.BEARER, CredentialKind.API_KEY, CredentialKind.OAUTH]


@pytest.mark.parametrize(("first", "kind"), list(enumerate(KINDS)))
async def test_order_is_that_of_the_cli(worker_setup: WorkerSetup, first: int, kind: CredentialKind) -> None:
    """A bearer token comes before an API key, and that before an OAuth token; those of the request before all of the operator."""
    api = chosen(attrs.evolve(worker_setup.deps, **secrets("", NAMES[first:])))
    assert (kind, Secret(NAMES[first])) == (api.kind, api.credential)
    own = secrets("anthropic_", NAMES[first:])
    api = chosen(attrs.evolve(worker_setup.deps, **secrets("", NAMES)), **own)
    assert (kind, Secret(f"anthropic_{NAMES[first]}")) == (api.kind, api.credential)


async def test_operators_credential_and_headers_are_for_the_operators_server(worker_setup: WorkerSetup) -> None:
    """A task with another base URL needs its own credential, and its requests do not have the operator's headers."""
    deps = attrs.evolve(
        worker_setup.deps,
        upstream=OPERATORS,
        api_key=Secret("operators"),
        custom_headers=(("X-Key", Secret("secret")),),
    )
    assert 1 == len(chosen(deps).custom_headers)
    with pytest.raises(CcrunError, match="There is no credential for the model API"):
        choose_upstream(deps, task(anthropic_base_url="http://127.0.0.1:10"))
    api = chosen(deps, anthropic_base_url="http://127.0.0.1:10", anthropic_auth_token=Secret("own"))
    assert ("http://127.0.0.1:10", Secret("own"), ()) == (api.url, api.credential, api.custom_headers)


# --- with the real CLI -----------------------------------------------------------------------------------------------


async def test_gateway_gets_token_headers_and_model(worker_setup: WorkerSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator's gateway gets the bearer token, the custom headers, and the name that the alias of a model has there."""
    inherited = {**worker_setup.deps.inherited, "ANTHROPIC_DEFAULT_SONNET_MODEL": "gateway/sonnet-x"}
    async with ScriptedModel(sequence(Say("Hello."))) as model:
        await worker_setup.submit(anthropic_api_key=None, model="sonnet")
        record = await worker_setup.run(
            upstream=model.url,
            inherited=inherited,
            auth_token=Secret("made-up-gateway-token"),
            custom_headers=(("X-Team", Secret("made-up-team")),),
        )
    assert (Status.COMPLETED, "Hello.") == (record.status, record.summary and record.summary.result)
    [request, *_] = [request for request in model.requests if "gateway/sonnet-x" in str(request.body)]
    assert ("Bearer made-up-gateway-token", None, "made-up-team") == tuple(
        request.headers.get(name) for name in ("Authorization", "X-Api-Key", "X-Team")
    )


async def test_request_may_name_its_gateway(worker_setup: WorkerSetup) -> None:
    """The requests of the task go to its base URL with its token."""
    async with ScriptedModel(sequence(Say("Hello."))) as model:
        await worker_setup.submit(
            anthropic_api_key=None, anthropic_auth_token=Secret("made-up-own-token"), anthropic_base_url=model.url
        )
        record = await worker_setup.run()
    assert Status.COMPLETED == record.status
    assert {"Bearer made-up-own-token"} == {request.headers.get("Authorization") for request in model.requests}


async def test_custom_headers_are_redacted(worker_setup: WorkerSetup, agent: Agent) -> None:
    """An agent that finds out a value cannot write it into the log."""
    await worker_setup.submit()
    await worker_setup.run(cli=agent("echo made-up-team"), custom_headers=(("X-Team", Secret("made-up-team")),))
    assert "made-up-team" not in str(await worker_setup.log())
