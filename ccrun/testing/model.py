"""A scripted model: a server of the Messages API on loopback, without a model.

A script is a pure function from a request to a reply, so that `ccrun demo` works without a key and tests know what the agent is
told. The server keeps the latest requests and nothing else.

The format: https://docs.anthropic.com/en/api/messages-streaming, https://docs.anthropic.com/en/api/errors.
"""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final, Self, TypeAlias, assert_never

import attrs
from aiohttp import web

#: The API's own limit for a request to `/v1/messages`.
MAX_BODY_BYTES: Final = 32 * 1024 * 1024
#: A request of the CLI has some 50 KB, so all of them have less than 100 MB.
MAX_RECORDED_REQUESTS: Final = 500
#: Pieces in which a text is streamed at most.
MAX_DELTAS: Final = 12
#: Seconds that responses may take when the server stops.
STOP_SECONDS: Final = 0.1
#: The `Server` header of every response.
SERVER: Final = "ccrun-scripted-model (no model)"

_REMINDER: Final = re.compile(r"<system-reminder>.*?</system-reminder>", re.DOTALL)


# --- scripts and replies -----------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Conversation:
    """One request, as a script gets it. A retry of a request is equal to it."""

    messages: tuple[Mapping[str, Any], ...]
    model: str = ""
    headers: Mapping[str, str] = attrs.field(factory=dict)

    @property
    def turn(self) -> int:
        """The number of replies of the assistant so far."""
        return sum(message.get("role") == "assistant" for message in self.messages)

    @property
    def prompt(self) -> str:
        """The prompt of the task: the first text of the user, without the reminders that the CLI adds."""
        texts = (
            _REMINDER.sub("", str(block.get("text", ""))).strip()
            for block in self._user_blocks()
            if block.get("type") == "text"
        )
        return next(filter(None, texts), "")

    @property
    def last_tool_result(self) -> str | None:
        """The text of the latest tool result, None before the first."""
        results = [block for block in self._user_blocks() if block.get("type") == "tool_result"]
        if not results:
            return None
        return "".join(str(block.get("text", "")) for block in _blocks_of(results[-1]))

    def _user_blocks(self) -> Iterator[Mapping[str, Any]]:
        for message in self.messages:
            if message.get("role") == "user":
                yield from _blocks_of(message)


@attrs.frozen
class Say:
    """Reply with text and end the turn.

    Args:
        pause_seconds: The delay before each piece of the text.
    """

    text: str
    pause_seconds: float = attrs.field(default=0.0, kw_only=True)


@attrs.frozen
class UseTool:
    """Reply with a call of one of the agent's tools.

    Args:
        text: Text before the call.
        pause_seconds: The delay before each piece.
    """

    name: str
    input: Mapping[str, Any]
    text: str | None = None
    pause_seconds: float = attrs.field(default=0.0, kw_only=True)


@attrs.frozen
class Fail:
    """Reply with an error of the API."""

    status: int
    error_type: str = "api_error"
    message: str = "The script says that this request fails."
    headers: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Hang:
    """Do not reply until the client disconnects.

    Args:
        text: Text with which the stream starts.
    """

    text: str | None = None


Reply: TypeAlias = Say | UseTool | Fail | Hang
#: A pure function: equal requests get equal replies.
Script: TypeAlias = Callable[[Conversation], Reply]


def sequence(*replies: Reply) -> Script:
    """Return a script that gives the n-th reply in turn n, and the last one in all later turns.

    Raises:
        ValueError: There are no replies.
    """
    if not replies:
        raise ValueError("A sequence needs at least one reply.")
    return lambda conversation: replies[min(conversation.turn, len(replies) - 1)]


DEMO_NOTE: Final = "Written by the agent of the ccrun demo.\nThe agent is real; its model is a script.\n"
#: Slow enough to watch.
DEMO_PAUSE_SECONDS: Final = 0.03


def demo_script(conversation: Conversation) -> Reply:
    """Write a file, read it and report. The agent must be allowed to use `Bash`."""
    match conversation.turn:
        case 0:
            return UseTool(
                "Bash",
                {"command": f"printf %s {shlex.quote(DEMO_NOTE)} > NOTE.md", "description": "Write NOTE.md"},
                "This is a scripted demo: no model reads your prompt. I begin with writing NOTE.md.",
                pause_seconds=DEMO_PAUSE_SECONDS,
            )
        case 1:
            return UseTool(
                "Bash",
                {"command": "cat NOTE.md", "description": "Read NOTE.md back"},
                "Now I read it back.",
                pause_seconds=DEMO_PAUSE_SECONDS,
            )
        case _:
            return Say(
                f"I wrote NOTE.md and read it back. It says:\n\n{conversation.last_tool_result}\n\n"
                "Every word of mine came from a script; set ANTHROPIC_API_KEY to run a real model.",
                pause_seconds=DEMO_PAUSE_SECONDS,
            )


# --- the format --------------------------------------------------------------------------------------------------------


