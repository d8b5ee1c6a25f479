"""The repository of the request on its server: its URL, how to get in, and what a refusal means.

Secrets are in the memory of this process, of ssh-agent and of git's own helpers while one of them talks to the server; never in
a URL, an argument, a configuration or a file. Nothing that the task started may run meanwhile.
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

#: Seconds for ssh-agent to listen and to take a key.
AGENT_SECONDS: Final = 10.0
#: Seconds for which ssh-agent has the key at most: longer than any exchange with a server.
AGENT_LIFE_SECONDS: Final = 900
#: Seconds for the connection to a server over SSH.
CONNECT_SECONDS: Final = 20
#: Seconds of silence, four of which end a connection over SSH whose other end has gone.
ALIVE_SECONDS: Final = 15

#: The password is the token; the user is one that the servers take with it. GitHub and GitLab take any, Bitbucket this one:
#: https://support.atlassian.com/bitbucket-cloud/docs/using-access-tokens/
_TOKEN_USERS: Final = {"bitbucket.org": "x-token-auth"}
_DEFAULT_USER: Final = "x-access-token"
#: Prints what git asks its credential helpers for. The token comes by the environment; git itself has it in memory alone.
_CREDENTIAL_HELPER: Final = (
    '!f() { test "$1" = get && printf "username=%s\\npassword=%s\\n" "$CCRUN_GIT_USER" "$CCRUN_GIT_TOKEN"; }; f'
)


# --- how to get in ---------------------------------------------------------------------------------------------------


@attrs.define(kw_only=True)
class Access:
    """What opens the repository, and which host keys its server has shown so far."""

    remote: GitUrl
    ssh_key: Secret | None = None
    git_token: GitToken | None = None
    #: Lines of a known_hosts(5); a server that was new to us at the clone has to be the same one at the push.
    _seen: bytes = attrs.field(default=b"", init=False, repr=False)

    @contextlib.asynccontextmanager
    async def opened(self, git: Git) -> AsyncIterator[Git]:
        """Give a git that can talk to the server, as long as the context lasts.

        Raises:
            GitError: The key cannot be used.
        """
        if self.remote.is_ssh:
            async with self._over_ssh(git) as opened:
                yield opened
        elif self.git_token is not None and self.remote.scheme in ("https", "http"):
            # For this server alone: a redirection to another gets nothing.
            settings = f"credential.{self.remote.origin}.helper={_CREDENTIAL_HELPER}"
            user = self.git_token.user or _TOKEN_USERS.get(self.remote.host, _DEFAULT_USER)
            yield git.at(git.cwd, settings, CCRUN_GIT_USER=user, CCRUN_GIT_TOKEN=self.git_token.token.reveal())
        else:
            yield git

    @contextlib.asynccontextmanager
    async def _over_ssh(self, git: Git) -> AsyncIterator[Git]:
        # Short, for a socket's path may have 103 bytes; and new, for what is there already may be the agent's.
        room = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="ccrun-"))
        try:
            seen, config, socket = room / "known_hosts", room / "config", room / "agent"
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
            await asyncio.shield(asyncio.to_thread(remove_tree, room))


def _private_key(secret: Secret) -> bytes:
    """Return the key in OpenSSH's form, whatever form and line ends it came in. Raises `GitError` when it is none."""
    text = secret.reveal().replace("\r\n", "\n").replace("\r", "\n").strip() + "\n"
    if "\n" not in text.strip():
        # Some tools hand line breaks on as two characters.
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
        # The cause would show lines of the key. A password is asked for as a ValueError too.
        if b"ENCRYPTED" in content:
            raise GitError("sshKey is protected by a passphrase: give a key without one.") from None
        raise GitError("sshKey is no private key in PEM or OpenSSH form.") from None


