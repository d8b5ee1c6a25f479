"""Tasks on a machine that reaches other servers through a proxy, or whose company has its own certificate authority."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import attrs
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from helpers.git import GitSetup, git_setup
from helpers.worker import Agent, WorkerSetup, agent, agent_user, worker_setup
from standins.forward_proxy import ForwardProxy
from standins.githttp import TOKEN, GitHttp, needs_backend

from ccrun.callbacks import deliver
from ccrun.callbacks.guard import CallbackGuard
from ccrun.config import load
from ccrun.egress import Egress, open_egress
from ccrun.process.user import User
from ccrun.spec import GitToken
from ccrun.task import Secret, Status
from ccrun.testing.model import Conversation, Reply, Say, ScriptedModel, UseTool

__all__ = ["agent", "agent_user", "git_setup", "worker_setup"]

PASSWORD = "made-up-password"


def port_of(url: str) -> int:
    """Return the port of a URL."""
    return urlsplit(url).port or 0


async def behind(proxy: ForwardProxy, **variables: str) -> Egress:
    """Return the way to other servers of an operator with this proxy."""
    settings = {"HTTP_PROXY": proxy.url, "HTTPS_PROXY": proxy.url, **variables}
    return await asyncio.to_thread(lambda: open_egress(load(settings, on_terminal=False)))


def print_environment(conversation: Conversation) -> Reply:
    """Let the agent print its environment."""
    if conversation.turn == 0:
        return UseTool("Bash", {"command": "env", "description": "Print the environment"})
    return Say(str(conversation.last_tool_result))


@pytest.mark.parametrize("agent_proxy", [None, "http://open.corp.invalid:3128"])
async def test_model_api_is_reached_through_the_proxy(worker_setup: WorkerSetup, agent_proxy: str | None) -> None:
    """The agent gets the proxy of its own, never the password of the operator's."""
    async with (
        ScriptedModel(print_environment) as model,
        ForwardProxy({"model.corp.invalid": port_of(model.url)}, credential=f"me:{PASSWORD}") as proxy,
    ):
        await worker_setup.submit(allowed_tools=("Bash",))
        egress = await behind(proxy, **({"AGENT_PROXY": agent_proxy} if agent_proxy else {}))
        record = await worker_setup.run(upstream="http://model.corp.invalid", egress=egress)
    assert (Status.COMPLETED, {"model.corp.invalid"}) == (record.status, proxy.hosts)
    assert record.summary is not None
    printed = record.summary.result or ""
    assert (agent_proxy is not None) == (f"https_proxy={agent_proxy}" in printed.splitlines())
    assert PASSWORD not in str(await worker_setup.log())


@needs_backend
async def test_git_uses_the_proxy(worker_setup: WorkerSetup, agent: Agent, git_setup: GitSetup) -> None:
    """The repository is cloned through it; git of the agent does not get the password."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    async with (
        GitHttp(git_setup.repos) as server,
        ForwardProxy({"git.corp.invalid": port_of(server.url("demo"))}, credential=f"me:{PASSWORD}") as proxy,
    ):
        url = urlsplit(server.url("demo"))._replace(netloc="git.corp.invalid").geturl()
        await worker_setup.submit(git_repo=url, git_token=GitToken.parse(TOKEN))
        record = await worker_setup.run(cli=agent("cat a.txt; env"), egress=await behind(proxy))
    assert (None, {"git.corp.invalid"}) == (record.error, proxy.hosts)
    assert PASSWORD not in str(await worker_setup.log())


@needs_backend
async def test_git_and_agent_trust_the_operators_authority(
    worker_setup: WorkerSetup, agent: Agent, agent_user: User | None, git_setup: GitSetup
) -> None:
    """A repository on a server with a company's certificate is cloned; the agent has a file with that authority."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    async with GitHttp(git_setup.repos, tls=True) as server:
        settings = {"NODE_EXTRA_CA_CERTS": str(server.ca_file)}
        egress = await asyncio.to_thread(lambda: open_egress(load(settings, on_terminal=False)))
        await worker_setup.submit(git_repo=server.url("demo"), git_token=GitToken.parse(TOKEN))
        certificate = server.ca_file.read_text().splitlines()[1]
        cli = agent(
            f'for file in "$NODE_EXTRA_CA_CERTS" "$SSL_CERT_FILE" "$GIT_SSL_CAINFO"; do grep -c {certificate} "$file"; done'
        )
        record = await worker_setup.run(cli=cli, egress=egress, agent_user=agent_user)
    assert Status.COMPLETED == record.status
    assert ["1", "1", "1"] == [str(line["content"]) for line in await worker_setup.log() if line["type"] == "text"]


# --- callbacks -------------------------------------------------------------------------------------------------------


@pytest.fixture
async def receiver() -> AsyncIterator[int]:
    """The port of a receiver that accepts all callbacks."""

    async def accept(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/hook", accept)
    async with TestServer(app) as server:
        yield server.port or 0


async def send(url: str, egress: Egress) -> deliver.Delivery:
    """Deliver a callback in one attempt."""
    policy = attrs.evolve(deliver.RetryPolicy(), attempts=1)
    return await deliver.deliver(
        Secret(url), b"{}", webhook_id="a", secret=Secret("s" * 16), guard=CallbackGuard(), egress=egress, policy=policy
    )


async def test_callback_goes_through_the_proxy(receiver: int) -> None:
    """Also to a name that only the proxy can look up."""
    async with ForwardProxy({"hooks.corp.invalid": receiver}, credential=f"me:{PASSWORD}") as proxy:
        assert (await send("http://hooks.corp.invalid/hook", await behind(proxy))).delivered
    assert {"hooks.corp.invalid"} == proxy.hosts


@pytest.mark.parametrize("host", ["10.0.0.1", "169.254.169.254", "0x0a000001", "[fd00::1]", "[::ffff:10.0.0.1]"])
async def test_guard_holds_behind_a_proxy(host: str) -> None:
    """A proxy must not lead to an address that is not public."""
    async with ForwardProxy({}) as proxy:
        delivery = await send(f"http://{host}/hook", await behind(proxy))
    assert ("The callback's address is not public.", True) == (delivery.error, delivery.final)
    assert [] == proxy.requests


async def test_error_names_the_proxy() -> None:
    """A proxy that rejects the request, or does not listen, is not the receiver's fault."""
    async with ForwardProxy({}) as proxy:
        egress = await behind(proxy)
        for url in ("http://hooks.corp.invalid/hook", "https://hooks.corp.invalid/hook"):
            delivery = await send(url, egress)
            assert (False, False) == (delivery.delivered, delivery.final)
        assert "The proxy responded with 502." == delivery.error
    assert "The proxy could not be connected to." == (await send("http://hooks.corp.invalid/hook", egress)).error
