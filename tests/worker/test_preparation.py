from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.git import GitSetup, git_setup
from helpers.worker import TASK, WorkerSetup, agent, agent_user, worker_setup
from standins.gitssh import GitSsh, key_pair, needs_ssh
from standins.repos import Link

from ccrun.process.user import User
from ccrun.task import Reason, Secret, Status
from ccrun.worker.dependencies import WorkerTimeouts

__all__ = ["agent", "agent_user", "git_setup", "worker_setup"]

Agent = Callable[..., Callable[[], Path]]
Line = dict[str, Any]
SECRET = "made-up-value"


async def lines_of(worker_setup: WorkerSetup, step: str) -> list[Line]:
    """Return what the worker says of a step in the log."""
    lines = await worker_setup.log()
    return [line for line in lines if (line["type"], line.get("step")) == ("worker", step)]


async def printed_by(worker_setup: WorkerSetup) -> list[str]:
    """Return what commands and agent printed as plain text."""
    return [
        str(line["content"])
        for line in await worker_setup.log()
        if line["type"] == "text" or line.get("event") == "output"
    ]


# --- commands --------------------------------------------------------------------------------------------------------


async def test_commands_run_before_the_agent_and_into_the_log(
    worker_setup: WorkerSetup, agent: Agent, agent_user: User | None
) -> None:
    """In their order, each line as it comes, what they complain of too; the agent finds what they have made."""
    await worker_setup.submit(pre_execution_commands=("echo one; echo oh >&2", "echo two >made.txt"))
    record = await worker_setup.run(cli=agent("cat made.txt"), agent_user=agent_user)
    assert Status.COMPLETED == record.status
    told = [
        (line["event"], line["index"], line.get("content", line.get("exitCode")))
        for line in await lines_of(worker_setup, "command")
    ]
    assert [
        ("began", 1, None),
        ("output", 1, "one"),
        ("output", 1, "oh"),
        ("ended", 1, 0),
        ("began", 2, None),
        ("ended", 2, 0),
    ] == told
    assert "two" == (await printed_by(worker_setup))[-1]


async def test_commands_have_the_agents_environment(
    worker_setup: WorkerSetup, agent: Agent, agent_user: User | None
) -> None:
    """Its variables, its home and its user; nothing of the worker's; and they start at the top of the workspace."""
    command = 'echo "$SECRET_ONE" | rev; echo ${SERVICE_SECRET-none}; id -u; basename ~; basename "$PWD"'
    await worker_setup.submit(pre_execution_commands=(command,), environment_secrets={"SECRET_ONE": Secret(SECRET)})
    await worker_setup.run(cli=agent("true"), agent_user=agent_user)
    uid = os.geteuid() if agent_user is None else agent_user.uid
    assert [SECRET[::-1], "none", str(uid), "home", "repository"] == await printed_by(worker_setup)


async def test_commands_are_for_bash(worker_setup: WorkerSetup, agent: Agent) -> None:
    """Several lines, pipes and arrays."""
    await worker_setup.submit(
        pre_execution_commands=("a=(1 2)\necho ${a[1]} | cat\nset -o pipefail; false | true || echo caught",)
    )
    await worker_setup.run(cli=agent("true"))
    assert ["2", "caught"] == await printed_by(worker_setup)


async def test_the_first_that_fails_ends_the_task_with_the_end_of_its_output(
    worker_setup: WorkerSetup, agent: Agent
) -> None:
    """Those that follow are not run, nor is the agent."""
    commands = ("echo fine", "seq 10000; echo the end; exit 7", "echo never")
    await worker_setup.submit(pre_execution_commands=commands)
    record = await worker_setup.run(cli=agent("echo never"))
    assert (Status.FAILED, Reason.PREPARE_FAILED) == (record.status, record.reason)
    assert record.error is not None
    assert record.error.startswith("Pre-execution command 2 of 3 failed with exit code 7; the end of its output: ")
    assert record.error.endswith("10000\nthe end")
    assert len(record.error) < 1200
    assert "never" not in await printed_by(worker_setup)


