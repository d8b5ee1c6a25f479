"""The command line: `serve`, `worker`, `sweep`, `demo`. Each loads its own wing only."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

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
        port: Instead of PORT.
        host: Instead of HOST.
        data_dir: Instead of CCRUN_DATA_DIR.
    """
    from ccrun.server import serve

    given = {"PORT": port, "HOST": host, "CCRUN_DATA_DIR": data_dir}
    return _run(serve, {name: str(value) for name, value in given.items() if value is not None})


@app.command
def worker() -> int:
    """Run the one task that TASK_ID names; started by ccrun itself, not by hand."""
    from ccrun.worker.__main__ import main

    return main()


@app.command
def sweep() -> int:
    """Settle tasks that died and deliver callbacks that are owed, once. Part of `serve` on the local backend."""
    from ccrun.server import sweep_once

    return _run(sweep_once)


@app.command
def demo(
    *, prompt: Annotated[str | None, cyclopts.Parameter(help="What to ask instead of the demo's own task.")] = None
) -> int:
    """Show a task from the request to the verified callback, on this machine alone."""
    from ccrun.cli.demo import show

    return asyncio.run(show(prompt))


def _run(command: Any, overrides: Mapping[str, str] | None = None) -> int:
    try:
        settings = config.load({**config.environment(), **(overrides or {})})
        log.configure(settings.log_format, settings.log_level)
        asyncio.run(command(settings))
    except CcrunError as error:
        print(error.message, file=sys.stderr)  # noqa: T201 - before there is a log, and for whoever typed the command
        return exit_status(error)
    except KeyboardInterrupt:
        return 130
    return 0


def main() -> None:
    """Run the command that the arguments name, and exit with its status."""
    sys.exit(app())


if __name__ == "__main__":
    main()
