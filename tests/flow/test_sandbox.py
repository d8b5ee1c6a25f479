"""Tasks in a sandbox, end to end, with the real CLI."""

from __future__ import annotations

import attrs
import pytest
from helpers.service import Service, StartService

from ccrun.results import AgentNetwork, Isolation, IsolationLevel
from ccrun.task import Status, TaskRecord
from ccrun.testing.model import Conversation, Reply, Say, UseTool


@pytest.fixture
def backend_name() -> str:
    """Only workers of the local backend use the sandbox of this machine by default."""
    return "local"


@attrs.define
class Commands:
    """A script in which the agent runs one command with the tool `Bash`."""

    command: str = ""

    def __call__(self, conversation: Conversation) -> Reply:
        return UseTool("Bash", {"command": self.command}) if conversation.turn == 0 else Say("Done.")


async def run_in_sandbox(service: Service) -> tuple[TaskRecord, str]:
    """Run a task where there is a sandbox, and return its record and what the command of the agent has printed."""
    isolation = (await service.get("/health?verbose=true"))["isolation"]
    if isolation["level"] != "sandbox":
        pytest.skip(" ".join(isolation["reasons"]))
    task_id = (await service.submit(allowedTools=["Bash"]))["taskId"]
    record = await service.until_final(task_id)
    assert Status.COMPLETED is record.status, record.error
    messages = [event.data for event in await service.events(task_id) if event.name == "message"]
    return record, "".join(
        str(block["content"])
        for message in messages
        if message["type"] == "user"
        for block in message["message"]["content"]
    )


async def test_agent_works_in_a_sandbox(start_service: StartService) -> None:
    """The real CLI runs there with its tools; record and `/health` name the level."""
    script = Commands("echo made >made.txt && cat made.txt && git --version")
    async with start_service(script) as service:
        record, printed = await run_in_sandbox(service)
    assert Isolation(level=IsolationLevel.SANDBOX, network=AgentNetwork.PUBLIC) == record.isolation
    assert printed.startswith("made\ngit version"), printed


async def test_agent_cannot_call_the_service(start_service: StartService) -> None:
    """A service without tokens is not reached by its agents: not directly, and not through their proxy."""
    script = Commands()
    async with start_service(script) as service:
        script.command = (
            f"curl -sS --noproxy '*' {service.url}/tasks; curl -sS --noproxy none {service.url}/tasks;"
            f" curl -sS --noproxy none {service.url.replace('127.0.0.1', 'localhost')}/tasks"
        )
        record, printed = await run_in_sandbox(service)
    port = service.url.rpartition(":")[2]
    assert "taskId" not in printed
    assert "Failed to connect" in printed
    assert record.isolation is not None
    assert (f"127.0.0.1:{port}", f"localhost:{port}") == record.isolation.refused_hosts
