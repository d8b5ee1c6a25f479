"""A stand-in for a git host over SSH on a loopback socket: asyncssh in front of the real git commands.

Like the well-known hosts, it runs only `git-upload-pack` and `git-receive-pack`, and only on repositories below its root.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import json
import shlex
import shutil
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Literal, Self

import asyncssh
import attrs
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from standins.git_process import backend, environment, pump
from standins.repos import Repos

COMMANDS: Final = frozenset({"git-upload-pack", "git-receive-pack"})

#: For tests in which git is the client.
needs_ssh: Final = pytest.mark.skipif(
    shutil.which("ssh") is None, reason="ssh is not installed: git cannot reach a server over SSH"
)


@attrs.frozen(kw_only=True)
class KeyPair:
    """A client's key pair, with the private key in every common format."""

    #: `-----BEGIN OPENSSH PRIVATE KEY-----`, the format of ssh-keygen.
    openssh: str
    #: `-----BEGIN PRIVATE KEY-----`
    pkcs8: str
    #: `-----BEGIN RSA PRIVATE KEY-----`; None for other keys.
    pem: str | None
    #: `-----BEGIN ENCRYPTED PRIVATE KEY-----`, protected by a passphrase.
    encrypted: str
    #: A line of `authorized_keys`.
    public: str


@functools.cache
def key_pair(kind: Literal["ed25519", "rsa"] = "ed25519", number: int = 0) -> KeyPair:
    """Return a key pair, which differs for each number. Cached, since creating an RSA key is slow."""
    key = (
        ed25519.Ed25519PrivateKey.generate()
        if kind == "ed25519"
        else rsa.generate_private_key(public_exponent=65537, key_size=2048)
    )

    def private(form: PrivateFormat, encryption: serialization.KeySerializationEncryption | None = None) -> str:
        return key.private_bytes(Encoding.PEM, form, encryption or NoEncryption()).decode()

    return KeyPair(
        openssh=private(PrivateFormat.OpenSSH),
        pkcs8=private(PrivateFormat.PKCS8),
        pem=private(PrivateFormat.TraditionalOpenSSL) if kind == "rsa" else None,
        encrypted=private(PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"a passphrase")),
        public=f"{key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()} a test's key {number}",
    )


class Mode(enum.Enum):
    """How the server handles connections."""

    SERVE = enum.auto()
    #: Reject every key.
    REFUSE_KEYS = enum.auto()
    #: Accept connections but send nothing, not even a banner.
    SILENT = enum.auto()
    #: Accept a login and a command but never respond to the command.
    HANG = enum.auto()


@attrs.frozen(kw_only=True)
class Session:
    """A session of a client."""

    user: str
    #: The command that the client sent; None if it requested a shell.
    command: str | None
    #: The environment variables that the client sent.
    environment: dict[str, str]
    #: Whether the client forwarded its SSH agent.
    agent_forwarded: bool
    #: Whether the client requested a terminal.
    terminal: bool


