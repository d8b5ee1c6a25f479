"""How the agent of a task is isolated, and what its record says."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from helpers.claude import task
from helpers.worker import Agent, WorkerSetup, agent, worker_setup

from ccrun import codec
from ccrun.process.sandbox import Sandbox, find_sandbox
from ccrun.results import AgentNetwork
from ccrun.task import Reason, Secret, Status
from ccrun.worker.isolation import IsolationPolicy

__all__ = ["agent", "worker_setup"]
REASON = "bubblewrap (the program bwrap) is not installed."


def sandbox_for(cli: Path) -> Sandbox | str:
    """Return the sandbox of this machine in which a CLI is visible, or why there is none."""
    return find_sandbox(path=os.environ["PATH"], programs=[cli], hidden=[], user=None)


@pytest.fixture
async def needs_sandbox() -> None:
    """Skip the test where no sandbox works."""
    found = await asyncio.to_thread(sandbox_for, Path("/bin/sh"))
    if not isinstance(found, Sandbox):
        pytest.skip(found)


async def test_record_has_the_level_and_the_reasons(worker_setup: WorkerSetup, agent: Agent) -> None:
    """Without a sandbox the task runs, and its record says at which level, and why."""
    await worker_setup.submit()
    record = await worker_setup.run(cli=agent("true"), isolation=IsolationPolicy(find_sandbox=lambda: REASON))
    assert Status.COMPLETED is record.status
    public = codec.record_to_public(record)
    assert {"level": "process", "network": "host", "reasons": [REASON]} == public["isolation"]
    assert b"isolation" not in codec.callback_body(record)


async def test_required_sandbox_fails_the_task(worker_setup: WorkerSetup, agent: Agent) -> None:
    """The agent is not started without it."""
    await worker_setup.submit()
    policy = IsolationPolicy(is_required=True, find_sandbox=lambda: REASON)
    record = await worker_setup.run(cli=agent("true"), isolation=policy)
    error = f"The agent must run in a sandbox (CCRUN_SANDBOX=required). {REASON}"
    assert (Reason.PREPARE_FAILED, error, None) == (record.reason, record.error, record.isolation)
    assert [] == await worker_setup.log()


@pytest.mark.parametrize("operators", [False, True])
async def test_narrow_network_needs_a_sandbox(worker_setup: WorkerSetup, agent: Agent, *, operators: bool) -> None:
    """A task whose network would be limited does not run where it cannot be."""
    none = AgentNetwork.NONE
    await worker_setup.submit(**({} if operators else {"network": none}))
    policy = IsolationPolicy(find_sandbox=lambda: REASON, network=none if operators else AgentNetwork.PUBLIC)
    record = await worker_setup.run(cli=agent("true"), isolation=policy)
    error = f"The network of the agent cannot be limited to `none` without a sandbox. {REASON}"
    assert (Reason.PREPARE_FAILED, error) == (record.reason, record.error)


@pytest.mark.usefixtures("needs_sandbox")
async def test_refused_hosts_are_on_the_record(worker_setup: WorkerSetup, agent: Agent) -> None:
    """The record names the hosts that an agent tried in vain, and no others; secrets in them are masked."""
    await worker_setup.submit(
        network=AgentNetwork.ALLOWLIST, allowed_hosts=("example.com",), environment_secrets={"S": Secret("secretname")}
    )
    script = 'curl -sS --noproxy none "http://other.example/" "http://127.0.0.1:1/" "https://secretname.example/"'
    cli = agent(script)
    record = await worker_setup.run(cli=cli, isolation=IsolationPolicy(find_sandbox=lambda: sandbox_for(cli())))
    assert Status.COMPLETED is record.status, record.error
    assert {
        "level": "sandbox",
        "network": "allowlist",
        "refusedHosts": ["other.example:80", "127.0.0.1:1", "***.example:443"],
    } == codec.record_to_public(record)["isolation"]


@pytest.mark.usefixtures("needs_sandbox")
async def test_network_none_has_the_model_api_alone(worker_setup: WorkerSetup, agent: Agent) -> None:
    """There is no proxy, and the proxy of the model API can be reached."""
    await worker_setup.submit(network=AgentNetwork.NONE)
    script = (
        'status=$(curl -s -o /dev/null -w "%{http_code}" "$ANTHROPIC_BASE_URL")\n'
        """printf '{"type":"seen","proxy":"%s","status":"%s"}\\n' "$HTTPS_PROXY$https_proxy" "$status" """
    )
    cli = agent(script)
    record = await worker_setup.run(cli=cli, isolation=IsolationPolicy(find_sandbox=lambda: sandbox_for(cli())))
    assert {"level": "sandbox", "network": "none"} == codec.record_to_public(record)["isolation"]
    seen = [line for line in await worker_setup.log() if line["type"] == "seen"]
    assert [{"type": "seen", "proxy": "", "status": "401"}] == seen


@pytest.mark.usefixtures("needs_sandbox")
async def test_hosts_must_be_on_each_list() -> None:
    """A host of the request is reached only if the operator's list has it too."""
    spec = task(allowed_hosts=("A.org", "b.org"))
    policy = IsolationPolicy(
        find_sandbox=lambda: sandbox_for(Path("/bin/sh")),
        network=AgentNetwork.ALLOWLIST,
        allowed_hosts=frozenset({"a.org", "c.org"}),
    )
    _, isolation = await policy.confinement()
    isolation, hosts = policy.network_of(spec, isolation)
    assert AgentNetwork.ALLOWLIST is isolation.network
    assert [True, False, False] == [hosts.allows(name) for name in ("a.org", "b.org", "c.org")]
