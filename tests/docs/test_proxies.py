"""The proxies of docs/proxies.md, with the real servers."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest
from helpers.api import Api, api_on, until
from helpers.deploy import ROOT
from helpers.javascript import RECEIVERS, node_with_packages
from helpers.service import WAIT_SECONDS, read_events

from ccrun.task import TaskId

TASK = TaskId("one")
Command = Callable[[Path, str], list[str]]


def nginx(directory: Path, text: str) -> list[str]:
    """Return the command that runs nginx with a server block."""
    (directory / "logs").mkdir()
    # All that a system's own configuration sets.
    paths = "".join(f"{name}_temp_path {directory};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (directory / "nginx.conf").write_text(
        f"daemon off; pid {directory}/pid; error_log {directory}/logs/error.log;\n"
        f"events {{}}\nhttp {{ access_log off; {paths}\n{text} }}\n"
    )
    return ["nginx", "-p", str(directory), "-c", str(directory / "nginx.conf")]


def caddy(directory: Path, text: str) -> list[str]:
    """Return the command that runs Caddy with a site."""
    (directory / "Caddyfile").write_text(f"{{\n\tadmin off\n}}\n{text}")
    return ["caddy", "run", "--config", str(directory / "Caddyfile"), "--adapter", "caddyfile"]


def node(directory: Path, text: str) -> list[str]:
    """Return the command that runs a program."""
    (directory / "relay.js").write_text(text)
    return [node_with_packages(), str(directory / "relay.js")]


PROXIES = [
    pytest.param(language, command, prefix, marks=pytest.mark.skipif(not shutil.which(program), reason=f"no {program}"))
    for program, language, command, prefix in (
        ("nginx", "nginx", nginx, ""),
        ("caddy", "caddy", caddy, ""),
        ("node", "js", node, "/agent"),
    )
]


@contextlib.asynccontextmanager
async def proxy(api: Api, directory: Path, language: str, command: Command) -> AsyncIterator[str]:
    """Run the proxy of the document before an API; yield its address."""
    [text] = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "proxies.md").read_text(), re.DOTALL)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = text.replace("8080", str(api.port)).replace("8000", str(port))
    environment = {
        **os.environ,
        "HOME": str(directory),
        "NODE_PATH": str(RECEIVERS / "node_modules"),
    }
    process = await asyncio.create_subprocess_exec(
        *await asyncio.to_thread(command, directory, text),
        cwd=directory,
        env=environment,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                assert process.returncode is None, "the proxy has exited"
                await asyncio.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


@pytest.mark.parametrize(("language", "command", "prefix"), PROXIES)
async def test_proxy_passes_events_on_as_they_come(
    tmp_path: Path, language: str, command: Command, prefix: str
) -> None:
    """Each event arrives before the next one is written, a large request is accepted, and a client that leaves is noticed."""
    async with (
        api_on(tmp_path / "data", loopback_only=True, max_request_bytes=10 * 1024**2) as api,
        proxy(api, tmp_path, language, command) as url,
        aiohttp.ClientSession() as http,
        asyncio.timeout(WAIT_SECONDS),
    ):
        # Larger than what nginx takes by default.
        body = json.dumps(api.body(taskId=TASK)).encode() + b" " * 1_500_000
        headers = {"Content-Type": "application/json"}
        async with http.post(f"{url}{prefix}/run", data=io.BytesIO(body), headers=headers) as response:
            assert response.status == 200, await response.text()
            events = read_events(response)
            assert ["task", "caught_up"] == [(await anext(events)).name for _ in range(2)]
            await api.start(TASK)
            assert "status" == (await anext(events)).name
            for number in range(1, 4):
                await api.add_chunk(TASK, number, b'{"n":%d}' % number)
                assert {"n": number} == (await anext(events)).data
            assert 1 == api.feed.readers(TASK)
        await until(lambda: api.feed.readers(TASK) == 0)
