"""The commands of a request that run before the agent, and the variables that they set."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Final

from ccrun.errors import CcrunError
from ccrun.process.capture import OutputTooLarge, capture
from ccrun.process.child import spawn
from ccrun.process.tree import MARKER_VARIABLE
from ccrun.spec import (
    MAX_ARGUMENT_BYTES,
    MAX_ENVIRONMENT_BYTES,
    MAX_ENVIRONMENT_VARIABLES,
    VARIABLE_NAME,
    is_merged_variable,
    is_reserved_variable,
)
from ccrun.worker.git.run import SYSTEM_PATH
from ccrun.worker.lines import text_line, worker_line
from ccrun.worker.preparation import LogLine, PreparationFailed
from ccrun.worker.workspace import Workspace

#: Bytes at the end of a command's output that its error shows.
TAIL_BYTES: Final = 1000
#: The variable that names the file to which commands add variables.
FILE_VARIABLE: Final = "CCRUN_ENV"
#: The name of that file among the inputs.
FILE_NAME: Final = "environment"
#: Seconds for reading it. A command may have replaced it by something that never ends.
READ_SECONDS: Final = 20.0


async def run_commands(
    commands: Sequence[str],
    workspace: Workspace,
    *,
    environment: Mapping[str, str],
    log_line: LogLine,
    seconds: float,
    max_line_bytes: int,
) -> dict[str, str]:
    """Run the commands one after another, each in a shell with its own process group, and log their output.

    Args:
        environment: The environment variables of the agent.
        log_line: Adds a line to the log of the task.
        seconds: The timeout of each command.
        max_line_bytes: The bytes of a line of output that are logged.

    Returns:
        These variables, with those that the commands have set.

    Raises:
        PreparationFailed: A command failed or timed out, or set a variable that it may not set. Those after it are not run.
    """
    variables = dict(environment)
    shell = await asyncio.to_thread(shutil.which, "bash", path=SYSTEM_PATH) or "/bin/sh"
    for index, command in enumerate(commands, start=1):
        await log_line(worker_line("command", event="began", index=index, command=command))
        # In a file, since an argument, with any secret in it, would be visible in the process list.
        script = workspace.inputs / f"command-{index}"
        label = f"Pre-execution command {index} of {len(commands)}"
        tail, printed = bytearray(), 0
        async with spawn(
            [shell, str(script)],
            env={**variables, FILE_VARIABLE: str(workspace.inputs / FILE_NAME)},
            cwd=workspace.repository,
            confinement=workspace.confinement,
            joins_stderr=True,
        ) as child:
            try:
                async with asyncio.timeout(seconds):
                    async for line in child.lines(max_line_bytes):
                        printed += len(line) + 1
                        tail += line[-TAIL_BYTES:] + b"\n"
                        del tail[:-TAIL_BYTES]
                        await log_line(text_line(line, type="worker", step="command", event="output", index=index))
                    exit_status = await child.wait()
            except TimeoutError:
                limit = f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} s"
                raise PreparationFailed(
                    f"{label} did not finish within {limit}{_output_suffix(tail, printed)}"
                ) from None
        await log_line(worker_line("command", event="ended", index=index, exitCode=exit_status.code))
        if not exit_status.ok:
            how = (
                f"was killed by signal {exit_status.signal}"
                if exit_status.signal
                else f"failed with exit code {exit_status.code}"
            )
            raise PreparationFailed(f"{label} {how}{_output_suffix(tail, printed)}")
        try:
            variables = {**environment, **await _read_variables(workspace, environment)}
        except InvalidVariables as error:
            raise PreparationFailed(f"{label} made the file ${FILE_VARIABLE} invalid: {error.message}") from None
    return variables


def command_files(commands: Sequence[str]) -> dict[str, bytes]:
    """Return the files that `run_commands` needs, by name: the scripts, and the empty file for variables."""
    scripts = {f"command-{index}": f"{command}\n".encode() for index, command in enumerate(commands, start=1)}
    return {**scripts, FILE_NAME: b""} if scripts else {}


def _output_suffix(tail: bytes | bytearray, printed: int) -> str:
    text = tail.decode(errors="replace").strip()
    if text and printed > len(tail):
        text = f"…{text}"
    return f"; the end of its output: {text}" if text else "; it printed nothing."


# --- variables -------------------------------------------------------------------------------------------------------


class InvalidVariables(CcrunError):
    """The file for variables is not valid."""


async def _read_variables(workspace: Workspace, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the commands have set so far.

    Raises:
        InvalidVariables: The file is not valid.
    """
    try:
        # As the agent's user, so that a link cannot expose a file that the agent cannot read.
        ran = await capture(
            ["cat", "--", str(workspace.inputs / FILE_NAME)],
            env={"PATH": SYSTEM_PATH, MARKER_VARIABLE: environment[MARKER_VARIABLE]},
            cwd=workspace.root,
            confinement=workspace.confinement,
            seconds=READ_SECONDS,
            max_bytes=MAX_ENVIRONMENT_BYTES,
        )
    except OutputTooLarge:
        raise InvalidVariables(f"it may have at most {MAX_ENVIRONMENT_BYTES} bytes.") from None
    except CcrunError:
        raise InvalidVariables("it cannot be read.") from None
    if not ran.exit.ok:
        raise InvalidVariables("it cannot be read.")
    variables = parse_variables(ran.stdout)
    if "PATH" in variables:
        # The CLI needs the other one.
        variables["PATH"] = f"{variables['PATH']}{os.pathsep}{environment['PATH']}"
    return variables


def parse_variables(content: bytes) -> dict[str, str]:
    """Parse lines `NAME=value`. A value of several lines is `NAME<<DELIMITER`, its lines, and the delimiter.

    This is the format of `GITHUB_ENV`: https://docs.github.com/actions/reference/workflow-commands-for-github-actions.

    Raises:
        InvalidVariables: A line or a variable is not valid.
    """
    try:
        lines = enumerate(content.decode().split("\n"), start=1)
    except UnicodeDecodeError:
        raise InvalidVariables("it is not UTF-8.") from None
    variables = {}
    for number, line in lines:
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise InvalidVariables(f"line {number} must be NAME=value or NAME<<DELIMITER.")
        name, separator, value = match.groups()
        if separator == "<<":
            delimiter, value_lines = value, []
            for _, text in lines:
                if text == delimiter:
                    break
                value_lines.append(text)
            else:
                raise InvalidVariables(f"the delimiter of line {number} does not follow.")
            value = "\n".join(value_lines)
        _check_variable(name, value)
        variables[name] = value
        if len(variables) > MAX_ENVIRONMENT_VARIABLES:
            raise InvalidVariables(f"it may set at most {MAX_ENVIRONMENT_VARIABLES} variables.")
    return variables


_LINE: Final = re.compile(rf"({VARIABLE_NAME})(=|<<)(.*)")


def _check_variable(name: str, value: str) -> None:
    if is_reserved_variable(name) or is_merged_variable(name):
        raise InvalidVariables(f"{name} is reserved: the service itself sets this variable.")
    if "\0" in value:
        raise InvalidVariables(f"the value of {name} may not contain a NUL character.")
    if len(name) + 1 + len(value.encode()) > MAX_ARGUMENT_BYTES:
        raise InvalidVariables(f"the value of {name} is longer than {MAX_ARGUMENT_BYTES} bytes.")
