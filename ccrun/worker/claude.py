"""The Claude CLI: its arguments, environment and input files, its stream-json, and how a run of it is judged.

All of it is plain functions of values, but for `find_cli`, which looks at the disk. It starts no process and knows no storage.
What it says of the CLI was seen with version 2.1.
"""

from __future__ import annotations

import codecs
import importlib.util
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ccrun.errors import CcrunError
from ccrun.process import MARKER, Exit
from ccrun.task import EXIT_FAILED, ConfigFile, Outcome, Reason, Secret, Status, TaskSpec, is_reserved_variable
from ccrun.worker.lines import slices, text_line

#: Lines are parsed up to here. Longer ones (a tool that printed much) are looked at without a copy, so memory stays flat.
MAX_PARSED_LINE_BYTES: Final = 1024 * 1024
#: The result is kept in the record and goes out with the callback, whose body, with 64 KiB of metadata, must stay below the
#: 100 kB that Express takes by default; the log has the whole of it.
MAX_RESULT_CHARS: Final = 4 * 1024
#: An error is one sentence for a person; the CLI may quote a whole answer of the API.
MAX_ERROR_CHARS: Final = 2000
#: With more, the path of the CLI's socket is over 103 bytes, and it goes to the shared /tmp/cc-socks-UID instead.
MAX_TEMPORARY_PATH_BYTES: Final = 80
#: Beyond any run, and small enough that sums of such figures stay exact in JavaScript, which reads the callback.
MAX_FIGURE: Final = 2**40
#: The figures of a result are three levels deep; a line that is made to hurt could nest a thousand.
MAX_USAGE_DEPTH: Final = 8

_CONTROL: Final = re.compile(rb"[\x00-\x1f]")
#: Items between commas; a comma in parentheses belongs to the item, as in `Bash(git log:*, -n)`.
_LISTED: Final = re.compile(r"(?:[^,(]|\([^)]*\)?)+")


# --- what the CLI is given -------------------------------------------------------------------------------------------


def find_cli(configured: str | None, path: str) -> Path:
    """Return where the CLI is: as configured, else `claude` on the PATH, else the one that the claude-agent-sdk carries.

    Blocks while it looks at the disk.

    Args:
        configured: A path or a name; it is taken or nothing.
        path: A PATH.

    Raises:
        CcrunError: There is none.
    """
    if configured:
        if found := shutil.which(configured, path=path):
            return Path(found).absolute()
        raise CcrunError("CLAUDE_CLI does not name a program that can be run.")
    if found := shutil.which("claude", path=path):
        return Path(found).absolute()
    # Looked up, not imported: the import takes a second.
    package = importlib.util.find_spec("claude_agent_sdk")
    for folder in (package and package.submodule_search_locations) or ():
        bundled = Path(folder, "_bundled", "claude")
        if os.access(bundled, os.X_OK):
            return bundled
    raise CcrunError("The Claude CLI was not found: set CLAUDE_CLI, put `claude` on PATH or install ccrun[claude].")


def environment(
    spec: TaskSpec,
    *,
    inherited: Mapping[str, str],
    home: Path,
    config: Path,
    temporary: Path,
    base_url: str,
    run_token: Secret,
    is_oauth: bool,
    is_root: bool,
    marker: str,
) -> dict[str, str]:
    """Return all of the agent's environment: nothing of the worker's but PATH, locale and time zone.

    Args:
        inherited: The worker's environment.
        home: The agent's home.
        config: The CLI's own folder, with the task's `commands` and `agents`.
        temporary: For temporary files; at most `MAX_TEMPORARY_PATH_BYTES` long if the CLI is to keep all its files there.
        base_url: The proxy.
        run_token: What opens the proxy.
        is_oauth: Whether the real credential is an OAuth token; the CLI asks differently with one.
        is_root: Whether the agent runs as root; the CLI then refuses `bypassPermissions` unless told that it is contained.
        marker: By which all processes of the task are found.
    """
    secrets = {
        name: secret.reveal() for name, secret in spec.environment_secrets.items() if not is_reserved_variable(name)
    }
    paths = (secrets.get("PATH"), inherited.get("PATH", os.defpath))
    no_proxy = ",".join(filter(None, (secrets.get("NO_PROXY") or secrets.get("no_proxy"), "127.0.0.1")))
    return {
        "LANG": "C.UTF-8",
        **{name: value for name, value in inherited.items() if name in ("LANG", "TZ") or name.startswith("LC_")},
        **secrets,
        # A PATH of the caller's goes before ours, which has what the CLI needs; a proxy of the caller's is not for loopback.
        "PATH": os.pathsep.join(filter(None, paths)),
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "HOME": str(home),
        "CLAUDE_CONFIG_DIR": str(config),
        "TMPDIR": str(temporary),
        "TERM": "dumb",
        "ANTHROPIC_BASE_URL": base_url,
        "CLAUDE_CODE_OAUTH_TOKEN" if is_oauth else "ANTHROPIC_API_KEY": run_token.reveal(),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        **({"IS_SANDBOX": "1"} if is_root else {}),
        MARKER: marker,
    }


