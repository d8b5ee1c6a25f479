from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
import pytest

from ccrun.testing.model import (
    DEMO_NOTE,
    SERVER,
    Conversation,
    Fail,
    Hang,
    Reply,
    Say,
    ScriptedModel,
    UseTool,
    demo_script,
    sequence,
)

#: Seconds. The longest run of the CLI, with room for a busy machine.
CLI_SECONDS = 60.0

Cli: TypeAlias = Callable[..., Awaitable[tuple[int, list[dict[str, Any]]]]]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Return a function that runs the real CLI in a clean environment and returns its exit code and its output lines."""
    spec = importlib.util.find_spec("claude_agent_sdk")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the claude-agent-sdk package, which contains the CLI, is not installed")
    binary = Path(spec.submodule_search_locations[0], "_bundled", "claude")
    home, workspace = tmp_path / "home", tmp_path / "workspace"
    home.mkdir()
    workspace.mkdir()

    async def run(base_url: str, prompt: str, *arguments: str, **extra: str) -> tuple[int, list[dict[str, Any]]]:
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(home),
            "TMPDIR": str(home),
            "CLAUDE_CONFIG_DIR": str(home / ".claude"),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
            "ANTHROPIC_BASE_URL": base_url,
            "ANTHROPIC_API_KEY": "made-up-key",
            **extra,
        }
        process = await asyncio.create_subprocess_exec(
            binary,
            *("-p", "--verbose", "--output-format", "stream-json", *arguments),
            cwd=workspace,
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(prompt.encode()), CLI_SECONDS)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, [json.loads(line) for line in output.splitlines()]

    return run


def _conversation(*messages: dict[str, Any]) -> Conversation:
    return Conversation(messages=messages)


async def _request_message(model: ScriptedModel, **body: Any) -> tuple[int, Any]:
    """Request a complete message; return the status and the body."""
    request = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}], **body}
    async with aiohttp.ClientSession() as session, session.post(f"{model.url}/v1/messages", json=request) as response:
        return response.status, await response.json()


async def _request_stream(model: ScriptedModel) -> list[dict[str, Any]]:
    """Request a stream; return its events."""
    request = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    async with aiohttp.ClientSession() as session, session.post(f"{model.url}/v1/messages", json=request) as response:
        assert response.content_type == "text/event-stream"
        frames = [frame.split("\n") for frame in (await response.text()).split("\n\n")[:-1]]
    events = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [name.removeprefix("event: ") for name, _ in frames] == [event["type"] for event in events]
    return events


def test_prompt_has_no_reminders() -> None:
    """The reminders that the CLI adds are not part of the prompt, whether they are separate blocks or not."""
    reminder = "<system-reminder>\nToday is a day.\n</system-reminder>\n"
    blocks = [{"type": "text", "text": reminder}, {"type": "text", "text": f"{reminder}Do this.\n{reminder}"}]
    later = {"role": "user", "content": "Something else"}
    assert _conversation({"role": "user", "content": blocks}, later).prompt == "Do this."
    assert _conversation({"role": "user", "content": f"{reminder}Do that."}).prompt == "Do that."
    assert _conversation({"role": "assistant", "content": "No."}).prompt == ""


def test_last_tool_result_is_text() -> None:
    """`last_tool_result` is the text of the latest result, which the CLI sends as a string or as blocks."""
    first = {"type": "tool_result", "tool_use_id": "a", "content": "one"}
    second = {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "two"}]}
    assert _conversation({"role": "user", "content": "Hello"}).last_tool_result is None
    assert _conversation({"role": "user", "content": [first]}).last_tool_result == "one"
    assert (
        _conversation({"role": "user", "content": [first]}, {"role": "user", "content": [second]}).last_tool_result
        == "two"
    )


async def test_stream_contains_the_reply_in_pieces() -> None:
    """The deltas of a stream join to the text and the input of the tool, and the events have the order of the API."""
    command = {"command": "echo ünïcode 🎉 " + "x" * 1000}
    async with ScriptedModel(sequence(UseTool("Bash", command, "I read."))) as model:
        events = await _request_stream(model)
    kinds = [event["type"] for event in events]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    texts = [delta["text"] for delta in deltas if delta["type"] == "text_delta"]
    inputs = [delta["partial_json"] for delta in deltas if delta["type"] == "input_json_delta"]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert [event["index"] for event in events if event["type"] == "content_block_start"] == [0, 1]
    assert min(len(texts), len(inputs)) > 1
    assert "".join(texts) == "I read."
    assert json.loads("".join(inputs)) == command
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


async def test_responses_without_streaming() -> None:
    """Complete messages, token counts and errors have the form of the API."""

    def script(conversation: Conversation) -> Reply:
        return Fail(529, "overloaded_error", "Busy") if conversation.prompt == "fail" else Say("Hi")

    async with ScriptedModel(script) as model, aiohttp.ClientSession() as session:
        status, message = await _request_message(model)
        assert (status, message["content"]) == (200, [{"type": "text", "text": "Hi"}])
        status, error = await _request_message(model, messages=[{"role": "user", "content": "fail"}])
        assert (status, error) == (
            529,
            {"type": "error", "error": {"type": "overloaded_error", "message": "Busy"}},
        )
        async with session.post(f"{model.url}/v1/messages/count_tokens", json={"messages": []}) as response:
            assert (await response.json(), response.headers["Server"]) == ({"input_tokens": 1}, SERVER)
        for path, body, expected in (("/v1/other", b"{}", 404), ("/v1/messages", b"no json", 400)):
            async with session.post(model.url + path, data=body) as response:
                assert (response.status, (await response.json())["type"]) == (expected, "error")
        assert [request.path for request in model.requests][-1] == "/v1/messages"


async def test_server_stops_during_a_hang() -> None:
    """A hanging stream sends its text first, and its connection closes when the server stops."""
    async with asyncio.timeout(10), aiohttp.ClientSession() as session:
        async with ScriptedModel(sequence(Hang("I think"))) as model:
            response = await session.post(f"{model.url}/v1/messages", json={"stream": True, "messages": []})
            assert b"content_block_stop" in await response.content.readuntil(b"content_block_stop")
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_cli_runs_the_demo_script(cli: Cli, tmp_path: Path) -> None:
    """The real CLI completes the demo script: the file exists, and the result contains what the tool read."""
    async with ScriptedModel(demo_script) as model:
        code, lines = await cli(model.url, "Write a note.", "--allowedTools", "Bash", "--max-turns", "6")
    assert code == 0
    assert (tmp_path / "workspace" / "NOTE.md").read_text() == DEMO_NOTE
    assert DEMO_NOTE.strip() in lines[-1]["result"]
    assert (lines[-1]["num_turns"], lines[-1]["total_cost_usd"]) == (3, 0)
    assert {request.headers["x-api-key"] for request in model.requests} == {"made-up-key"}


async def test_script_gets_the_prompt_of_the_cli(cli: Cli) -> None:
    """A script can reply to each task by its prompt, so that several tasks can share one server."""
    async with ScriptedModel(lambda conversation: Say(f"You said: {conversation.prompt}")) as model:
        code, lines = await cli(model.url, "Grüße, 世界!")
    assert (code, lines[-1]["result"]) == (0, "You said: Grüße, 世界!")


async def test_cli_reports_an_error_of_the_script(cli: Cli) -> None:
    """The result of the CLI has the status and the message of the scripted error."""
    failure = Fail(400, "invalid_request_error", "Made-up fault", {"x-should-retry": "false"})
    async with ScriptedModel(sequence(failure)) as model:
        code, lines = await cli(model.url, "Hello")
    assert (code, lines[-1]["is_error"], lines[-1]["api_error_status"]) == (1, True, 400)
    assert "Made-up fault" in lines[-1]["result"]
