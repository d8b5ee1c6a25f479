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

#: The CLI starts in a second or two on a busy machine.
CLI_SECONDS = 60.0

Cli: TypeAlias = Callable[..., Awaitable[tuple[int, list[dict[str, Any]]]]]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run the real CLI in a clean environment; gives its exit code and the lines it printed."""
    spec = importlib.util.find_spec("claude_agent_sdk")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the claude-agent-sdk package, which carries the CLI, is not installed")
    binary = Path(spec.submodule_search_locations[0], "_bundled", "claude")
    home, room = tmp_path / "home", tmp_path / "room"
    home.mkdir()
    room.mkdir()

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
            cwd=room,
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


async def _ask(model: ScriptedModel, **body: Any) -> tuple[int, Any]:
    """Post a request for a whole message."""
    request = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}], **body}
    async with aiohttp.ClientSession() as session, session.post(f"{model.url}/v1/messages", json=request) as response:
        return response.status, await response.json()


async def _events(model: ScriptedModel) -> list[dict[str, Any]]:
    """Post a request for a stream and return its events."""
    request = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    async with aiohttp.ClientSession() as session, session.post(f"{model.url}/v1/messages", json=request) as response:
        assert response.content_type == "text/event-stream"
        frames = [frame.split("\n") for frame in (await response.text()).split("\n\n")[:-1]]
    events = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [name.removeprefix("event: ") for name, _ in frames] == [event["type"] for event in events]
    return events


def test_the_prompt_is_told_from_the_reminders_around_it() -> None:
    """The prompt is the caller's, whatever reminders the CLI puts before, after or inside its blocks."""
    reminder = "<system-reminder>\nToday is a day.\n</system-reminder>\n"
    blocks = [{"type": "text", "text": reminder}, {"type": "text", "text": f"{reminder}Do this.\n{reminder}"}]
    later = {"role": "user", "content": "Something else"}
    assert _conversation({"role": "user", "content": blocks}, later).prompt == "Do this."
    assert _conversation({"role": "user", "content": f"{reminder}Do that."}).prompt == "Do that."
    assert _conversation({"role": "assistant", "content": "No."}).prompt == ""


def test_the_last_tool_result_is_text_in_both_spellings() -> None:
    """A tool result is read as text whether it was sent as a string or as blocks; the latest counts."""
    first = {"type": "tool_result", "tool_use_id": "a", "content": "one"}
    second = {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "two"}]}
    assert _conversation({"role": "user", "content": "Hello"}).last_tool_result is None
    assert _conversation({"role": "user", "content": [first]}).last_tool_result == "one"
    assert (
        _conversation({"role": "user", "content": [first]}, {"role": "user", "content": [second]}).last_tool_result
        == "two"
    )


async def test_a_stream_carries_the_whole_reply_in_pieces() -> None:
    """The pieces of a stream amount to the text and to the input of the tool, in the order of the API's events."""
    command = {"command": "echo ünïcode 🎉 " + "x" * 1000}
    async with ScriptedModel(sequence(UseTool("Bash", command, "I look."))) as model:
        events = await _events(model)
    kinds = [event["type"] for event in events]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    spoken = [delta["text"] for delta in deltas if delta["type"] == "text_delta"]
    typed = [delta["partial_json"] for delta in deltas if delta["type"] == "input_json_delta"]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert [event["index"] for event in events if event["type"] == "content_block_start"] == [0, 1]
    assert min(len(spoken), len(typed)) > 1
    assert "".join(spoken) == "I look."
    assert json.loads("".join(typed)) == command
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


async def test_whole_messages_tokens_and_refusals() -> None:
    """Without `stream` the message comes whole; a refusal has the API's shape, its status and its headers."""

    def script(conversation: Conversation) -> Reply:
        return Fail(529, "overloaded_error", "Busy") if conversation.prompt == "fail" else Say("Hi")

    async with ScriptedModel(script) as model, aiohttp.ClientSession() as session:
        status, message = await _ask(model)
        assert (status, message["content"]) == (200, [{"type": "text", "text": "Hi"}])
        status, refusal = await _ask(model, messages=[{"role": "user", "content": "fail"}])
        assert (status, refusal) == (
            529,
            {"type": "error", "error": {"type": "overloaded_error", "message": "Busy"}},
        )
        async with session.post(f"{model.url}/v1/messages/count_tokens", json={"messages": []}) as response:
            assert (await response.json(), response.headers["Server"]) == ({"input_tokens": 1}, SERVER)
        for path, body, expected in (("/v1/other", b"{}", 404), ("/v1/messages", b"no json", 400)):
            async with session.post(model.url + path, data=body) as response:
                assert (response.status, (await response.json())["type"]) == (expected, "error")
        assert [request.path for request in model.requests][-1] == "/v1/messages"


async def test_a_hang_does_not_keep_the_server_from_stopping() -> None:
    """A stream that stands still says its text first and ends when the server does."""
    async with asyncio.timeout(10), aiohttp.ClientSession() as session:
        async with ScriptedModel(sequence(Hang("I think"))) as model:
            response = await session.post(f"{model.url}/v1/messages", json={"stream": True, "messages": []})
            assert b"content_block_stop" in await response.content.readuntil(b"content_block_stop")
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_the_cli_uses_tools_and_ends(cli: Cli, tmp_path: Path) -> None:
    """The real CLI runs the demo to its end: the file is there, and the last words quote what the tool read."""
    async with ScriptedModel(demo_script) as model:
        code, lines = await cli(model.url, "Write a note.", "--allowedTools", "Bash", "--max-turns", "6")
    assert code == 0
    assert (tmp_path / "room" / "NOTE.md").read_text() == DEMO_NOTE
    assert DEMO_NOTE.strip() in lines[-1]["result"]
    assert (lines[-1]["num_turns"], lines[-1]["total_cost_usd"]) == (3, 0)
    assert {request.headers["x-api-key"] for request in model.requests} == {"made-up-key"}


async def test_the_cli_tells_its_prompt(cli: Cli) -> None:
    """Many tasks can share one server: a script that looks at the prompt answers each by its own."""
    async with ScriptedModel(lambda conversation: Say(f"You said: {conversation.prompt}")) as model:
        code, lines = await cli(model.url, "Grüße, 世界!")
    assert (code, lines[-1]["result"]) == (0, "You said: Grüße, 世界!")


async def test_the_cli_ends_on_a_failure(cli: Cli) -> None:
    """A failure of the API that the script tells is what the CLI reports."""
    refusal = Fail(400, "invalid_request_error", "Made-up fault", {"x-should-retry": "false"})
    async with ScriptedModel(sequence(refusal)) as model:
        code, lines = await cli(model.url, "Hello")
    assert (code, lines[-1]["is_error"], lines[-1]["api_error_status"]) == (1, True, 400)
    assert "Made-up fault" in lines[-1]["result"]
