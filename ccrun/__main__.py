"""The command line: `serve`, `worker`, `sweep`, `check` and `demo`. Each command loads only what it needs."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts

from ccrun import __version__, config, log
from ccrun.errors import CcrunError, exit_status

app = cyclopts.App(
    name="ccrun",
    version=__version__,
    help="Run the Claude Code CLI for other programs. Settings come from the environment; see the documentation.",
)


@app.command
def serve(*, port: int | None = None, host: str | None = None, data_dir: Path | None = None) -> int:
    """Serve the HTTP API until SIGTERM or Ctrl-C.

    Args:
        port: Overrides PORT.
        host: Overrides HOST.
        data_dir: Overrides CCRUN_DATA_DIR.
    """
    from ccrun.server import serve

    given = {"PORT": port, "HOST": host, "CCRUN_DATA_DIR": data_dir}
    return _run(serve, {name: str(value) for name, value in given.items() if value is not None})


@app.command
def worker() -> int:
    """Run the task that TASK_ID names. ccrun starts this itself."""
    from ccrun.worker.__main__ import main

    return main()


@app.command
def sweep() -> int:
    """Settle lost tasks and deliver owed callbacks, once. The local backend does this as part of `serve`."""
    from ccrun.server import sweep_once

    return _run(sweep_once)


@app.command
def check(name: Literal["local", "remote", "remote-async", "auth", "examples", "sandbox"], /, *files: Path) -> int:
    """Check a service from outside, as its clients see it; or, with `sandbox`, the place where this command runs.

    SERVICE_URL names a service that runs; AUTH_TOKEN is its bearer token, and TEST_CALLBACK_URL is where its callbacks go.

    Args:
        name: `local` starts a service here. `remote` streams a task of the service at SERVICE_URL. `remote-async` runs one in the
            background. `auth` sends requests without a token and with a wrong one. `examples` sends the requests in the files.
            `sandbox` prints at which level agents would be isolated here, and fails if that is not a sandbox.
        files: Requests for `examples`.
    """
    if name == "sandbox":
        return _check_sandbox()
    from ccrun.cli.check import run_checks

    return asyncio.run(run_checks(name, files, config.environment()))


@app.command
def demo(*, prompt: Annotated[str | None, cyclopts.Parameter(help="The prompt of the task.")] = None) -> int:
    """Show a task from the request to the verified callback, on this machine alone."""
    from ccrun.cli.demo import show

    return asyncio.run(show(prompt))


def _check_sandbox() -> int:
    from ccrun.agent_sandbox import isolation_here, sentence_about
    from ccrun.results import IsolationLevel

    try:
        environment = config.environment()
        isolation = isolation_here(config.load(environment), {"PATH": os.defpath, **environment})
    except CcrunError as error:
        print(error.message, file=sys.stderr)  # noqa: T201 - the log is for services
        return exit_status(error)
    print(sentence_about(isolation))  # noqa: T201
    return 0 if isolation.level is IsolationLevel.SANDBOX else 1


def _run(command: Any, overrides: Mapping[str, str] | None = None) -> int:
    try:
        settings = config.load({**config.environment(), **(overrides or {})})
        log.configure(settings.log_format, settings.log_level)
        asyncio.run(command(settings))
    except CcrunError as error:
        print(error.message, file=sys.stderr)  # noqa: T201 - the log may not be configured yet
        return exit_status(error)
    except KeyboardInterrupt:
        return 130
    return 0


def main() -> None:
    """Run the command that the arguments name, and exit with its status."""
    sys.exit(app())


if __name__ == "__main__":
    main()