#: What decides where the CLI sends its requests and with which credential.
_PINNED: Final = (
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_AUTH_TOKEN",
    "ANTHROPIC_BASE_URL",
    "CLAUDE_CODE_OAUTH_TOKEN",
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_FOUNDRY",
    "CLAUDE_CODE_USE_VERTEX",
    "NO_PROXY",
    "no_proxy",
)


def inputs(spec: TaskSpec, environment: Mapping[str, str]) -> dict[str, bytes]:
    """Return what the CLI reads from files: each file's content under the option that names it.

    Files and not arguments: these are large (one argument has at most 128 KiB on Linux) and confidential (arguments are in
    the process list). They are for folders that no repository reaches, mode 0600.
    """
    # A repository's settings may set variables and win over the environment; what a flag names wins over both.
    settings = {"apiKeyHelper": "", "env": {name: environment.get(name, "") for name in _PINNED}}
    files = {"settings": json.dumps(settings).encode()}
    if spec.system_prompt is not None:
        files["system-prompt-file"] = spec.system_prompt.encode()
    if spec.append_system_prompt is not None:
        files["append-system-prompt-file"] = spec.append_system_prompt.encode()
    if spec.mcp_config is not None:
        files["mcp-config"] = json.dumps(spec.mcp_config).encode()
    if spec.subagents:
        # In a folder `agents` the repository's of the same name would win.
        agents = {name: _agent(name, file) for name, file in spec.subagents.items()}
        files["agents"] = json.dumps(agents).encode()
    return files


def _agent(name: str, file: ConfigFile) -> dict[str, Any]:
    """Return a subagent as `--agents` takes it, which wants lists where front matter has `Read, Grep`."""
    agent = {key: value for key, value in file.frontmatter.items() if key != "name" and value is not None}
    for key in ("tools", "disallowedTools", "skills"):
        if isinstance(listed := agent.get(key), str):
            agent[key] = [item.strip() for item in _LISTED.findall(listed) if item.strip()]
    return {"description": f"The subagent {name}.", **agent, "prompt": file.content}


def argv(spec: TaskSpec, *, cli: Path, files: Mapping[str, Path]) -> list[str]:
    """Return the command. The prompt is not in it: it goes to stdin.

    Every value is tied to its flag by `=`, so that none is read as a flag and none swallows its neighbour. Each tool has a
    flag of its own; within one value the CLI splits at commas and spaces outside of parentheses.

    Args:
        files: Where the `inputs` were written, under the same options.
    """
    single = {"model": spec.model, "fallback-model": spec.fallback_model, "permission-mode": spec.permission_mode}
    return [
        str(cli),
        "-p",
        "--verbose",
        "--output-format=stream-json",
        "--permission-prompts=none",
        f"--max-turns={spec.max_turns}",
        *(f"--{option}={value}" for option, value in single.items() if value is not None),
        *(f"--allowedTools={tool}" for tool in spec.allowed_tools),
        *(f"--disallowedTools={tool}" for tool in spec.disallowed_tools),
        *(f"--{option}={path}" for option, path in files.items()),
        *(("--strict-mcp-config",) if "mcp-config" in files else ()),
    ]


# --- what the CLI prints ---------------------------------------------------------------------------------------------


class Transcript:
    """What a run has said so far that matters for its end; fed line by line."""

    def __init__(self) -> None:
        #: The last result: background work can wake the agent again after its first.
        self.result: Mapping[str, Any] | None = None
        #: Turns of all results.
        self.turns = 0
        #: Tools that reported an error.
        self.errors = 0
        #: Tokens of all results.
        self.usage: Mapping[str, Any] | None = None
        #: Whether the API has refused the credential.
        self.is_refused = False
        self.has_lines = False

    def feed(self, line: bytes | bytearray) -> None:
        """Take a line of stdout. Only what can matter is parsed; of long lines, only a result."""
        self.has_lines = True
        is_result = b'"type":"result"' in line
        if not is_result and (
            len(line) > MAX_PARSED_LINE_BYTES or (b'"is_error":true' not in line and b'"api_retry"' not in line)
        ):
            return
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            return
        match event:
            case {"type": "result"}:
                self.result = event
                self.turns += _whole(event.get("num_turns"))
                self.usage = _sum(self.usage, event.get("usage")) or self.usage
                self.is_refused = event.get("api_error_status") == 401
            case {"type": "user", "message": {"content": [*blocks]}}:
                self.errors += sum(isinstance(block, dict) and block.get("is_error") is True for block in blocks)
            case {"type": "system", "subtype": "api_retry", "error_status": 401}:
                self.is_refused = True
            case _:
                pass


