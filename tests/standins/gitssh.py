"""A git host over SSH on a loopback socket: asyncssh in front of the real `git-upload-pack` and `git-receive-pack`.

It lets those two run and nothing else, and only on repositories below its root, as the well-known hosts do.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
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
from standins.repos import Repos, backend, environment, pump

COMMANDS: Final = frozenset({"git-upload-pack", "git-receive-pack"})

#: For tests in which git is the client.
needs_ssh: Final = pytest.mark.skipif(
    shutil.which("ssh") is None, reason="ssh is not installed: git cannot reach a server over SSH"
)


@attrs.frozen(kw_only=True)
class KeyPair:
    """A key of somebody who connects, in every form in which people keep one."""

    #: `-----BEGIN OPENSSH PRIVATE KEY-----`, as ssh-keygen writes it.
    openssh: str
    #: `-----BEGIN PRIVATE KEY-----`
    pkcs8: str
    #: `-----BEGIN RSA PRIVATE KEY-----`, which only RSA has.
    pem: str | None
    #: `-----BEGIN ENCRYPTED PRIVATE KEY-----`: useless without its passphrase, which nobody has.
    encrypted: str
    #: One line, as in `authorized_keys`.
    public: str


@functools.cache
def key_pair(kind: Literal["ed25519", "rsa"] = "ed25519", number: int = 0) -> KeyPair:
    """Return a key pair; another number is another pair. Made once a process, since RSA takes its time."""
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
    """How the server treats whoever connects from now on."""

    SERVE = enum.auto()
    #: No key is good enough.
    REFUSE_KEYS = enum.auto()
    #: Takes the connection and never says a word, not even its banner.
    SILENT = enum.auto()
    #: Lets one in, takes the command and never answers it.
    HANG = enum.auto()


@attrs.frozen(kw_only=True)
class Session:
    """What a client asked for once it was let in."""

    user: str
    #: As the client spelled it; None when it asked for a shell.
    command: str | None
    #: What the client wanted to set.
    environment: dict[str, str]
    #: Whether the client offered its agent, with which the server could log in elsewhere.
    agent_forwarded: bool
    terminal: bool


class GitSsh:
    """A server of the repositories of `repos`, for whoever holds an authorized key.

    Args:
        authorized: Public keys, as in `authorized_keys`; by default that of `key_pair()`.
        host_key: An OpenSSH private key; by default a new one.
        read_only: Keys may fetch, none may push, as deploy keys of GitHub.
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
        #: Breaks the connection off after so many bytes of an answer of git's.
        self.drop_after_bytes: int | None = None
        #: Called before git starts, with the command: what happens meanwhile.
        self.before: Callable[[str], Awaitable[None]] | None = None
        self.read_only = read_only
        #: The user names under which clients tried to log in, the latest last.
        self.users: list[str] = []
        #: The public keys that were offered, as in `authorized_keys` and without comments.
        self.offered_keys: list[str] = []
        self.sessions: list[Session] = []
        #: Connections taken, silent ones among them.
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
        """A line of a known_hosts file that trusts this server's key, and no other, at its address."""
        return f"[{self.host}]:{self.port} {self.host_key}\n"

    @property
    def host_key(self) -> str:
        """The public host key, without a comment."""
        return _bare(self._host_key.export_public_key().decode())

    def url(self, name: str, *, user: str = "git", suffix: str = ".git") -> str:
        """Return the URL of a repository."""
        return f"ssh://{user}@{self.host}:{self.port}/{name}{suffix}"

    def client_environment(
        self, folder: Path, key: str | None = None, *, known_hosts: str | None = None
    ) -> dict[str, str]:
        """Return an environment in which git reaches the server with a private key, `key_pair()`'s by default.

        Args:
            folder: Where the key and the known hosts are kept.
            known_hosts: Instead of this server's.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "key").write_text(key or key_pair().openssh, encoding="utf-8")
        (folder / "key").chmod(0o600)
        (folder / "known_hosts").write_text(self.known_hosts if known_hosts is None else known_hosts, encoding="utf-8")
        options = {
            "IdentityFile": folder / "key",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "UserKnownHostsFile": folder / "known_hosts",
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
        # First what runs for a connection: its end is not to be taken for the client's.
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in set(self._open):
            connection.abort()
            await connection.wait_closed()
        assert self._listening is not None
        self._listening.close()

    def _start(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listening)
            self.connections += 1
            self._start(self._meet(client))

    async def _meet(self, client: socket.socket) -> None:
        if self.mode is Mode.SILENT:
            with client:
                # Until we close: a client that leaves is not noticed, and need not be.
                await asyncio.Event().wait()
        # One that leaves, or whose key is refused, is no error of ours.
        with contextlib.suppress(asyncssh.Error, OSError, TimeoutError):
            await asyncssh.run_server(
                client,
                server_factory=lambda: _Door(self),
                server_host_keys=[self._host_key],
                process_factory=self._take,
                encoding=None,
                agent_forwarding=True,
                x11_forwarding=False,
                allow_scp=False,
                line_editor=False,
                gss_host=None,
            )

    # --- the door ---

    def admits(self, key: asyncssh.SSHKey) -> bool:
        """Return whether a key may log in."""
        spelled = _bare(key.export_public_key().decode())
        self.offered_keys.append(spelled)
        return self.mode is not Mode.REFUSE_KEYS and spelled in self._authorized

    def opened(self, connection: asyncssh.SSHServerConnection) -> None:
        """Remember a connection, to close it."""
        self._open.add(connection)

    def closed(self, connection: asyncssh.SSHServerConnection) -> None:
        """Forget a connection."""
        self._open.discard(connection)

    # --- commands ---

    async def _take(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
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
        # A task of ours, so that we can wait for the end of what it runs.
        await asyncio.wait({self._start(self._serve(process))})

    async def _serve(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        if self.mode is Mode.HANG:
            await asyncio.Event().wait()
        words = _words(process.command)
        if len(words) != 2 or words[0] not in COMMANDS:
            return _refuse(process, "You've successfully authenticated, but this server does not provide shell access.")
        name, path = words
        repository = self._repos.find(path)
        if repository is None:
            return _refuse(process, "ERROR: Repository not found.")
        if name == "git-receive-pack" and self.read_only:
            return _refuse(process, "ERROR: The key you are authenticating with has been marked as read only.")
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

        async def to_stdout(piece: bytes) -> None:
            nonlocal sent
            if self.drop_after_bytes is not None and sent + len(piece) > self.drop_after_bytes:
                process.stdout.write(piece[: self.drop_after_bytes - sent])
                _break_off(process)
                raise ConnectionResetError
            sent += len(piece)
            process.stdout.write(piece)
            await process.stdout.drain()

        async def to_stderr(piece: bytes) -> None:
            process.stderr.write(piece)
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


class _Door(asyncssh.SSHServer):
    """Lets in who holds an authorized key, whatever name it gives."""

    def __init__(self, server: GitSsh) -> None:
        self._server = server

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        self._server.opened(conn)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.closed(self._connection)

    def begin_auth(self, username: str) -> bool:
        self._server.users.append(username)
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return self._server.admits(key)


def new_host_key() -> str:
    """Return a new private host key."""
    return asyncssh.generate_private_key("ssh-ed25519").export_private_key("openssh").decode()


def _bare(public_key: str) -> str:
    return " ".join(public_key.split()[:2])


def _words(command: str | None) -> list[str]:
    """Return the command's name and its arguments; `git upload-pack` is another spelling of `git-upload-pack`."""
    try:
        words = shlex.split(command or "")
    except ValueError:
        return []
    if words[:1] == ["git"] and len(words) > 1:
        return [f"git-{words[1]}", *words[2:]]
    return words


def _refuse(process: asyncssh.SSHServerProcess[bytes], message: str) -> None:
    process.stderr.write(message.encode() + b"\n")
    process.exit(1)


def _break_off(process: asyncssh.SSHServerProcess[bytes]) -> None:
    """End the connection as a network does: without a farewell."""
    connection = process.channel.get_connection()
    connection.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.abort()


async def _feed(process: asyncssh.SSHServerProcess[bytes], stdin: asyncio.StreamWriter) -> None:
    """Hand on what the client sends, until it has sent all."""
    with contextlib.suppress(OSError, asyncssh.Error):
        while piece := await process.stdin.read(64 * 1024):
            stdin.write(piece)
            await stdin.drain()
    stdin.close()
