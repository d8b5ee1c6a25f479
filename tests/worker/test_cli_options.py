"""Options of a request with the real CLI, from the task to the request to the model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.git import git_setup
from helpers.worker import WorkerSetup, agent_user, serve_model, worker_setup

from ccrun.process.user import User
from ccrun.spec import ConfigFile
from ccrun.task import Reason, Status
from ccrun.testing.model import Say, ScriptedModel, UseTool, sequence

__all__ = ["agent_user", "git_setup", "serve_model", "worker_setup"]


def first_request(model: ScriptedModel) -> Any:
    """Return the body of the first request to the model."""
    return next(request.body for request in model.requests if request.method == "POST")


async def test_options_reach_the_model(worker_setup: WorkerSetup, serve_model: Any) -> None:
    """The model gets the thinking budget and the maximum output of the request, although `.claude/settings.json` has others."""
    model = await serve_model(sequence(Say("Done.")))
    settings = json.dumps({"env": {"MAX_THINKING_TOKENS": "1111", "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "7777"}})
    await worker_setup.submit(
        model="haiku",
        small_model="claude-sonnet-4-5",
        max_thinking_tokens=2048,
        max_output_tokens=5555,
        pre_execution_commands=(f"mkdir .claude; echo '{settings}' >.claude/settings.json",),
    )
    record = await worker_setup.run(upstream=model.url)
    assert Reason.COMPLETED == record.reason, record.error
    body = first_request(model)
    assert ("claude-sonnet-4-5", 5555, 2048) == (body["model"], body["max_tokens"], body["thinking"]["budget_tokens"])


async def test_effort_reaches_the_model(worker_setup: WorkerSetup, serve_model: Any) -> None:
    """The model gets the effort of the request, although `.claude/settings.json` has another one."""
    model = await serve_model(sequence(Say("Done.")))
    settings = json.dumps({"effortLevel": "high", "env": {"CLAUDE_CODE_EFFORT_LEVEL": "high"}})
    await worker_setup.submit(
        model="claude-opus-4-6",
        effort="low",
        pre_execution_commands=(f"mkdir .claude; echo '{settings}' >.claude/settings.json",),
    )
    await worker_setup.run(upstream=model.url)
    assert {"effort": "low"} == first_request(model)["output_config"]


async def test_settings_are_used(worker_setup: WorkerSetup, serve_model: Any, agent_user: User | None) -> None:
    """Hooks, permissions and variables of the settings have effect, and requests still go through the proxy."""
    model = await serve_model(sequence(UseTool("Bash", {"command": "cat hooked"}), Say("Done.")))
    hook = {"matcher": "Bash", "hooks": [{"type": "command", "command": "printenv WORD >hooked"}]}
    await worker_setup.submit(
        settings={
            "permissions": {"allow": ["Bash(cat *)"]},
            "hooks": {"PreToolUse": [hook]},
            "env": {"WORD": "of-settings"},
        }
    )
    record = await worker_setup.run(upstream=model.url, agent_user=agent_user)
    assert Reason.COMPLETED == record.reason, record.error
    assert '"content": "of-settings"' in json.dumps(model.requests[-1].body)


async def test_invalid_settings_fail_the_task(
    worker_setup: WorkerSetup, serve_model: Any, agent_user: User | None
) -> None:
    """The CLI would ignore all settings, with those of ccrun; the agent does not run, and the error names what is wrong."""
    model = await serve_model(sequence(Say("Done.")))
    await worker_setup.submit(settings={"permissions": "x", "cleanupPeriodDays": -3})
    record = await worker_setup.run(upstream=model.url, agent_user=agent_user)
    assert (Status.FAILED, Reason.PREPARE_FAILED) == (record.status, record.reason)
    assert record.error is not None
    assert record.error.startswith("settings is not valid for the Claude CLI: ")
    assert "permissions: Expected object, but received string" in record.error
    assert "/" not in record.error
    assert [] == list(model.requests)


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        ("/git:commit", {"slash_commands": {"git/commit": ConfigFile(content="WORD-1")}}),
        (
            "/review",
            {"skills": {"review/SKILL.md": ConfigFile(frontmatter={"description": "d"}, content="WORD-1")}},
        ),
        (
            "/p:hi",
            {
                "plugins": {
                    "p/.claude-plugin/plugin.json": ConfigFile(content='{"name": "p"}'),
                    "p/commands/hi.md": ConfigFile(content="WORD-1"),
                }
            },
        ),
        ("/q:hi", {"plugins": {"q/commands/hi.md": ConfigFile(content="WORD-1")}}),
    ],
    ids=["command", "skill", "plugin", "plugin without manifest"],
)
async def test_files_are_used(
    worker_setup: WorkerSetup, serve_model: Any, agent_user: User | None, prompt: str, fields: dict[str, Any]
) -> None:
    """The CLI reads a command in a directory, a skill and a plugin, also as a separate user."""
    model = await serve_model(sequence(Say("Done.")))
    await worker_setup.submit(prompt=prompt, **fields)
    record = await worker_setup.run(upstream=model.url, agent_user=agent_user)
    assert Reason.COMPLETED == record.reason, record.error
    assert "WORD-1" in json.dumps(first_request(model))