async def test_a_command_that_a_signal_ends_is_told(worker_setup: WorkerSetup, agent: Agent) -> None:
    """And that it printed nothing."""
    await worker_setup.submit(pre_execution_commands=("kill -9 $$",))
    record = await worker_setup.run(cli=agent("true"))
    assert "Pre-execution command 1 of 1 was killed by signal 9; it printed nothing." == record.error


async def test_a_command_over_its_time_is_ended(worker_setup: WorkerSetup, agent: Agent) -> None:
    """With all that it has started."""
    await worker_setup.submit(pre_execution_commands=(f"(exec -a sleeper-{TASK} sleep 600) & echo begun; wait",))
    record = await worker_setup.run(
        cli=agent("true"), timeouts=WorkerTimeouts(term_grace=0.2, cancel_poll=0.02, command=0.5)
    )
    assert "Pre-execution command 1 of 1 did not finish within 0.5 s; the end of its output: begun" == record.error
    assert not [
        found for found in psutil.process_iter(["cmdline"]) if f"sleeper-{TASK}" in (found.info["cmdline"] or ())
    ]


async def test_what_a_command_leaves_running_ends_with_it(worker_setup: WorkerSetup, agent: Agent) -> None:
    """A server that it put into the background holds nothing up."""
    began = time.monotonic()
    await worker_setup.submit(pre_execution_commands=(f"(exec -a server-{TASK} sleep 600) & echo begun",))
    record = await worker_setup.run(cli=agent(f"pgrep -f server-{TASK} | grep -v $$ || echo gone"))
    assert Status.COMPLETED == record.status
    assert time.monotonic() - began < 20
    assert "gone" == (await printed_by(worker_setup))[-1]


async def test_a_cancel_ends_a_command(worker_setup: WorkerSetup, agent: Agent) -> None:
    """The task is over at once, as cancelled."""
    await worker_setup.submit(pre_execution_commands=("echo begun; sleep 600",))
    running = asyncio.create_task(worker_setup.run(cli=agent("true")))
    async with asyncio.timeout(30):
        while "begun" not in await printed_by(worker_setup):
            await asyncio.sleep(0.02)
    await worker_setup.dispatcher.cancel(TASK)
    assert Status.CANCELLED == (await running).status


async def test_the_time_limit_counts_for_commands(worker_setup: WorkerSetup, agent: Agent) -> None:
    """It is that of the task."""
    await worker_setup.submit(pre_execution_commands=("sleep 600",), timeout_minutes=0.01)
    record = await worker_setup.run(cli=agent("true"))
    assert (Reason.TIMEOUT, 124) == (record.reason, record.exit_code)


async def test_secrets_are_masked_in_what_commands_say(worker_setup: WorkerSetup, agent: Agent) -> None:
    """In the log, which shows the command too, and in the error."""
    await worker_setup.submit(
        pre_execution_commands=(f"echo {SECRET}; echo $SECRET_ONE; exit 1",),
        environment_secrets={"SECRET_ONE": Secret(SECRET)},
    )
    record = await worker_setup.run(cli=agent("true"))
    assert SECRET not in str(await worker_setup.log())
    assert SECRET not in str(record.error)
    assert "***\n***" in str(record.error)


async def test_a_command_is_in_no_argument(worker_setup: WorkerSetup, agent: Agent) -> None:
    """The list of processes, which every user of a machine sees, does not tell it."""
    await worker_setup.submit(pre_execution_commands=("tr '\\0' ' ' </proc/$$/cmdline; echo; : hidden-word",))
    await worker_setup.run(cli=agent("true"))
    assert "hidden-word" not in str(await printed_by(worker_setup))


async def test_a_long_line_and_much_output_pass(worker_setup: WorkerSetup, agent: Agent) -> None:
    """Nothing is cut, and what is no UTF-8 becomes text."""
    await worker_setup.submit(
        pre_execution_commands=("head -c 3000000 /dev/zero | tr '\\0' x; echo; seq 1000; printf '\\377\\n'",)
    )
    await worker_setup.run(cli=agent("true"))
    printed = await printed_by(worker_setup)
    assert ("x" * 3_000_000, 1002, "\N{REPLACEMENT CHARACTER}") == (printed[0], len(printed), printed[-1])


