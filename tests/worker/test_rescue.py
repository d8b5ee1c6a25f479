"""Changes of an agent in other places than the work tree and the last commit."""

from __future__ import annotations

import pytest
from helpers.git import GitSetup, git_setup
from helpers.post_run import PostRunSetup, setup
from helpers.worker import Agent, agent, separate_user, worker_setup
from standins.gitssh import needs_ssh
from standins.repos import Submodule

from ccrun.spec import PostRunActions
from ccrun.task import Secret, TaskRecord
from ccrun.worker.dependencies import PostRunLimits, WorkerTimeouts

__all__ = ["agent", "git_setup", "separate_user", "setup", "worker_setup"]
pytestmark = needs_ssh

#: Commits all changes.
COMMIT = "git add -A; git commit -qm Work"


async def patches(setup: PostRunSetup, record: TaskRecord) -> dict[str, str]:
    """Return the contents of the uploaded patches, by path."""
    return {path: content.decode() for path, content in (await setup.uploaded(record)).items()}


async def apply(git_setup: GitSetup, setup: PostRunSetup, patch: str) -> dict[str, str]:
    """Apply a patch to a new clone, and return all files."""
    clone = git_setup.folder / "applied"
    await git_setup.git("clone", "--quiet", f"file://{setup.repository.path}", str(clone))
    await git_setup.git.at(clone)("apply", "--index", "-", stdin=patch.encode())
    return {path.name: path.read_text() for path in clone.iterdir() if path.is_file()}


@pytest.mark.parametrize("succeeds", [True, False], ids=["success", "failure"])
async def test_other_branch_is_stored(
    setup: PostRunSetup, agent: Agent, git_setup: GitSetup, *, succeeds: bool
) -> None:
    """The commits of a branch that the agent left are in a patch that has its name, whether the task succeeds or not."""
    script = f"git checkout -qb fix/1; echo fix >fix.txt; echo new >a.txt; {COMMIT}; git checkout -q main"
    record = await setup.run(agent(script) if succeeds else agent(script, last="exit 1"))
    assert () == record.action_errors
    stored = await patches(setup, record)
    assert ["rescue/branch-fix-1.patch"] == list(stored)
    files = await apply(git_setup, setup, stored["rescue/branch-fix-1.patch"])
    assert {"a.txt": "new\n", "b.txt": "old", "fix.txt": "fix\n"} == files
    assert ["rescue/branch-fix-1.patch"] == [file.original_path for file in record.uploaded_files or ()]
    [line] = await setup.worker_lines("rescue")
    assert line.startswith("The changes in branch fix/1 are stored as ")


async def test_pushed_commits_are_not_stored(setup: PostRunSetup, agent: Agent) -> None:
    """A branch that was merged, a branch without commits and a tag of a pushed commit need no patch."""
    script = f"git checkout -qb topic; echo new >a.txt; {COMMIT}; git checkout -q main; git merge -q topic; git tag v1"
    record = await setup.run(agent(script))
    assert record.git_commit is not None
    assert (True, None, ()) == (record.git_commit.pushed, record.uploaded_files, record.action_errors)


async def test_nothing_is_stored_without_a_push(setup: PostRunSetup, agent: Agent) -> None:
    """A task that succeeds and asks for no push needs no changes."""
    script = f"git checkout -qb topic; echo new >a.txt; {COMMIT}; git checkout -q main; echo new >b.txt"
    record = await setup.run(agent(script), actions=PostRunActions())
    assert (None, ()) == (record.uploaded_files, record.action_errors)


async def test_stash_is_stored(setup: PostRunSetup, agent: Agent, git_setup: GitSetup) -> None:
    """Each stash has a patch with its untracked files."""
    script = "echo one >a.txt; git stash -q; echo two >b.txt; echo new >new.txt; git stash -qu"
    stored = await patches(setup, await setup.run(agent(script)))
    assert ["rescue/stash-0.patch", "rescue/stash-1.patch"] == sorted(stored)
    assert "+one" in stored["rescue/stash-1.patch"]
    files = await apply(git_setup, setup, stored["rescue/stash-0.patch"])
    assert {"a.txt": "old", "b.txt": "two\n", "new.txt": "new\n"} == files


async def test_tag_of_a_lost_commit_is_stored(setup: PostRunSetup, agent: Agent) -> None:
    """A tag may be the only name of a commit; it may be annotated."""
    script = f"git checkout -q --detach; echo new >a.txt; {COMMIT}; git tag -am Tag v1; git checkout -q main"
    assert ["rescue/tag-v1.patch"] == list(await patches(setup, await setup.run(agent(script))))


async def test_worktree_is_stored(setup: PostRunSetup, agent: Agent) -> None:
    """Uncommitted changes and commits without a branch are in its patch, commits of a branch in that of the branch."""
    script = (
        "echo /.claude >>.git/info/exclude; git worktree add -q .claude/worktrees/one; cd .claude/worktrees/one; "
        f"echo committed >a.txt; {COMMIT}; echo uncommitted >b.txt; "
        f'git worktree add -q --detach "$TMPDIR/two"; cd "$TMPDIR/two"; echo detached >b.txt; {COMMIT}'
    )
    stored = await patches(setup, await setup.run(agent(script)))
    assert [
        "rescue/branch-one.patch",
        "rescue/worktree-.claude-worktrees-one.patch",
        "rescue/worktree-tmp-two.patch",
    ] == sorted(stored, key=lambda path: ("two" in path, path))
    changed = [
        {line for line in patch.splitlines() if line.startswith("+") and not line.startswith("+++")}
        for _, patch in sorted(stored.items(), key=lambda item: ("two" in item[0], item[0]))
    ]
    assert [{"+committed"}, {"+uncommitted"}, {"+detached"}] == changed


