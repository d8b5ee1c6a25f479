"""The first program in a sandbox: listens on ports of its loopback, gives the listeners away, and becomes another program.

Runs with the standard library alone. Sockets stay in the network namespace in which they were created, so a worker
that has these accepts connections from the sandbox, whose network is otherwise empty.

    python -c SOURCE DESCRIPTOR PORT,PORT… PROGRAM ARGUMENT…
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import Final

#: Connections that wait to be accepted.
BACKLOG: Final = 128


def main(descriptor: str, ports: str, *argv: str) -> None:
    """Do what the module says. `descriptor` is a Unix socket that receives the listeners."""
    listeners = [socket.create_server(("127.0.0.1", int(port)), backlog=BACKLOG) for port in ports.split(",")]
    with socket.socket(fileno=int(descriptor)) as control:
        socket.send_fds(control, [b"\0"], [listener.fileno() for listener in listeners])
    # `env` has made bubblewrap, and with it this process, ignore SIGTERM: bubblewrap would kill all at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.execvp(argv[0], argv)  # noqa: S606 - without a shell, which is what is wanted


if __name__ == "__main__":
    main(*sys.argv[1:])