@contextlib.asynccontextmanager
async def _ssh_agent(git: Git, socket: Path, key: bytes) -> AsyncIterator[None]:
    """Run an ssh-agent that holds the key; it lets no other process look into its memory."""
    # It ends with the program that it starts, and the key goes by itself: should this process be killed, neither stays for long.
    # Whoever clears up after that may not even see that the agent is ours, since it hides its environment.
    argv = ["ssh-agent", "-a", str(socket), "sh", "-c", f"echo ready; exec sleep {AGENT_LIFE_SECONDS}"]
    async with spawn(argv, env=git.environment, cwd=socket.parent, term_grace_seconds=1.0) as agent:
        try:
            async with asyncio.timeout(AGENT_SECONDS):
                # Once it listens.
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
                    ended = await adding.wait()
            except TimeoutError:
                raise GitError("ssh-agent did not take sshKey.") from None
        if not ended.ok:
            raise GitError("sshKey is of a kind that ssh does not take.")
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
        # Only the key of the request: none of the machine's, none of another agent's.
        "IdentityAgent": f'"{agent}"' if agent else "none",
        "IdentityFile": "none",
        "LogLevel": "ERROR",
        "PermitLocalCommand": "no",
        "PreferredAuthentications": "publickey,none",
        "ServerAliveCountMax": "4",
        "ServerAliveInterval": str(ALIVE_SECONDS),
        # The keys of these hosts are known; a key of another type than the known ones would count as new.
        "StrictHostKeyChecking": "yes" if host in known_hosts.WELL_KNOWN else "accept-new",
        "UpdateHostKeys": "no",
        "UserKnownHostsFile": f'"{seen}"',
    }
    return "Host *\n" + "".join(f"  {name} {value}\n" for name, value in options.items())


# --- what a refusal means --------------------------------------------------------------------------------------------


class RemoteError(GitError):
    """The server of the repository refused, or could not be reached."""


def refusal(remote: GitUrl, ran: ProcessResult, access: Access, doing: str) -> RemoteError:
    """Return what a failed exchange with the server means, in one sentence.

    Args:
        doing: What was to be done: `cloned`, `pushed`.
    """
    text = ran.stderr.decode(errors="replace")
    host = remote.host or "this machine"
    for pattern, sentence in _ERROR_MESSAGES:
        if pattern.search(text):
            hint = _credential_hint(remote, access)
            return RemoteError(sentence.format(host=host, hint=hint))
    words = last_error(ran.stderr) or f"git ended with exit code {ran.exit.code}"
    return RemoteError(f"The repository could not be {doing}: {words}")


def _credential_hint(remote: GitUrl, access: Access) -> str:
    name, given = ("sshKey", access.ssh_key) if remote.is_ssh else ("gitToken", access.git_token)
    return f"check {name}" if given is not None else f"the request brings no {name}"


#: What git and ssh say (in the locale C), and what it means. The first that fits counts.
_ERROR_MESSAGES: Final = (
    (
        re.compile(r"Could not resolve host(?:name)?|Name or service not known|Temporary failure in name resolution"),
        "The host of gitRepo was not found: {host}.",
    ),
    (
        re.compile(r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED|No .* host key is known"),
        "The SSH host key of {host} is not the one that it is known by, so nothing was sent to it.",
    ),
    (re.compile(r"Permission denied \("), "{host} refused the SSH login: {hint}."),
    (
        re.compile(
            r"Authentication failed|could not read (?:Username|Password)|returned error: 401|HTTP Basic: Access denied"
        ),
        "{host} refused the login: {hint}.",
    ),
    (re.compile(r"returned error: 403"), "{host} does not allow this: {hint}."),
    (
        re.compile(
            r"[Rr]epository .*not found|returned error: 404|does not appear to be a git repository|Repository not found"
            r"|project you were looking for could not be found|not a git repository|does not exist"
        ),
        "{host} has no repository of the name in gitRepo, or not for this login: {hint}.",
    ),
    (
        re.compile(
            r"SSL certificate problem|server certificate verification failed|certificate (?:verify|has expired)"
        ),
        "The certificate of {host} is not to be trusted.",
    ),
    (
        re.compile(
            r"Connection (?:refused|timed out|reset|closed)|Failed to connect|No route to host|Network is unreachable"
            r"|Operation timed out|Could not connect|kex_exchange_identification|Timeout, server"
        ),
        "{host} could not be reached, or broke the connection off.",
    ),
    (
        re.compile(r"transport '.*' not allowed"),
        "gitRepo names a protocol that is not allowed.",
    ),
)


def network_error(remote: GitUrl, doing: str, seconds: float) -> RemoteError:
    """Return what it means that an exchange was not done in time."""
    bound = f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} s"
    return RemoteError(
        f"The repository was not {doing} within {bound}: {remote.host or 'this machine'} is too slow, or hangs."
    )