async def test_a_command_may_make_the_folder_that_the_agent_starts_in(worker_setup: WorkerSetup, agent: Agent) -> None:
    """`cwdRelative` is looked up when the agent starts."""
    await worker_setup.submit(pre_execution_commands=("mkdir -p packages/app",), cwd_relative="packages/app")
    await worker_setup.run(cli=agent('basename "$PWD"'))
    assert ["app"] == await printed_by(worker_setup)


@pytest.mark.parametrize("target", ["/etc", "..", "missing"])
async def test_a_start_folder_that_leads_out_is_refused(worker_setup: WorkerSetup, agent: Agent, target: str) -> None:
    """A command may have made a link of it."""
    await worker_setup.submit(pre_execution_commands=(f"ln -s {target} start",), cwd_relative="start")
    record = await worker_setup.run(cli=agent("echo never"))
    assert (Reason.PREPARE_FAILED, "cwdRelative is not a directory of the workspace: start") == (
        record.reason,
        record.error,
    )


# --- the clone and .env --------------------------------------------------------------------------------------------------


@needs_ssh
async def test_a_clone_that_fails_ends_the_task(worker_setup: WorkerSetup, git_setup: GitSetup, agent: Agent) -> None:
    """With its one sentence, and without running anything."""
    async with GitSsh(git_setup.repos) as server:
        await worker_setup.submit(
            git_repo=server.url("nope"), ssh_key=Secret(key_pair().openssh), pre_execution_commands=("echo never",)
        )
        record = await worker_setup.run(cli=agent("echo never"))
    assert Reason.PREPARE_FAILED == record.reason
    assert record.error is not None
    assert record.error.startswith("127.0.0.1 does not have the repository in gitRepo")
    assert [] == await worker_setup.log()


@needs_ssh
async def test_the_clone_is_told_in_the_log(worker_setup: WorkerSetup, git_setup: GitSetup, agent: Agent) -> None:
    """Host, revision and commit."""
    repository = await git_setup.repos.create("demo", {"a.txt": "a"})
    async with GitSsh(git_setup.repos) as server:
        await worker_setup.submit(git_repo=server.url("demo"), git_branch="main", ssh_key=Secret(key_pair().openssh))
        await worker_setup.run(cli=agent("cat a.txt; echo"))
    told = {"host": "127.0.0.1", "revision": "main", "commit": await repository.sha()}
    assert [{"type": "worker", "step": "clone", **told}] == await lines_of(worker_setup, "clone")
    assert ["a"] == await printed_by(worker_setup)


@needs_ssh
async def test_a_dotenv_that_is_a_link_is_refused(
    worker_setup: WorkerSetup, git_setup: GitSetup, agent: Agent, tmp_path: Path
) -> None:
    """Nothing is written where it leads."""
    target = tmp_path / "target"
    target.write_text("untouched")
    await git_setup.repos.create("demo", {".env": Link(str(target))})
    async with GitSsh(git_setup.repos) as server:
        await worker_setup.submit(
            git_repo=server.url("demo"),
            ssh_key=Secret(key_pair().openssh),
            environment_secrets={"A_SECRET": Secret(SECRET)},
        )
        record = await worker_setup.run(cli=agent("echo never"))
    assert "The repository has a .env that is no file, so the variables cannot be kept there." == record.error
    assert "untouched" == target.read_text()


async def test_variable_left_out_of_dotenv_is_logged(
    worker_setup: WorkerSetup, agent: Agent, agent_user: User | None
) -> None:
    """The log names a variable that is not in `.env`. It is still in the agent's environment."""
    awkward = 'it\'s "both"\r and a \\'
    await worker_setup.submit(environment_secrets={"AWKWARD": Secret(awkward), "PLAIN": Secret(SECRET)})
    await worker_setup.run(cli=agent('cut -d= -f1 .env; printf "%s" "$AWKWARD" | wc -c'), agent_user=agent_user)
    [told] = await lines_of(worker_setup, "dotenv")
    assert "Left out of .env, since its readers would not all read their exact values: AWKWARD." == told["content"]
    assert ["PLAIN", str(len(awkward))] == await printed_by(worker_setup)