def _whole(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < MAX_FIGURE else 0


def _text(value: object, limit: int) -> str | None:
    """Return a text that can be encoded and kept, or None if it is none."""
    if not isinstance(value, str):
        return None
    text = value.encode(errors="replace").decode()
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _sum(old: Mapping[str, Any] | None, new: object, depth: int = MAX_USAGE_DEPTH) -> dict[str, Any] | None:
    """Return figures with `new` added: numbers are added, objects member by member, of a text the newer counts."""
    if not isinstance(new, dict) or not depth:
        return None
    total = dict(old or {})
    for key, value in new.items():
        name = _text(key, MAX_ERROR_CHARS) or ""
        before = total.get(name)
        match value:
            case dict():
                total[name] = _sum(before if isinstance(before, dict) else None, value, depth - 1)
            case int() | float() if abs(value) < MAX_FIGURE:
                total[name] = value + (before if isinstance(before, int | float) else 0)
            case str():
                total[name] = _text(value, MAX_ERROR_CHARS)
            case _:
                pass
    return total


def line_for_log(line: bytes | bytearray) -> bytes | bytearray:
    """Return a line of output as the log has it: one JSON object, without a raw line break in it.

    An object stays as it is, byte for byte; anything else becomes the content of a text object. Empty for a blank line, which
    the log does not have. A line over `MAX_PARSED_LINE_BYTES` counts as an object by its first and last byte if it is UTF-8
    without control characters: to parse it would take many times its memory.
    """
    if line.isspace() or not line:
        return b""
    if len(line) > MAX_PARSED_LINE_BYTES:
        return line if _looks_like_object(line) else _as_text(line)
    stripped = line.strip()
    return stripped if _is_object(stripped) else _as_text(line)


def _is_object(line: bytes | bytearray) -> bool:
    if not line.startswith(b"{") or b"\r" in line:
        return False
    try:
        return isinstance(json.loads(line.decode(), parse_constant=_refuse), dict)
    except (ValueError, RecursionError):
        return False


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _looks_like_object(line: bytes | bytearray) -> bool:
    if not line.startswith(b"{") or not line.endswith(b"}") or _CONTROL.search(line):
        return False
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for piece in slices(line):
            decoder.decode(piece)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _as_text(line: bytes | bytearray) -> bytes | bytearray:
    return text_line(line, type="text")


# --- how a run is judged ---------------------------------------------------------------------------------------------


def judge(transcript: Transcript, ended: Exit, *, stopped_by_us: bool = False, rejected: str | None = None) -> Outcome:
    """Return how a run ended: well when the last result is no error and the process ended well too.

    Args:
        ended: How the process ended.
        stopped_by_us: It did not end by itself and was made to; once there is a result, its exit then says nothing.
        rejected: What the model API said when it refused the credential.
    """
    result = transcript.result or {}
    if stopped_by_us and transcript.result is not None:
        ended = Exit(code=0)
    is_success = result.get("is_error") is False
    if is_success and ended.ok:
        reason, error = Reason.COMPLETED, None
    else:
        reason, error = _fault(transcript, None if is_success else _words(result), ended, rejected)
    cost = result.get("total_cost_usd")
    return Outcome(
        status=Status.COMPLETED if error is None else Status.FAILED,
        reason=reason,
        exit_code=0 if error is None else ended.code or EXIT_FAILED,
        error=error,
        turns=transcript.turns,
        errors=transcript.errors,
        cost_usd=cost if isinstance(cost, int | float) and 0 <= cost < math.inf else None,
        usage=transcript.usage,
        session_id=_text(result.get("session_id"), MAX_ERROR_CHARS),
        result=_text(result.get("result"), MAX_RESULT_CHARS),
    )


def _fault(transcript: Transcript, words: str | None, ended: Exit, rejected: str | None) -> tuple[Reason, str]:
    """Return why a run failed, in the CLI's own words where it has any."""
    result = transcript.result or {}
    plain = words or f"Claude process exited with code {ended.code or EXIT_FAILED}"
    if rejected is not None or transcript.is_refused:
        return Reason.CREDENTIAL_REJECTED, rejected or plain
    if ended.signal is not None:
        return Reason.KILLED, _killed_by(ended.signal)
    if transcript.result is None and ended.ok:
        return Reason.AGENT_ERROR, "The Claude CLI ended without a result."
    if result.get("subtype") == "error_max_turns":
        return Reason.MAX_TURNS, plain
    if result.get("terminal_reason") == "api_error":
        return Reason.API_ERROR, plain
    return Reason.AGENT_ERROR, plain


def _words(result: Mapping[str, Any]) -> str | None:
    """Return what the CLI says of an error: the text of the result, else its list of errors."""
    errors = result.get("errors")
    listed = "; ".join(error for error in errors if isinstance(error, str)) if isinstance(errors, list) else None
    return _text(result.get("result") or listed, MAX_ERROR_CHARS) or None


def _killed_by(number: int) -> str:
    try:
        name = f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        name = f"signal {number}"
    guess = ", which usually means that memory ran out" if number == signal.SIGKILL else ""
    return f"The Claude process was killed by {name}{guess}."
