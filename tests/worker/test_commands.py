"""The variables that commands before the agent set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.worker import Agent, WorkerSetup, agent, agent_user, worker_setup

from ccrun.process.user import User
from ccrun.spec import MAX_ARGUMENT_BYTES, MAX_ENVIRONMENT_BYTES, MAX_ENVIRONMENT_VARIABLES
from ccrun.task import Reason, Status
from ccrun.worker.commands import InvalidVariables, parse_variables

__all__ = ["agent", "agent_user", "worker_setup"]


async def output(worker_setup: WorkerSetup) -> list[str]:
    """Return the text output of commands and agent."""
    lines = await worker_setup.log()
    return [str(line["content"]) for line in lines if line["type"] == "text" or line.get("event") == "output"]


# --- the format ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "variables"),
    [
        ("", {}),
        ("A=1\n", {"A": "1"}),
        ("A=1\nB=a=b c\n\n  \nA=2", {"A": "2", "B": "a=b c"}),
        ("A=\n", {"A": ""}),
        ("A= '$x' \n", {"A": " '$x' "}),
        ("A<<END\none\n\nB=2\nEND\nC=3\n", {"A": "one\n\nB=2", "C": "3"}),
        ("A<<END\nEND\n", {"A": ""}),
        ("A=ä\u2028b\n", {"A": "ä\u2028b"}),
    ],
)
def test_format_is_that_of_github(content: str, variables: dict[str, str]) -> None:
    """A line is `NAME=value`; a value of several lines has a delimiter. The last line for a name counts."""
    assert variables == parse_variables(content.encode())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"A=1\nexport B=2\n", "line 2 must be NAME=value or NAME<<DELIMITER."),
        (b"1A=1\n", "line 1 must be NAME=value or NAME<<DELIMITER."),
        (b"A<<END\none\n", "the delimiter of line 1 does not follow."),
        (b"A=\xff\n", "it is not UTF-8."),
        (b"A=a\0b\n", "the value of A may not contain a NUL character."),
        (b"HOME=/\n", "HOME is reserved: the service itself sets this variable."),
        (b"ANTHROPIC_BASE_URL=http://a\n", "ANTHROPIC_BASE_URL is reserved: the service itself sets this variable."),
        (b"no_proxy=*\n", "no_proxy is reserved: the service itself sets this variable."),
        (b"A=" + b"x" * MAX_ARGUMENT_BYTES, f"the value of A is longer than {MAX_ARGUMENT_BYTES} bytes."),
        (
            b"".join(b"A%d=1\n" % number for number in range(MAX_ENVIRONMENT_VARIABLES + 1)),
            f"it may set at most {MAX_ENVIRONMENT_VARIABLES} variables.",
        ),
    ],
)
def test_invalid_file_is_an_error(content: bytes, message: str) -> None:
    """The error says what is wrong."""
    with pytest.raises(InvalidVariables) as caught:
        parse_variables(content)
    assert message == caught.value.message


# --- in a task -------------------------------------------------------------------------------------------------------


async def test_later_commands_and_the_agent_get_the_variables(
    worker_setup: WorkerSetup, agent: Agent, agent_user: User | None
) -> None:
    """A command adds lines to the file that CCRUN_ENV names. The agent does not get that name."""
    commands = (
        'echo "VERSION=1.2" >>"$CCRUN_ENV"',
        'echo "FULL=$VERSION.3" >>"$CCRUN_ENV"',
        '{ echo "NOTES<<END"; echo one; echo two; echo END; } >>"$CCRUN_ENV"',
    )
    await worker_setup.submit(pre_execution_commands=commands)
    record = await worker_setup.run(
        cli=agent('echo "$VERSION $FULL ${CCRUN_ENV-unset}"; echo "$NOTES"'), agent_user=agent_user
    )
    assert Status.COMPLETED == record.status
    assert ["1.2 1.2.3 unset", "one", "two"] == (await output(worker_setup))[:3]


async def test_path_is_searched_first(worker_setup: WorkerSetup, agent: Agent) -> None:
    """A PATH of the file comes before the one that the CLI needs."""
    await worker_setup.submit(pre_execution_commands=('echo PATH=/made-up/bin >"$CCRUN_ENV"',))
    await worker_setup.run(cli=agent("echo $PATH"))
    assert f"/made-up/bin:{os.environ['PATH']}" in await output(worker_setup)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ('echo hello >"$CCRUN_ENV"', "line 1 must be NAME=value or NAME<<DELIMITER."),
        ('rm "$CCRUN_ENV"', "it cannot be read."),
        (f'head -c {MAX_ENVIRONMENT_BYTES + 1} /dev/zero >"$CCRUN_ENV"', "it may have at most 524288 bytes."),
    ],
)
async def test_invalid_file_fails_the_task(worker_setup: WorkerSetup, agent: Agent, command: str, message: str) -> None:
    """The error names the command, and those after it are not run."""
    await worker_setup.submit(pre_execution_commands=(command, "echo second"))
    record = await worker_setup.run(cli=agent("echo started"))
    expected = f"Pre-execution command 1 of 2 made the file $CCRUN_ENV invalid: {message}"
    assert (Reason.PREPARE_FAILED, expected) == (record.reason, record.error)
    assert [] == await output(worker_setup)


async def test_file_is_read_with_the_rights_of_the_agent(
    worker_setup: WorkerSetup, agent: Agent, agent_user: User | None, tmp_path: Path
) -> None:
    """A link to a file that the agent cannot read does not expose it."""
    if agent_user is None:
        pytest.skip("the agent has the rights of the worker")
    secret = tmp_path / "secret"
    secret.write_text("A=of-the-worker\n")
    secret.chmod(0o600)
    await worker_setup.submit(pre_execution_commands=(f'ln -sf {secret} "$CCRUN_ENV"',))
    record = await worker_setup.run(cli=agent("echo $A"), agent_user=agent_user)
    assert (Reason.PREPARE_FAILED, []) == (record.reason, await output(worker_setup))
