from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.git import GitSetup, git_setup
from helpers.worker import TASK, Agent, WorkerSetup, agent, agent_user, worker_setup
from standins.gitssh import GitSsh, key_pair, needs_ssh
from standins.repos import Link

from ccrun.process.user import User
from ccrun.task import Reason, Secret, Status
from ccrun.worker.dependencies import WorkerTimeouts

__all__ = ["agent", "agent_user", "git_setup", "worker_setup"]

Line = dict[str, Any]
SECRET = "made-up-value"


async def worker_lines(worker_setup: WorkerSetup, step: str) -> list[Line]:
    """Return the log lines of the worker for a step."""
    lines = await worker_setup.log()
    return [line for line in lines if (line["type"], line.get("step")) == ("worker", step)]


async def text_output(worker_setup: WorkerSetup) -> list[str]:
    """Return the text output of commands and agent."""
    return [
        str(line["content"])
        for line in await worker_setup.log()
        if line["type"] == "text" or line.get("event") == "output"
    ]


# --- commands --------------------------------------------------------------------------------------------------------


async def test_commands_run_before_the_agent_and_are_logged(
    worker_setup: WorkerSetup, agent: Agent, agent_user: User | None
) -> None:
    """Their output to stdout and stderr is logged, and the agent can read the files that they create."""
    await worker_setup.submit(pre_execution_commands=("echo one; echo warning >&2", "echo two >new.txt"))
    record = await worker_setup.run(cli=agent("cat new.txt"), agent_user=agent_user)
    assert Status.COMPLETED == record.status
    logged = [
        (line["event"], line["index"], line.get("content", line.get("exitCode")))
        for line in await worker_lines(worker_setup, "command")
    ]
    assert [
        ("began", 1, None),
        ("output", 1, "one"),
        ("output", 1, "warning"),
        ("ended", 1, 0),
        ("began", 2, None),
        ("ended", 2, 0),
    ] == logged
    assert "two" == (await text_output(worker_setup))[-1]


async def test_commands_have_the_environment_of_the_agent(
    worker_setup: WorkerSetup, agent: Agent, agent_user: User | None
) -> None:
    """They have its variables, home directory and user, and run in the root directory of the repository."""
    command = 'echo "$SECRET_ONE" | rev; echo ${SERVICE_SECRET-none}; id -u; basename ~; basename "$PWD"'
    await worker_setup.submit(pre_execution_commands=(command,), environment_secrets={"SECRET_ONE": Secret(SECRET)})
    await worker_setup.run(cli=agent("true"), agent_user=agent_user)
    uid = os.geteuid() if agent_user is None else agent_user.uid
    assert [SECRET[::-1], "none", str(uid), "home", "repository"] == await text_output(worker_setup)


async def test_commands_are_run_by_bash(worker_setup: WorkerSetup, agent: Agent) -> None:
    """A command may have several lines, pipes and arrays."""
    await worker_setup.submit(
        pre_execution_commands=("a=(1 2)\necho ${a[1]} | cat\nset -o pipefail; false | true || echo caught",)
    )
    await worker_setup.run(cli=agent("true"))
    assert ["2", "caught"] == await text_output(worker_setup)


async def test_failed_command_fails_the_task(worker_setup: WorkerSetup, agent: Agent) -> None:
    """Later commands and the agent do not run, and the error has the end of the output."""
    commands = ("echo one", "seq 10000; echo last line; exit 7", "echo never")
    await worker_setup.submit(pre_execution_commands=commands)
    record = await worker_setup.run(cli=agent("echo never"))
    assert (Status.FAILED, Reason.PREPARE_FAILED) == (record.status, record.reason)
    assert record.error is not None
    assert record.error.startswith("Pre-execution command 2 of 3 failed with exit code 7; the end of its output: ")
    assert record.error.endswith("10000\nlast line")
    assert len(record.error) < 1200
    assert "never" not in await text_output(worker_setup)


