"""How the processes of an agent are kept apart from the rest of the machine, and the servers that they can reach."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Final

import attrs

from ccrun.errors import CcrunError
from ccrun.process.sandbox import Sandbox, open_filter
from ccrun.process.user import User

#: Seconds for a sandbox to start. It takes a twentieth of a second.
START_SECONDS: Final = 60.0

#: Serves the connections of a listener while the context is open.
Server = Callable[[socket.socket], AbstractAsyncContextManager[object]]


class SandboxNotStarted(CcrunError):
    """The sandbox of a program did not start."""


@attrs.frozen(kw_only=True)
class Confinement:
    """How the processes of an agent are started.

    Args:
        user: Their user, None for the worker's own.
        sandbox: Their sandbox, None when they see the machine.
        servers: What they reach in a sandbox, by port of its loopback. Without a sandbox, they reach all of the machine.
    """

    user: User | None = None
    sandbox: Sandbox | None = None
    servers: Mapping[int, Server] = attrs.field(factory=dict)

    def within(self, directory: Path) -> Confinement:
        """Return the same with a directory that is visible in the sandbox and may be written to."""
        if self.sandbox is None:
            return self
        return attrs.evolve(self, sandbox=attrs.evolve(self.sandbox, writable=directory))

    @contextlib.contextmanager
    def start(self, argv: Sequence[str], cwd: Path) -> Iterator[Start]:
        """Yield how a program is started. The context must stay open until `Start.serve` has returned."""
        with contextlib.ExitStack() as stack:
            command, inherited, ends = list(argv), [], None
            if self.sandbox is not None:
                if self.servers:
                    ends = tuple(stack.enter_context(end) for end in socket.socketpair())
                    inherited.append(ends[1].fileno())
                    command = self.sandbox.serving_argv(command, control=ends[1].fileno(), ports=self.servers)
                filter_file = stack.enter_context(open_filter(self.sandbox.filter))
                inherited.append(filter_file)
                command = self.sandbox.argv(command, cwd=cwd, filter_file=filter_file)
            if self.user is not None:
                command = self.user.argv(command)
            if self.sandbox is not None and ends is not None:
                # Only with `sandbox_init`, which makes the program handle it again.
                command = [*self.sandbox.ignores_sigterm, *command]
            yield Start(argv=command, inherited=inherited, servers=self.servers, ends=ends)


@attrs.frozen(kw_only=True)
class Start:
    """How a program is started.

    Args:
        argv: The complete command.
        inherited: Descriptors that it inherits.
        servers: As in `Confinement`.
        ends: Unix sockets on which the sandbox gives the listeners: the worker's end, and its own.
    """

    argv: Sequence[str]
    inherited: Sequence[int]
    servers: Mapping[int, Server]
    ends: tuple[socket.socket, ...] | None

    async def serve(self, stack: AsyncExitStack) -> None:
        """Serve the listeners of the sandbox, which has been started, until the stack is closed.

        Raises:
            SandboxNotStarted: The sandbox has not sent its listeners.
        """
        if self.ends is None:
            return
        worker_end, sandbox_end = self.ends
        sandbox_end.close()
        for server, listener in zip(self.servers.values(), await _receive(worker_end, len(self.servers)), strict=True):
            await stack.enter_async_context(server(listener))


async def _receive(end: socket.socket, number: int) -> list[socket.socket]:
    loop = asyncio.get_running_loop()
    end.setblocking(False)
    readable = asyncio.Event()
    loop.add_reader(end, readable.set)
    try:
        async with asyncio.timeout(START_SECONDS):
            await readable.wait()
    except TimeoutError:
        raise SandboxNotStarted("The sandbox did not start in time.") from None
    finally:
        loop.remove_reader(end)
    _, descriptors, _, _ = socket.recv_fds(end, 1, number)
    listeners = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    if len(listeners) != number:
        raise SandboxNotStarted("The sandbox could not be started.")
    return listeners