async def test_repository_inside_the_repository_is_stored(setup: PostRunSetup, agent: Agent) -> None:
    """All of its files and its other branches are. What came from elsewhere is not."""
    script = (
        f"git init -q made; cd made; echo one >one.txt; {COMMIT}; echo two >two.txt; "
        "git checkout -qb side; echo side >side.txt; git add -A; git commit -qm Side; git checkout -q -; "
        "cd ..; git clone -q --no-local . ../cloned; mv ../cloned vendor; echo changed >vendor/a.txt"
    )
    record = await setup.run(agent(script))
    stored = await patches(setup, record)
    assert [
        "rescue/made-branch-side.patch",
        "rescue/repository-made.patch",
        "rescue/repository-vendor.patch",
    ] == sorted(stored)
    assert "one.txt" in stored["rescue/repository-made.patch"]
    assert (
        "+changed" in stored["rescue/repository-vendor.patch"],
        "b.txt" in stored["rescue/repository-vendor.patch"],
    ) == (
        True,
        False,
    )
    assert "Repositories inside the repository were left out of the commit: made, vendor." in [
        error.error for error in record.action_errors
    ]


async def test_submodule_is_stored(setup: PostRunSetup, agent: Agent, git_setup: GitSetup) -> None:
    """Commits and edits inside a submodule are in the patch of the submodule."""
    inner = await git_setup.repos.create("inner", {"inner.txt": "old"})
    sha = await inner.sha()
    assert sha is not None
    await setup.repository.commit({"libs/inner": Submodule(setup.server.url("inner"), sha)})
    script = f"cd libs/inner; echo committed >inner.txt; {COMMIT}; echo edited >new.txt"
    record = await setup.run(agent(script), git_submodules=True)
    stored = await patches(setup, record)
    assert ["rescue/submodule-libs-inner.patch"] == list(stored)
    patch = stored["rescue/submodule-libs-inner.patch"]
    assert ("-old" in patch, "+committed" in patch, "+edited" in patch) == (True, True, True)


async def test_unchanged_submodule_is_not_stored(setup: PostRunSetup, agent: Agent, git_setup: GitSetup) -> None:
    """A submodule as it was cloned has no changes."""
    inner = await git_setup.repos.create("inner", {"inner.txt": "old"})
    sha = await inner.sha()
    assert sha is not None
    await setup.repository.commit({"inner": Submodule(setup.server.url("inner"), sha)})
    record = await setup.run(agent("echo new >a.txt"), git_submodules=True)
    assert (None, ()) == (record.uploaded_files, record.action_errors)


async def test_names_of_patches_are_safe_and_unique(setup: PostRunSetup, agent: Agent) -> None:
    """A ref may have any characters, and two names may differ only in such or in case."""
    branches = ["fix/1", "fix-1", "FIX-1", "ä|$(touch x)/..y", "x" * 200]
    made = "; ".join(
        f"git checkout -q -b '{name}' main; echo '{name}' >a.txt; {COMMIT}" for name in branches if ".." not in name
    )
    made += f"; git checkout -q -b 'ä|$x\"' main; echo odd >a.txt; {COMMIT}"
    stored = await patches(setup, await setup.run(agent(f"{made}; git checkout -q main")))
    assert 5 == len(stored) == len({name.lower() for name in stored})
    assert all(name.isascii() and len(name) < 128 and name.count("/") == 1 for name in stored)


async def test_secrets_are_redacted_and_dotenv_is_left_out(setup: PostRunSetup, agent: Agent) -> None:
    """As in the patch of the work tree."""
    script = (
        'git checkout -qb topic; echo "$KEY" >a.txt; git add -f a.txt .env; git commit -qm Work; git checkout -qf main'
    )
    record = await setup.run(agent(script), environment_secrets={"KEY": Secret("made-up-secret-value")})
    stored = await patches(setup, record)
    assert ["rescue/branch-topic.patch"] == list(stored)
    assert "+***" in stored["rescue/branch-topic.patch"]
    assert "made-up-secret-value" not in str(stored)
    assert ".env" not in str(stored)


async def test_patches_have_one_bound(setup: PostRunSetup, agent: Agent) -> None:
    """The patches of other places together are limited; what is left out is told."""
    script = (
        "; ".join(f"git checkout -qb b{n} main; seq 400 >a{n}.txt; {COMMIT}" for n in range(3))
        + "; git checkout -q main"
    )
    timeouts = WorkerTimeouts(term_grace=0.3, cancel_poll=0.02, actions=PostRunLimits(rescue_bytes=5000))
    await setup.submit()
    record = await setup.worker_setup.run(cli=agent(script), agent_user=setup.user, timeouts=timeouts)
    assert 2 == len(await patches(setup, record))
    [error] = record.action_errors
    assert error.error.startswith("The changes in branch b2 are lost: no file's patch fits into ")


async def test_broken_repository_is_reported(setup: PostRunSetup, agent: Agent) -> None:
    """The others are stored nevertheless."""
    made = f"git init -q $name; cd $name; echo 1 >1; {COMMIT}; cd .."
    script = f"for name in broken fine; do {made}; done; rm -r broken/.git/objects/*"
    record = await setup.run(agent(script))
    assert ["rescue/repository-fine.patch"] == list(await patches(setup, record))
    assert any(
        error.error.startswith("The changes in the repository broken cannot be read: ")
        for error in record.action_errors
    )


async def test_link_to_another_repository_is_not_followed(setup: PostRunSetup, agent: Agent) -> None:
    """A directory that is a link is not searched."""
    script = f'git init -q "$HOME/other"; cd "$HOME/other"; echo 1 >1; {COMMIT}; cd -; ln -s "$HOME/other" link; echo new >a.txt'
    record = await setup.run(agent(script))
    assert None is record.uploaded_files