async def test_command_killed_by_a_signal_is_reported(worker_setup: WorkerSetup, agent: Agent) -> None:
    """The error states the signal and that there was no output."""
    await worker_setup.submit(pre_execution_commands=("kill -9 $$",))
    record = await worker_setup.run(cli=agent("true"))
    assert "Pre-execution command 1 of 1 was killed by signal 9; it printed nothing." == record.error


async def test_command_is_stopped_after_its_timeout(worker_setup: WorkerSetup, agent: Agent) -> None:
    """The processes that it has started are killed as well."""
    await worker_setup.submit(pre_execution_commands=(f"(exec -a sleeper-{TASK} sleep 600) & echo started; wait",))
    record = await worker_setup.run(
        cli=agent("true"), timeouts=WorkerTimeouts(term_grace=0.2, cancel_poll=0.02, command=0.5)
    )
    assert "Pre-execution command 1 of 1 did not finish within 0.5 s; the end of its output: started" == record.error
    assert not [
        found for found in psutil.process_iter(["cmdline"]) if f"sleeper-{TASK}" in (found.info["cmdline"] or ())
    ]


async def test_background_processes_of_a_command_are_killed(worker_setup: WorkerSetup, agent: Agent) -> None:
    """They do not delay the agent, and do not exist when it runs."""
    start_time = time.monotonic()
    await worker_setup.submit(pre_execution_commands=(f"(exec -a server-{TASK} sleep 600) & echo started",))
    record = await worker_setup.run(cli=agent(f"pgrep -f server-{TASK} | grep -v $$ || echo none"))
    assert Status.COMPLETED == record.status
    assert time.monotonic() - start_time < 60
    assert "none" == (await text_output(worker_setup))[-1]


async def test_cancellation_stops_a_command(worker_setup: WorkerSetup, agent: Agent) -> None:
    """The task is cancelled immediately."""
    await worker_setup.submit(pre_execution_commands=("echo started; sleep 600",))
    running = asyncio.create_task(worker_setup.run(cli=agent("true")))
    async with asyncio.timeout(30):
        while "started" not in await text_output(worker_setup):
            await asyncio.sleep(0.02)
    await worker_setup.dispatcher.cancel(TASK)
    assert Status.CANCELLED == (await running).status


async def test_timeout_of_the_task_includes_commands(worker_setup: WorkerSetup, agent: Agent) -> None:
    """The timeout begins before the first command."""
    await worker_setup.submit(pre_execution_commands=("sleep 600",), timeout_minutes=0.01)
    record = await worker_setup.run(cli=agent("true"))
    assert (Reason.TIMEOUT, 124) == (record.reason, record.exit_code)


async def test_secrets_in_commands_are_redacted(worker_setup: WorkerSetup, agent: Agent) -> None:
    """They are redacted in the log, which contains the commands, and in the error."""
    await worker_setup.submit(
        pre_execution_commands=(f"echo {SECRET}; echo $SECRET_ONE; exit 1",),
        environment_secrets={"SECRET_ONE": Secret(SECRET)},
    )
    record = await worker_setup.run(cli=agent("true"))
    assert SECRET not in str(await worker_setup.log())
    assert SECRET not in str(record.error)
    assert "***\n***" in str(record.error)


async def test_command_is_not_in_process_arguments(worker_setup: WorkerSetup, agent: Agent) -> None:
    """All users of the machine can see the arguments of processes."""
    await worker_setup.submit(pre_execution_commands=("tr '\\0' ' ' </proc/$$/cmdline; echo; : hidden-word",))
    await worker_setup.run(cli=agent("true"))
    assert "hidden-word" not in str(await text_output(worker_setup))


async def test_long_lines_and_large_outputs_are_logged(worker_setup: WorkerSetup, agent: Agent) -> None:
    """Nothing is truncated, and invalid UTF-8 is replaced."""
    await worker_setup.submit(
        pre_execution_commands=("head -c 3000000 /dev/zero | tr '\\0' x; echo; seq 1000; printf '\\377\\n'",)
    )
    await worker_setup.run(cli=agent("true"))
    output = await text_output(worker_setup)
    assert ("x" * 3_000_000, 1002, "\N{REPLACEMENT CHARACTER}") == (output[0], len(output), output[-1])