class GitSsh:
    """A server for repositories.

    Args:
        repos: The repositories.
        authorized: Public keys in the format of `authorized_keys`; by default that of `key_pair()`.
        host_key: An OpenSSH private key; by default a new one.
        read_only: Whether pushes are rejected, as for GitHub's deploy keys.
    """

    def __init__(
        self,
        repos: Repos,
        *,
        authorized: tuple[str, ...] | None = None,
        host_key: str | None = None,
        read_only: bool = False,
    ) -> None:
        self.mode = Mode.SERVE
        #: If set, the connection is reset after this many bytes of a response of git.
        self.drop_after_bytes: int | None = None
        #: Called with the command before git starts.
        self.before: Callable[[str], Awaitable[None]] | None = None
        #: What `git-lfs-authenticate` prints: where the objects are, and a credential for it.
        self.lfs: dict[str, object] | None = None
        self.read_only = read_only
        #: The user names with which clients tried to log in, in order.
        self.users: list[str] = []
        #: The public keys that clients offered, in the format of `authorized_keys` without comments.
        self.offered_keys: list[str] = []
        self.sessions: list[Session] = []
        #: The number of accepted connections.
        self.connections = 0
        self.host = "127.0.0.1"
        self.port = 0
        self._repos = repos
        keys = (key_pair().public,) if authorized is None else authorized
        self._authorized = {_bare(key) for key in keys}
        self._host_key = asyncssh.import_private_key(host_key or new_host_key())
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[asyncssh.SSHServerConnection] = set()
        self._listening: socket.socket | None = None

    @property
    def commands(self) -> list[str | None]:
        """The commands of all sessions."""
        return [session.command for session in self.sessions]

    @property
    def known_hosts(self) -> str:
        """A line for a known_hosts file, with the key of this server."""
        return f"[{self.host}]:{self.port} {self.host_key}\n"

    @property
    def host_key(self) -> str:
        """The public host key, without a comment."""
        return _bare(self._host_key.export_public_key().decode())

    def url(self, name: str, *, user: str = "git", suffix: str = ".git") -> str:
        """Return the URL of a repository."""
        return f"ssh://{user}@{self.host}:{self.port}/{name}{suffix}"

    def client_environment(
        self, directory: Path, key: str | None = None, *, known_hosts: str | None = None
    ) -> dict[str, str]:
        """Return an environment in which git connects to the server.

        Args:
            directory: Where the key file and the known_hosts file are written.
            key: The private key; by default that of `key_pair()`.
            known_hosts: The content of the known_hosts file; by default `self.known_hosts`.
        """
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "key").write_text(key or key_pair().openssh, encoding="utf-8")
        (directory / "key").chmod(0o600)
        (directory / "known_hosts").write_text(
            self.known_hosts if known_hosts is None else known_hosts, encoding="utf-8"
        )
        options = {
            "IdentityFile": directory / "key",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "UserKnownHostsFile": directory / "known_hosts",
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
        }
        command = ["ssh", "-F", "/dev/null", *(f"-o{name}={value}" for name, value in options.items())]
        return environment(GIT_SSH_COMMAND=shlex.join(command))

    async def __aenter__(self) -> Self:
        self._listening = socket.create_server((self.host, 0))
        self._listening.setblocking(False)
        self.port = self._listening.getsockname()[1]
        self._start(self._accept(self._listening))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        # Stop the tasks before closing connections, so that a closed connection is not taken for a disconnected client.
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in set(self._open):
            connection.abort()
            await connection.wait_closed()
        assert self._listening is not None
        self._listening.close()

    def _start(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listening)
            self.connections += 1
            self._start(self._handle(client))

    async def _handle(self, client: socket.socket) -> None:
        if self.mode is Mode.SILENT:
            with client:
                # Wait until the server closes. The server does not notice here that a client has disconnected.
                await asyncio.Event().wait()
        # A client that disconnects, or whose key is rejected, is not an error.
        with contextlib.suppress(asyncssh.Error, OSError, TimeoutError):
            await asyncssh.run_server(
                client,
                server_factory=lambda: _Authentication(self),
                server_host_keys=[self._host_key],
                process_factory=self._run,
                encoding=None,
                agent_forwarding=True,
                x11_forwarding=False,
                allow_scp=False,
                line_editor=False,
                gss_host=None,
            )

    # --- authentication ----------------------------------------------------------------------------------------------------

    def is_authorized(self, key: asyncssh.SSHKey) -> bool:
        """Return whether a key may log in."""
        bare = _bare(key.export_public_key().decode())
        self.offered_keys.append(bare)
        return self.mode is not Mode.REFUSE_KEYS and bare in self._authorized

    def add_connection(self, connection: asyncssh.SSHServerConnection) -> None:
        """Register a connection, which the server closes on exit."""
        self._open.add(connection)

    def remove_connection(self, connection: asyncssh.SSHServerConnection) -> None:
        """Unregister a connection."""
        self._open.discard(connection)

    # --- commands ----------------------------------------------------------------------------------------------------

    async def _run(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        channel = process.channel
        self.sessions.append(
            Session(
                user=channel.get_connection().get_extra_info("username"),
                command=process.command,
                environment=dict(channel.get_environment()),
                agent_forwarded=channel.get_agent_path() is not None,
                terminal=process.term_type is not None,
            )
        )
        # In a separate task, for which `__aexit__` waits.
        await asyncio.wait({self._start(self._serve(process))})

    async def _serve(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        if self.mode is Mode.HANG:
            await asyncio.Event().wait()
        words = _words(process.command)
        if self.lfs is not None and words[:1] == ["git-lfs-authenticate"]:
            process.stdout.write(json.dumps(self.lfs).encode())
            process.exit(0)
            return None
        if len(words) != 2 or words[0] not in COMMANDS:
            return _reject(process, "You've successfully authenticated, but this server does not provide shell access.")
        name, path = words
        repository = self._repos.find(path)
        if repository is None:
            return _reject(process, "ERROR: Repository not found.")
        if name == "git-receive-pack" and self.read_only:
            return _reject(process, "ERROR: The key you are authenticating with has been marked as read only.")
        if self.before is not None:
            await self.before(f"{name} {path}")
        protocol = {key: value for key, value in process.env.items() if key == "GIT_PROTOCOL"}
        argv = ["git", name.removeprefix("git-"), str(repository)]
        async with backend(argv, env=environment(**protocol)) as git:
            await self._bridge(process, git)
        return None

    async def _bridge(self, process: asyncssh.SSHServerProcess[bytes], git: asyncio.subprocess.Process) -> None:
        assert git.stdin is not None
        assert git.stdout is not None
        assert git.stderr is not None
        sent = 0

        async def to_stdout(data: bytes) -> None:
            nonlocal sent
            if self.drop_after_bytes is not None and sent + len(data) > self.drop_after_bytes:
                process.stdout.write(data[: self.drop_after_bytes - sent])
                _reset(process)
                raise ConnectionResetError
            sent += len(data)
            process.stdout.write(data)
            await process.stdout.drain()

        async def to_stderr(data: bytes) -> None:
            process.stderr.write(data)
            await process.stderr.drain()

        feeding = asyncio.create_task(_feed(process, git.stdin))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(pump(git.stdout, to_stdout))
                group.create_task(pump(git.stderr, to_stderr))
            process.exit(await git.wait())
        except* (asyncssh.Error, OSError):
            process.close()
        finally:
            feeding.cancel()
            await asyncio.wait({feeding})


class _Authentication(asyncssh.SSHServer):
    """Accepts authorized keys with any user name."""

    def __init__(self, server: GitSsh) -> None:
        self._server = server

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        self._server.add_connection(conn)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.remove_connection(self._connection)

    def begin_auth(self, username: str) -> bool:
        self._server.users.append(username)
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return self._server.is_authorized(key)


def new_host_key() -> str:
    """Return a new private host key."""
    return asyncssh.generate_private_key("ssh-ed25519").export_private_key("openssh").decode()


def _bare(public_key: str) -> str:
    return " ".join(public_key.split()[:2])


def _words(command: str | None) -> list[str]:
    """Return the name of a command and its arguments. `git upload-pack` is normalized to `git-upload-pack`."""
    try:
        words = shlex.split(command or "")
    except ValueError:
        return []
    if words[:1] == ["git"] and len(words) > 1:
        return [f"git-{words[1]}", *words[2:]]
    return words


def _reject(process: asyncssh.SSHServerProcess[bytes], message: str) -> None:
    process.stderr.write(message.encode() + b"\n")
    process.exit(1)


def _reset(process: asyncssh.SSHServerProcess[bytes]) -> None:
    """Reset the TCP connection."""
    connection = process.channel.get_connection()
    connection.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.abort()


async def _feed(process: asyncssh.SSHServerProcess[bytes], stdin: asyncio.StreamWriter) -> None:
    """Pass the input of the client to git until end of file."""
    with contextlib.suppress(OSError, asyncssh.Error):
        while data := await process.stdin.read(64 * 1024):
            stdin.write(data)
            await stdin.drain()
    stdin.close()
