"""Connects git to the server of a repository, and explains its errors.

Secrets are in the memory of this process, of ssh-agent and of git's helpers while git is connected; never in a URL, an
argument, a configuration or a file. No process of the task may run during that time.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import attrs
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from ccrun.process.capture import ProcessResult
from ccrun.process.child import spawn
from ccrun.removal import remove_tree
from ccrun.task import GitToken, Secret
from ccrun.urls import GitUrl
from ccrun.worker.git import known_hosts
from ccrun.worker.git.run import Git, GitError, last_error

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
            settings = f"credential.{self.remote.origin}.helper={_CREDENTIAL_HELPER}"
            user = self.git_token.user or _TOKEN_USERS.get(self.remote.host, _DEFAULT_USER)
            yield git.at(git.cwd, settings, CCRUN_GIT_USER=user, CCRUN_GIT_TOKEN=self.git_token.token.reveal())
        else:
            yield git

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
                yield git.at(git.cwd, GIT_SSH_COMMAND=command, GIT_SSH_VARIANT="ssh")
                self._seen = await asyncio.to_thread(seen.read_bytes)
        finally:
            await asyncio.shield(asyncio.to_thread(remove_tree, directory))


def _private_key(secret: Secret) -> bytes:
    """Return the key in the OpenSSH format, from any format and line ends. Raise `GitError` when it is not a key."""
    text = secret.reveal().replace("\r\n", "\n").replace("\r", "\n").strip() + "\n"
    if "\n" not in text.strip():
        # Some tools write a line break as two characters.
        text = text.replace("\\n", "\n")
    content = text.encode()
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


# --- errors ------------------------------------------------------------------------------------------------------------


class RemoteError(GitError):
    """The server of the repository rejected a request, or could not be reached."""


def exchange_error(remote: GitUrl, ran: ProcessResult, access: Access, verb: str) -> RemoteError:
    """Return the error for a failed exchange with the server.

    Args:
        verb: What failed, `cloned` or `pushed`.
    """
    text = ran.stderr.decode(errors="replace")
    host = remote.host or "this machine"
    for pattern, sentence in _ERROR_MESSAGES:
        if pattern.search(text):
            hint = _credential_hint(remote, access)
            return RemoteError(sentence.format(host=host, hint=hint))
    reason = last_error(ran.stderr) or f"git failed with exit code {ran.exit.code}"
    return RemoteError(f"The repository could not be {verb}: {reason}")


def _credential_hint(remote: GitUrl, access: Access) -> str:
    name, given = ("sshKey", access.ssh_key) if remote.is_ssh else ("gitToken", access.git_token)
    return f"check {name}" if given is not None else f"the request has no {name}"


#: Messages of git and ssh (in the locale C), and what they mean. The first that matches counts.
_ERROR_MESSAGES: Final = (
    (
        re.compile(r"Could not resolve host(?:name)?|Name or service not known|Temporary failure in name resolution"),
        "The host of gitRepo was not found: {host}.",
    ),
    (
        re.compile(r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED|No .* host key is known"),
        "The SSH host key of {host} is not the known one, so nothing was sent to it.",
    ),
    (re.compile(r"Permission denied \("), "{host} rejected the SSH login: {hint}."),
    (
        re.compile(
            r"Authentication failed|could not read (?:Username|Password)|returned error: 401|HTTP Basic: Access denied"
        ),
        "{host} rejected the login: {hint}.",
    ),
    (re.compile(r"returned error: 403"), "{host} does not allow this: {hint}."),
    (
        re.compile(
            r"[Rr]epository .*not found|returned error: 404|does not appear to be a git repository|Repository not found"
            r"|project you were looking for could not be found|not a git repository|does not exist"
        ),
        "{host} does not have the repository in gitRepo, or hides it from this login: {hint}.",
    ),
    (
        re.compile(
            r"SSL certificate problem|server certificate verification failed|certificate (?:verify|has expired)"
        ),
        "The certificate of {host} is not trusted.",
    ),
    (
        re.compile(
            r"Connection (?:refused|timed out|reset|closed)|Failed to connect|No route to host|Network is unreachable"
            r"|Operation timed out|Could not connect|kex_exchange_identification|Timeout, server"
        ),
        "{host} could not be reached, or closed the connection.",
    ),
    (
        re.compile(r"transport '.*' not allowed"),
        "gitRepo uses a protocol that is not allowed.",
    ),
)


def timeout_error(remote: GitUrl, verb: str, seconds: float) -> RemoteError:
    """Return the error for an exchange that timed out."""
    bound = f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} s"
    return RemoteError(
        f"The repository was not {verb} within {bound}: {remote.host or 'this machine'} is too slow or does not respond."
    )