async def test_command_may_create_the_start_directory(worker_setup: WorkerSetup, agent: Agent) -> None:
    """`cwdRelative` is resolved after the commands."""
    await worker_setup.submit(pre_execution_commands=("mkdir -p packages/app",), cwd_relative="packages/app")
    await worker_setup.run(cli=agent('basename "$PWD"'))
    assert ["app"] == await text_output(worker_setup)


@pytest.mark.parametrize("target", ["/etc", "..", "missing"])
async def test_start_directory_outside_the_workspace_is_rejected(
    worker_setup: WorkerSetup, agent: Agent, target: str
) -> None:
    """A command may have created a link."""
    await worker_setup.submit(pre_execution_commands=(f"ln -s {target} start",), cwd_relative="start")
    record = await worker_setup.run(cli=agent("echo never"))
    assert (Reason.PREPARE_FAILED, "cwdRelative is not a directory of the workspace: start") == (
        record.reason,
        record.error,
    )


# --- the clone and .env ----------------------------------------------------------------------------------------------


@needs_ssh
async def test_failed_clone_fails_the_task(worker_setup: WorkerSetup, git_setup: GitSetup, agent: Agent) -> None:
    """Neither commands nor the agent run, and the error has the message of the clone."""
    async with GitSsh(git_setup.repos) as server:
        await worker_setup.submit(
            git_repo=server.url("missing"), ssh_key=Secret(key_pair().openssh), pre_execution_commands=("echo never",)
        )
        record = await worker_setup.run(cli=agent("echo never"))
    assert Reason.PREPARE_FAILED == record.reason
    assert record.error is not None
    assert record.error.startswith("127.0.0.1 does not have the repository in gitRepo")
    assert [] == await worker_setup.log()


@needs_ssh
async def test_clone_is_logged(worker_setup: WorkerSetup, git_setup: GitSetup, agent: Agent) -> None:
    """The log line has host, revision and commit."""
    repository = await git_setup.repos.create("demo", {"a.txt": "a"})
    async with GitSsh(git_setup.repos) as server:
        await worker_setup.submit(git_repo=server.url("demo"), git_branch="main", ssh_key=Secret(key_pair().openssh))
        await worker_setup.run(cli=agent("cat a.txt; echo"))
    logged = {"host": "127.0.0.1", "revision": "main", "commit": await repository.sha()}
    assert [{"type": "worker", "step": "clone", **logged}] == await worker_lines(worker_setup, "clone")
    assert ["a"] == await text_output(worker_setup)


@needs_ssh
async def test_dotenv_that_is_a_link_is_an_error(
    worker_setup: WorkerSetup, git_setup: GitSetup, agent: Agent, tmp_path: Path
) -> None:
    """The target of the link is unchanged."""
    target = tmp_path / "target"
    target.write_text("unchanged")
    await git_setup.repos.create("demo", {".env": Link(str(target))})
    async with GitSsh(git_setup.repos) as server:
        await worker_setup.submit(
            git_repo=server.url("demo"),
            ssh_key=Secret(key_pair().openssh),
            environment_secrets={"A_SECRET": Secret(SECRET)},
        )
        record = await worker_setup.run(cli=agent("echo never"))
    assert (
        "The repository has a .env that is not a regular file, so the variables cannot be written to it."
        == record.error
    )
    assert "unchanged" == target.read_text()


async def test_variable_left_out_of_dotenv_is_logged(
    worker_setup: WorkerSetup, agent: Agent, agent_user: User | None
) -> None:
    """The log names a variable that is not in `.env`. It is still in the agent's environment."""
    value = 'it\'s "both"\r and a \\'
    await worker_setup.submit(environment_secrets={"QUOTED": Secret(value), "PLAIN": Secret(SECRET)})
    await worker_setup.run(cli=agent('cut -d= -f1 .env; printf "%s" "$QUOTED" | wc -c'), agent_user=agent_user)
    [logged] = await worker_lines(worker_setup, "dotenv")
    assert (
        "Not written to .env, because not all of its readers would read the exact values: QUOTED." == logged["content"]
    )
    assert ["PLAIN", str(len(value))] == await text_output(worker_setup)
