"""Agents of two tasks at once, each with a user of its own and without a sandbox."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import psutil
import pytest
from helpers.service import MADE_UP_KEY, WAIT_SECONDS, Service, StartService
from helpers.worker import Agent, agent

from ccrun.task import Status

__all__ = ["agent"]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may start processes as any user")
#: In two parts, so that a script that looks for it does not find itself.
CANARY = ("canary-", "ofanothertask")
#: Looks for the canary in files and environments, and for a process to signal.
SEARCH = f"""
search() {{
  cat /tmp/ws-*/repository/.env /tmp/ws-*/*/* /proc/[0-9]*/environ
  for pid in $(pgrep -x sleep); do cat /proc/$pid/cwd/.env; kill -0 $pid && echo {CANARY[0]}{CANARY[1]}; done
}}
"""
ATTACK = (
    SEARCH
    + f"""
say() {{ printf '{{"type":"%s","value":"%s"}}\\n' "$1" "$2"; }}
say user $(id -u)
if [ "$ROLE" = victim ]; then
  say ready
  sleep 1000 & wait $!
else
  found=$(timeout 60 bash -c "$(declare -f search); search" 2>/dev/null | tr -d '\\0')
  case $found in *"{CANARY[0]}""{CANARY[1]}"*) say found;; esac
fi
"""
)


@pytest.fixture
def backend_name() -> str:
    """The backend on which several tasks share a machine."""
    return "local"


async def lines_of(service: Service, task_id: str) -> list[dict[str, Any]]:
    """Return the lines of the log of a task."""
    return [event.data for event in await service.events(task_id) if event.name == "message"]


async def until_ready(service: Service, task_id: str) -> None:
    """Wait until an agent says that it is ready."""
    async with asyncio.timeout(WAIT_SECONDS), service.http.get(f"{service.url}/tasks/{task_id}/events") as response:
        async for line in response.content:
            if b'"ready"' in line:
                return


@pytest.mark.parametrize(
    ("settings", "users", "is_found"),
    [
        ({"CCRUN_AGENT_USERS": "61300-61301"}, {"61300", "61301"}, False),
        # The control: with one user for both, the attack succeeds.
        ({"CCRUN_AGENT_USER": "61300"}, {"61300"}, True),
    ],
    ids=["a user each", "one user"],
)
async def test_tasks_cannot_read_each_other(
    start_service: StartService, agent: Agent, settings: dict[str, Any], users: set[str], *, is_found: bool
) -> None:
    """The files, the environment and the memory of the other task are closed, and its processes cannot be signalled."""
    cli = str(agent(ATTACK)())
    async with start_service(CCRUN_SANDBOX="off", CLAUDE_CLI=cli, ANTHROPIC_API_KEY=MADE_UP_KEY, **settings) as service:
        secrets = {"ROLE": "victim", "SECRET": "".join(CANARY)}
        victim = (await service.submit(environmentSecrets=secrets))["taskId"]
        await until_ready(service, victim)
        attacker = (await service.submit(environmentSecrets={"ROLE": "attacker"}))["taskId"]
        record = await service.until_final(attacker)
        assert Status.COMPLETED is record.status, record.error
        await service.http.post(f"{service.url}/cancel/{victim}")
        await service.until_final(victim)
        lines = await lines_of(service, attacker) + await lines_of(service, victim)
    assert users == {line["value"] for line in lines if line["type"] == "user"}
    assert is_found == any(line["type"] == "found" for line in lines)


async def test_users_are_used_again(start_service: StartService, agent: Agent) -> None:
    """More tasks than users wait for each other, and find no process of an earlier one, also with a new session."""
    script = """
printf '{"type":"user","value":"%s","left":%d}\\n' $(id -u) $(pgrep -u $(id -u) -x sleep | wc -l)
for i in $(seq 50); do (setsid env -i sleep 987 >/dev/null 2>&1 &) ; done
"""
    settings: dict[str, Any] = {
        "CCRUN_SANDBOX": "off",
        "CLAUDE_CLI": str(agent(script)()),
        "ANTHROPIC_API_KEY": MADE_UP_KEY,
    }
    async with start_service(CCRUN_AGENT_USERS="61302-61302", **settings) as service:
        task_ids = [(await service.submit())["taskId"] for _ in range(4)]
        lines = []
        for task_id in task_ids:
            record = await service.until_final(task_id)
            assert Status.COMPLETED is record.status, record.error
            lines += await lines_of(service, task_id)
    seen = [(line["value"], line["left"]) for line in lines if line["type"] == "user"]
    assert [("61302", 0)] * 4 == seen
    assert 61302 not in await asyncio.to_thread(
        lambda: {process.info["uids"].real for process in psutil.process_iter(["uids"])}
    )
