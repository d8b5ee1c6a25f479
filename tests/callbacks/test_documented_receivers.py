from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from helpers.callbacks import (
    BODY,
    EVERYWHERE,
    QUICK,
    SECRET,
    send,
)
from helpers.javascript import RECEIVERS, node_with_packages
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ccrun import ijson, javascript_json
from ccrun.callbacks.deliver import Delivery, deliver
from ccrun.task import Secret


@contextmanager
def running(*command: str) -> Iterator[str]:
    """Run a receiver that prints its port; yield the URL for callbacks."""
    environment = {"PATH": os.environ["PATH"], "CLOUDRUN_CALLBACK_SECRET": SECRET.reveal(), "PYTHONUTF8": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/webhooks/claude-complete"
        finally:
            process.kill()


@pytest.fixture(scope="module")
def express() -> Iterator[str]:
    """Run the Node receiver of the guide with Express, which is installed on first use."""
    node = node_with_packages()
    with running(node, str(RECEIVERS / "express_receiver.js")) as url:
        yield url


@pytest.fixture(scope="module")
def flask() -> Iterator[str]:
    """Run the Python receiver of the guide with Flask."""
    with running(sys.executable, str(RECEIVERS / "flask_receiver.py")) as url:
        yield url


def payload(metadata: Any) -> bytes:
    """Return the body of a callback with the metadata of a request."""
    return javascript_json.dumps(
        {"taskId": "t-1", "status": "completed", "exitCode": 0, "error": None, "metadata": metadata}
    )


def nested(depth: int) -> Any:
    """Return a value with this number of levels."""
    value: Any = 1.5
    for _ in range(depth // 2):
        value = {"a": [value]}
    return value


VERIFIED = Delivery(delivered=True, attempts=1)

NUMBERS = st.one_of(
    st.integers(-ijson.MAX_INTEGER, ijson.MAX_INTEGER), st.floats(allow_nan=False, allow_infinity=False)
)


def metadata_of(names: st.SearchStrategy[str], texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Return a strategy for metadata."""
    leaves = st.one_of(st.none(), st.booleans(), NUMBERS, texts)
    values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(names, inner), max_leaves=20)
    return st.dictionaries(names, values)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))

NAMES = TEXTS | st.integers(0, 30).map(str) | st.sampled_from(["__proto__", "4294967294", "4294967295", "01", ""])


@settings(max_examples=50, deadline=None)
@given(metadata=metadata_of(NAMES, TEXTS))
@example(metadata={"b": 1, "10": 2, "9": 3, "a": 4, "__proto__": {"__proto__": 5}, "toJSON": 6})
@example(metadata={"n": [1.0, 1e21, -0.0, 1e-7, 0.000001, 5e-324, 2**53 - 1]})
@example(metadata={"s": '\u2028\u2029\x00\x1f\x7f\b\t\n\f\r"\\/ é 😀'})
@example(metadata=nested(ijson.MAX_DEPTH - 2))
async def test_node_receiver_verifies_any_metadata(express: str, metadata: Any) -> None:
    """The Node receiver of the guide verifies callbacks with any I-JSON metadata."""
    assert await send(express, payload(metadata)) == VERIFIED


ASCII = st.text(st.characters(max_codepoint=0x7E))


def has_same_json(value: Any) -> bool:
    """Return whether Python and JavaScript format each number in the value in the same way."""
    match value:
        case float():
            return not 1e-9 <= abs(value) < 1e-4
        case list():
            return all(map(has_same_json, value))
        case dict():
            return all(map(has_same_json, value.values()))
    return True


@settings(max_examples=30, deadline=None)
@given(metadata=metadata_of(ASCII | st.integers(0, 30).map(str), ASCII).filter(has_same_json))
@example(metadata={"b": 1, "10": 2, "9": 3, "n": [1.0, 1e21, -0.0, 0.0001, 9.9e-10, 5e-324, 1e20, 1e16]})
@example(metadata={"s": '\x00\x1f\b\t\n\f\r"\\/~'})
@example(metadata=nested(ijson.MAX_DEPTH - 2))
async def test_python_receiver_verifies_ascii_metadata(flask: str, metadata: Any) -> None:
    """The Python receiver of the guide verifies callbacks whose metadata Python and JavaScript format in the same way."""
    assert await send(flask, payload(metadata)) == VERIFIED


@pytest.mark.parametrize("metadata", [{"s": "\x7f"}, {"s": "é"}, {"n": 0.00001}, {"n": 1e-9}, {"n": 9.9e-5}])
async def test_body_is_formatted_as_javascript_does(express: str, flask: str, metadata: Any) -> None:
    """Only the Node receiver verifies values that Python formats differently; `ccrun.javascript_json` documents this limit."""
    assert await send(express, payload(metadata)) == VERIFIED
    assert Delivery(
        delivered=False, attempts=1, error="The receiver responded with 401.", final=True, status=401
    ) == await send(flask, payload(metadata))


async def test_receivers_reject_another_secret(express: str, flask: str) -> None:
    """Both receivers reject a signature that was made with another secret."""
    rejected = Delivery(delivered=False, attempts=1, error="The receiver responded with 401.", final=True, status=401)
    for url in (express, flask):
        delivery = await deliver(
            Secret(url), BODY, webhook_id="msg-t-1", secret=Secret("another"), guard=EVERYWHERE, policy=QUICK
        )
        assert rejected == delivery