def _blocks_of(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the content blocks of a message or a tool result; the API takes a bare string for one text block."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [block for block in content if isinstance(block, Mapping)] if isinstance(content, list) else []


def _pieces(text: str) -> Iterable[str]:
    size = max(1, -(-len(text) // MAX_DELTAS))
    return (text[start : start + size] for start in range(0, len(text), size))


def _message(reply: Say | UseTool, conversation: Conversation) -> dict[str, Any]:
    """Return the complete message, as a client gets it without streaming."""
    content: list[dict[str, Any]] = [{"type": "text", "text": reply.text}] if reply.text else []
    if isinstance(reply, UseTool):
        use = {"id": f"toolu_scripted_{conversation.turn}", "name": reply.name, "input": dict(reply.input)}
        content.append({"type": "tool_use", **use})
    return {
        "id": f"msg_scripted_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": conversation.model,
        "content": content,
        "stop_reason": "tool_use" if isinstance(reply, UseTool) else "end_turn",
        "stop_sequence": None,
        # No tokens, since the CLI computes their cost.
        "usage": {"input_tokens": 0, "output_tokens": 0},
    }


def _events(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of a stream of this message."""
    yield {"type": "message_start", "message": {**message, "content": [], "stop_reason": None}}
    yield {"type": "ping"}
    for index, block in enumerate(message["content"]):
        match block["type"]:
            case "text":
                empty: dict[str, Any] = {"text": ""}
                deltas = [{"type": "text_delta", "text": piece} for piece in _pieces(block["text"])]
            case _:
                empty = {"input": {}}
                pieces = _pieces(json.dumps(block["input"]))
                deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
        yield {"type": "content_block_start", "index": index, "content_block": {**block, **empty}}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    stopped: dict[str, Any] = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    yield {"type": "message_delta", "delta": stopped, "usage": message["usage"]}
    yield {"type": "message_stop"}


def _failure(fail: Fail) -> web.Response:
    error = {"type": fail.error_type, "message": fail.message}
    return web.json_response({"type": "error", "error": error}, status=fail.status, headers=fail.headers)


# --- the server ------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class RecordedRequest:
    """A request that the server got. `body` is the parsed JSON, None if it was none."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


class ScriptedModel:
    """Serves a script, in place of a model, on 127.0.0.1 for as long as the context lasts.

    Args:
        script: What to answer.
        port: Where to listen; 0 takes a free one.
    """

    def __init__(self, script: Script, *, port: int = 0) -> None:
        #: The latest `MAX_RECORDED_REQUESTS` requests, oldest first. `path` is as it was sent, with the query.
        self.requests: deque[RecordedRequest] = deque(maxlen=MAX_RECORDED_REQUESTS)
        self._script = script
        self._port = port
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", self._answer)
        app.on_response_prepare.append(_say_what_this_is)
        # Without handler_cancellation a Hang would go on after its client has left and outlive the server.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=STOP_SECONDS)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        """The base URL, without a slash at the end."""
        return f"http://127.0.0.1:{self._port}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        try:
            body = json.loads(await request.read())
        except (ValueError, RecursionError):
            body = None
        self.requests.append(
            RecordedRequest(method=request.method, path=request.raw_path, headers=request.headers, body=body)
        )
        if request.method != "POST" or request.path not in ("/v1/messages", "/v1/messages/count_tokens"):
            return _failure(Fail(404, "not_found_error", "The scripted model server has only /v1/messages."))
        messages = body.get("messages") if isinstance(body, dict) else None
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            return _failure(Fail(400, "invalid_request_error", "messages: a list of objects is required"))
        conversation = Conversation(messages=tuple(messages), model=str(body.get("model", "")), headers=request.headers)
        if request.path.endswith("/count_tokens"):
            return web.json_response({"input_tokens": 1})
        match reply := self._script(conversation):
            case Fail():
                return _failure(reply)
            case Hang(text=None):
                return await _never()
            case Hang(text=text):
                begin = _events(_message(Say(text or ""), conversation))
                await _stream(
                    request, (event for event in begin if event["type"] not in ("message_delta", "message_stop"))
                )
                return await _never()
            case Say() | UseTool():
                message = _message(reply, conversation)
                if body.get("stream") is True:
                    return await _stream(request, _events(message), reply.pause_seconds)
                return web.json_response(message)
            case _ as never:
                assert_never(never)


async def _stream(
    request: web.Request, events: Iterable[Mapping[str, Any]], pause_seconds: float = 0.0
) -> web.StreamResponse:
    """Send `events`, each in a write of its own, pausing before each delta. The caller's return ends the stream."""
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
    )
    await response.prepare(request)
    for event in events:
        if event["type"] == "content_block_delta":
            await asyncio.sleep(pause_seconds)
        await response.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
    return response


async def _say_what_this_is(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = SERVER


async def _never() -> web.StreamResponse:
    """Wait until the client leaves or the server stops: either cancels the handler."""
    return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]
