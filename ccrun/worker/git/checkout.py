"""The git repository in the workspace, and what is kept of it outside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import unquote, urlsplit

import attrs

from ccrun.process.confinement import Confinement
from ccrun.spec import TaskSpec
from ccrun.urls import GitUrl
from ccrun.worker.dependencies import WorkerDependencies
from ccrun.worker.git import changes, lfs
from ccrun.worker.git.changes import Changes
from ccrun.worker.git.clone import Clone, CloneOptions, PackSnapshot, clone
from ccrun.worker.git.places import Place, find_places
from ccrun.worker.git.remote import Access
from ccrun.worker.git.run import SYSTEM_PATH, Git, GitError, environment, find_git
from ccrun.worker.lines import worker_line
from ccrun.worker.workspace import CA_FILE, Workspace, private_directory


@attrs.frozen(kw_only=True)
class Origin:
    """The server that a repository was cloned from, and what came from it.

    Args:
        snapshot: The objects that came from the server; None when nothing is to be pushed.
    """

    access: Access
    clone: Clone
    snapshot: PackSnapshot | None = None


@attrs.frozen(kw_only=True)
class Checkout:
    """The git repository in the workspace.

    Args:
        agent_git: git as the agent's user, without any secret.
        worker_git: Returns git as the worker's user, with this directory as its home.
        origin: None when the request names no repository.
        excludes_dotenv: Whether ccrun has written `.env`.
        sparse: The directories whose files were checked out; if empty, all files were.
        has_lfs: Whether git-lfs is installed.
    """

    workspace: Workspace
    agent_git: Git
    worker_git: Callable[[Path], Git]
    origin: Origin | None = None
    excludes_dotenv: bool = False
    sparse: tuple[str, ...] = ()
    has_lfs: bool = False

    async def changes(self, *, with_lfs: bool = False) -> Changes:
        """Return what the agent has changed.

        Args:
            with_lfs: Whether to stage the files of Git LFS as pointers, if git-lfs is installed.

        Raises:
            GitError: The repository cannot be read.
        """
        return await changes.examine(
            self.agent_git,
            self.workspace.repository,
            base=self.origin.clone.base if self.origin else None,
            excludes_dotenv=self.excludes_dotenv,
            sparse=self.sparse,
            filters=[f"{name}={value}" for name, value in lfs.FILTER_SETTINGS.items()]
            if with_lfs and self.has_lfs
            else (),
            parent=self.workspace.root,
        )

    def other_places(self, top: Changes) -> AsyncIterator[Place | str]:
        """Yield the other places in which the agent has left changes, see `find_places`."""
        return find_places(
            self.agent_git, self.workspace.repository, top, sparse=self.sparse, parent=self.workspace.root
        )


async def check_out(
    deps: WorkerDependencies,
    spec: TaskSpec,
    workspace: Workspace,
    *,
    stack: AsyncExitStack,
    log_line: Callable[[bytes], Awaitable[None]],
) -> Checkout | None:
    """Clone the repository that the request names; return None when the task does not need git.

    Args:
        stack: Closes what the checkout needs while it is used.
        log_line: Adds a line to the log of the task.

    Raises:
        GitError: git is not installed, or the repository cannot be cloned.
    """
    action = spec.post_execution_actions.git
    if spec.git_repo is None and not (action is not None and (action.commit or action.push)):
        return None
    program = await asyncio.to_thread(find_git, SYSTEM_PATH)

    network = deps.egress.git_variables(await _ca_file(deps, spec, stack))

    def git_at(
        home: Path, confinement: Confinement | None, protocols: str = "", network: Mapping[str, str] | None = None
    ) -> Git:
        variables = environment(
            program=program,
            inherited=deps.inherited,
            home=home,
            marker=deps.marker,
            protocols=protocols,
            network=network,
        )
        return Git(program=program, environment=variables, cwd=home, confinement=confinement)

    checkout = Checkout(
        workspace=workspace,
        agent_git=git_at(workspace.root, workspace.confinement),
        worker_git=lambda home: git_at(home, None, _protocols(deps.git_protocols, spec.git_repo), network),
        excludes_dotenv=bool(spec.environment_secrets),
        sparse=spec.sparse_checkout,
        has_lfs=await asyncio.to_thread(lfs.is_installed, SYSTEM_PATH),
    )
    if spec.git_repo is None:
        return checkout
    # An SSH key cannot open an https URL.
    remote = spec.git_repo if spec.ssh_key is None else spec.git_repo.over_ssh()
    access = Access(remote=remote, ssh_key=spec.ssh_key, git_token=spec.git_token)
    async with private_directory(spec.task_id) as directory:
        if remote.scheme == "file" and (user := workspace.confinement.user) is not None:
            await _check_readable(git_at(workspace.root, Confinement(user=user)), remote)
        cloned = await clone(
            checkout.worker_git(directory),
            access,
            workspace.repository,
            CloneOptions(
                revision=spec.git_branch,
                review_base=spec.git_base,
                depth=spec.git_depth,
                submodules=spec.git_submodules,
                sparse=spec.sparse_checkout,
            ),
            finish=lambda here: _pull_lfs(here, access, log_line, is_installed=checkout.has_lfs),
            seconds=spec.clone_timeout_minutes * 60,
        )
    await log_line(worker_line("clone", host=remote.host or None, revision=spec.git_branch, commit=cloned.base))
    snapshot = None
    if action is not None and action.push:
        snapshot = await PackSnapshot.of(workspace.repository)
        stack.callback(snapshot.close)
    return attrs.evolve(checkout, origin=Origin(access=access, clone=cloned, snapshot=snapshot))


def _protocols(allowed: str, remote: GitUrl | None) -> str:
    """Return the protocols that git may use for a task, separated by colons.

    http and file are allowed for a repository that has such a URL itself. Otherwise a repository of a stranger could name a
    directory or a service of this machine as a submodule.
    """
    own = "" if remote is None else remote.scheme
    return ":".join(name for name in allowed.split(":") if name in ("https", "ssh", own))


async def _check_readable(agent_git: Git, remote: GitUrl) -> None:
    """Check that the agent's user may read a repository on this machine: the worker may be able to read more.

    Raises:
        GitError: It may not.
    """
    path = unquote(urlsplit(remote.url).path)
    # By default, git refuses repositories of other owners.
    ran = await agent_git.at(agent_git.cwd, "safe.directory=*").run("upload-pack", "--advertise-refs", "--", path)
    if not ran.exit.ok:
        raise GitError("The repository in gitRepo does not exist, or the agent's user may not read it.")


async def _pull_lfs(
    here: Git, access: Access, log_line: Callable[[bytes], Awaitable[None]], *, is_installed: bool
) -> None:
    """Download the files of Git LFS, or log why they stay pointers."""
    if not await lfs.is_used(here):
        return
    if not is_installed:
        reason = "git-lfs is not installed"
    elif access.remote.scheme == "file":
        reason = "a file URL has no server for them"
    elif await lfs.names_other_server(here, access.remote):
        reason = ".lfsconfig names another server, which is not asked"
    else:
        await lfs.pull(here, access)
        return
    await log_line(worker_line("lfs", content=f"The files of Git LFS are pointers, since {reason}."))


async def _ca_file(deps: WorkerDependencies, spec: TaskSpec, stack: AsyncExitStack) -> Path | None:
    """Return a file with the trusted certificates that the agent cannot change, None if they are those of the system."""
    if deps.egress.ca_bundle is None:
        return None
    file = await stack.enter_async_context(private_directory(spec.task_id)) / CA_FILE
    await asyncio.to_thread(file.write_bytes, deps.egress.ca_bundle)
    return file
