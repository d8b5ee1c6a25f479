"""Access to the server of a repository.

Secrets are in the memory of this process, of ssh-agent and of git's helpers while git is connected; never in a URL, an
argument, a configuration or a file. No process of the task may run during that time.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shlex
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import attrs
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from ccrun.process.child import spawn
from ccrun.removal import remove_tree
from ccrun.spec import GitToken
from ccrun.task import Secret
from ccrun.urls import GitUrl
from ccrun.worker.git import known_hosts
from ccrun.worker.git.run import Git, GitError

#: Seconds for ssh-agent to start, and to accept a key.
AGENT_SECONDS: Final = 10.0
#: Seconds after which ssh-agent forgets the key. No exchange with a server takes as long.
AGENT_LIFE_SECONDS: Final = 900
#: Seconds for connecting by SSH.
CONNECT_SECONDS: Final = 20
#: Seconds between two keepalive messages of SSH. The connection is closed after four without a response.
ALIVE_SECONDS: Final = 15

#: The user names for a token as password. GitHub and GitLab accept any, Bitbucket this one:
#: https://support.atlassian.com/bitbucket-cloud/docs/using-access-tokens/
_TOKEN_USERS: Final = {"bitbucket.org": "x-token-auth"}
_DEFAULT_USER: Final = "x-access-token"
#: A credential helper. The token is in its environment; git has it in memory only.
_CREDENTIAL_HELPER: Final = (
    '!f() { test "$1" = get && printf "username=%s\\npassword=%s\\n" "$CCRUN_GIT_USER" "$CCRUN_GIT_TOKEN"; }; f'
)


# --- access ------------------------------------------------------------------------------------------------------------


@attrs.define(kw_only=True)
class Access:
    """The credentials for a repository, and the host keys that its server has shown."""

    remote: GitUrl
    ssh_key: Secret | None = None
    git_token: GitToken | None = None
    #: Lines for known_hosts(5). A server that was new at the clone must have the same key at the push.
    _seen: bytes = attrs.field(default=b"", init=False, repr=False)

    @contextlib.asynccontextmanager
    async def opened(self, git: Git) -> AsyncIterator[Git]:
        """Yield a git that can connect to the server while the context is open.

        Raises:
            GitError: The key cannot be used.
        """
        if self.remote.is_ssh:
            async with self._over_ssh(git) as opened:
                yield opened
        elif self.git_token is not None and self.remote.scheme in ("https", "http"):
            # For this server only: a redirect to another server does not get it.
            settings = (f"credential.{self.remote.origin}.helper={_CREDENTIAL_HELPER}", *self._submodule_settings())
            user = self.git_token.user or _TOKEN_USERS.get(self.remote.host, _DEFAULT_USER)
            yield git.at(git.cwd, *settings, CCRUN_GIT_USER=user, CCRUN_GIT_TOKEN=self.git_token.token.reveal())
        else:
            yield git

    def _submodule_settings(self) -> tuple[str, ...]:
        """Return settings with which submodules on the same host use this access, whichever form their URLs have."""
        host = self.remote.host
        if self.remote.is_ssh:
            return (f"url.ssh://git@{self.remote.ssh_address}/.insteadOf=https://{host}/",)
        return tuple(f"url.{self.remote.origin}/.insteadOf={form}" for form in (f"git@{host}:", f"ssh://git@{host}/"))

    @contextlib.asynccontextmanager
    async def _over_ssh(self, git: Git) -> AsyncIterator[Git]:
        # Short, since the path of a socket has at most 103 bytes; and new, since an existing directory may be the agent's.
        directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="ccrun-"))
        try:
            seen, config, socket = directory / "known_hosts", directory / "config", directory / "agent"
            await asyncio.to_thread(seen.write_bytes, self._seen)
            await asyncio.to_thread(
                config.write_text, _ssh_config(self.remote.host, seen, socket if self.ssh_key else None)
            )
            async with contextlib.AsyncExitStack() as stack:
                if self.ssh_key is not None:
                    key = _private_key(self.ssh_key)
                    await stack.enter_async_context(_ssh_agent(git, socket, key))
                command = f"ssh -F {shlex.quote(str(config))}"
                settings = self._submodule_settings() if self.ssh_key is not None else ()
                yield git.at(git.cwd, *settings, GIT_SSH_COMMAND=command, GIT_SSH_VARIANT="ssh")
                self._seen = await asyncio.to_thread(seen.read_bytes)
        finally:
            await asyncio.shield(asyncio.to_thread(remove_tree, directory))


def _private_key(secret: Secret) -> bytes:
    """Return the key in the OpenSSH format, from any format and line ends. Raise `GitError` when it is not a key."""
    text = secret.reveal().strip()
    if "-----BEGIN" not in text:
        # CI systems keep secrets of one line, so that some people encode their keys.
        with contextlib.suppress(ValueError):
            text = base64.b64decode("".join(text.split()), validate=True).decode("ascii").strip()
    if "\n" not in text and "\r" not in text:
        # Some tools write a line break as two characters.
        text = text.replace("\\r", "\r").replace("\\n", "\n")
    content = (text.replace("\r\n", "\n").replace("\r", "\n") + "\n").encode()
    try:
        load = serialization.load_ssh_private_key if b"BEGIN OPENSSH" in content else serialization.load_pem_private_key
        key = load(content, password=None)
        return key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
    except TypeError:
        raise GitError("sshKey is protected by a passphrase: give a key without one.") from None
    except (ValueError, UnsupportedAlgorithm):
        # The cause would show lines of the key. A missing passphrase is a ValueError too.
        if b"ENCRYPTED" in content:
            raise GitError("sshKey is protected by a passphrase: give a key without one.") from None
        raise GitError("sshKey is not a private key in the PEM or OpenSSH format.") from None


@contextlib.asynccontextmanager
async def _ssh_agent(git: Git, socket: Path, key: bytes) -> AsyncIterator[None]:
    """Run an ssh-agent with the key. It denies other processes access to its memory."""
    # It exits with the program that it starts, and it forgets the key after a time: when this process is killed, neither stays
    # for long. A sweep could not find the agent by its marker, since it hides its environment.
    argv = ["ssh-agent", "-a", str(socket), "sh", "-c", f"echo ready; exec sleep {AGENT_LIFE_SECONDS}"]
    async with spawn(argv, env=git.environment, cwd=socket.parent, term_grace_seconds=1.0) as agent:
        try:
            async with asyncio.timeout(AGENT_SECONDS):
                # The agent prints a line when it listens.
                async for _ in agent.lines():
                    break
        except TimeoutError:
            raise GitError("ssh-agent did not start.") from None
        environment = {**git.environment, "SSH_AUTH_SOCK": str(socket)}
        async with spawn(
            ["ssh-add", "-q", "-t", str(AGENT_LIFE_SECONDS), "-"], env=environment, cwd=socket.parent, stdin=key
        ) as adding:
            try:
                async with asyncio.timeout(AGENT_SECONDS):
                    exit_status = await adding.wait()
            except TimeoutError:
                raise GitError("ssh-agent did not accept sshKey in time.") from None
        if not exit_status.ok:
            raise GitError("sshKey is of a type that ssh does not accept.")
        yield


def _ssh_config(host: str, seen: Path, agent: Path | None) -> str:
    options = {
        "BatchMode": "yes",
        "CheckHostIP": "no",
        "ClearAllForwardings": "yes",
        "ConnectTimeout": str(CONNECT_SECONDS),
        "ControlPath": "none",
        "ForwardAgent": "no",
        "GlobalKnownHostsFile": f'"{known_hosts.FILE}"',
        "HashKnownHosts": "no",
        # Only the key of the request, not those of the machine or of another ssh-agent.
        "IdentityAgent": f'"{agent}"' if agent else "none",
        "IdentityFile": "none",
        "LogLevel": "ERROR",
        "PermitLocalCommand": "no",
        "PreferredAuthentications": "publickey,none",
        "ServerAliveCountMax": "4",
        "ServerAliveInterval": str(ALIVE_SECONDS),
        # For known hosts, a key of an unknown type would count as new.
        "StrictHostKeyChecking": "yes" if host in known_hosts.WELL_KNOWN else "accept-new",
        "UpdateHostKeys": "no",
        "UserKnownHostsFile": f'"{seen}"',
    }
    return "Host *\n" + "".join(f"  {name} {value}\n" for name, value in options.items())
