from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.request import MINIMAL, errors_of, field_errors, parse

from ccrun import codec, javascript_json
from ccrun.api import checks
from ccrun.api.options import MAX_CONFIG_FILES
from ccrun.api.request import MAX_MCP_CONFIG_BYTES, Defaults, request_fields
from ccrun.results import AgentNetwork
from ccrun.spec import (
    MAX_METADATA_BYTES,
    MAX_PROMPT_BYTES,
    UploadAction,
)


def test_sizes_are_limited_in_bytes() -> None:
    """Each string, list and object has a limit, and a value of exactly that size is valid."""
    limits: dict[str, tuple[Any, Any]] = {
        "prompt": ("é" * (MAX_PROMPT_BYTES // 2), "é" * (MAX_PROMPT_BYTES // 2) + "x"),
        "systemPrompt": ("x" * MAX_PROMPT_BYTES, "x" * (MAX_PROMPT_BYTES + 1)),
        "allowedTools": (["x"] * checks.MAX_LIST_ITEMS, ["x"] * (checks.MAX_LIST_ITEMS + 1)),
        "disallowedTools": (["x" * 4000] * 32, ["x" * 4000] * 33),
        "environmentSecrets": (
            {f"A{number}": "x" * 100_000 for number in range(5)},
            {f"A{number}": "x" * 100_000 for number in range(6)},
        ),
        "metadata": (
            {"a": "x" * (MAX_METADATA_BYTES - 8)},
            {"a": "x" * (MAX_METADATA_BYTES - 7)},
        ),
        "taskId": ("x" * 128, "x" * 129),
        "slashCommands": (
            {f"a{number}": {"content": "x"} for number in range(MAX_CONFIG_FILES)},
            {f"a{number}": {"content": "x"} for number in range(MAX_CONFIG_FILES + 1)},
        ),
    }

    parse({**MINIMAL, **{field: largest for field, (largest, _) in limits.items()}})
    assert (
        limits.keys() == errors_of({**MINIMAL, **{field: too_large for field, (_, too_large) in limits.items()}}).keys()
    )


def test_mcp_config_is_limited_in_bytes_as_json() -> None:
    """Numbers count with their length in JSON, not with their longer form in JavaScript."""
    servers = {"a": {"command": "server", "numbers": [1e20] * 30_000}}

    assert len(codec.to_json(servers)) < MAX_MCP_CONFIG_BYTES < len(javascript_json.dumps(servers))
    assert {"mcpServers": servers} == parse({**MINIMAL, "mcpConfig": servers}).mcp_config
    message = f"mcpConfig must have at most {MAX_MCP_CONFIG_BYTES} bytes as JSON"
    assert {"mcpConfig": message} == field_errors("mcpConfig", {"a": {"x": "y" * MAX_MCP_CONFIG_BYTES}})


@pytest.mark.parametrize("name", ["HOME", "ANTHROPIC_BASE_URL", "CLAUDE_CONFIG_DIR", "CCRUN_X"])
def test_variables_that_the_service_sets_are_reserved(name: str) -> None:
    """A secret cannot override a variable that isolates the agent from the service."""
    assert {
        f"environmentSecrets.{name}": f"environmentSecrets.{name} is reserved: the service itself sets this variable"
    } == field_errors("environmentSecrets", {name: "x"})


@pytest.mark.parametrize("name", ["../x", "a//b", ".hidden", "-x", "team:review", "a b", "", "x" * 65, "ä", "a\n"])
def test_commands_and_agents_have_file_names(name: str) -> None:
    """A name cannot lead out of the directory, and cannot be a hidden file or an option."""
    for field in ("slashCommands", "subagents"):
        (message,) = field_errors(field, {name: {"content": "x"}}).values()
        assert "is not a valid file name" in message


def test_both_spellings_of_glob_patterns_are_accepted() -> None:
    """`glob Patterns`, from an old document, means `globPatterns`; if both are given and differ, the request is rejected."""
    for upload in ({"glob Patterns": ["*.log"]}, {"glob Patterns": ["*.log"], "globPatterns": ["*.log"]}):
        spec = parse({**MINIMAL, "postExecutionActions": {"uploadFiles": upload}})
        assert UploadAction(glob_patterns=("*.log",)) == spec.post_execution_actions.upload_files

    path = "postExecutionActions.uploadFiles"
    assert {f'{path}["glob Patterns"]': "glob Patterns and globPatterns differ: give only one of them"} == field_errors(
        "postExecutionActions", {"uploadFiles": {"glob Patterns": ["a"], "globPatterns": ["b"]}}
    )
    assert {f"{path}.globPatterns": f"{path}.globPatterns is required"} == field_errors(
        "postExecutionActions", {"uploadFiles": {"gcsPrefix": "x"}}
    )


def test_plain_map_of_mcp_servers_is_wrapped() -> None:
    """A plain map of servers gets the form that the CLI reads; a server that is not an object is reported with its path."""
    wrapped = {"mcpServers": {"a": {"type": "http", "url": "https://example.com"}}}

    assert wrapped == parse({**MINIMAL, "mcpConfig": wrapped}).mcp_config
    assert wrapped == parse({**MINIMAL, "mcpConfig": wrapped["mcpServers"]}).mcp_config
    assert {"mcpConfig.mcpServers.a": "mcpConfig.mcpServers.a must be a JSON object, not a string"} == field_errors(
        "mcpConfig", {"mcpServers": {"a": "x"}}
    )
    assert {"mcpConfig.a": "mcpConfig.a must be a JSON object, not null"} == field_errors("mcpConfig", {"a": None})


@pytest.mark.parametrize("server", [{}, {"type": "http"}, {"command": ""}, {"command": ["node"]}, {"url": 1}], ids=str)
def test_mcp_server_has_a_command_or_a_url(server: dict[str, Any]) -> None:
    """A server that can neither be started nor reached is an error; so is a misspelled `mcpServers`, which reads as a server."""
    message = "must have `command` (a program to start) or `url` (a server to connect to)"
    assert {"mcpConfig.a": f"mcpConfig.a {message}"} == field_errors("mcpConfig", {"a": server})
    assert {"mcpConfig.servers": f"mcpConfig.servers {message}"} == field_errors(
        "mcpConfig", {"servers": {"a": {"command": "node"}}}
    )


def test_mcp_servers_stand_in_one_place() -> None:
    """Beside `mcpServers` nothing else may stand."""
    config = {"mcpServers": {"a": {"command": "node"}}, "b": {"command": "node"}}
    assert {"mcpConfig.b": "mcpConfig.b is not part of an MCP configuration: put all servers into mcpServers"} == (
        field_errors("mcpConfig", config)
    )


@pytest.mark.parametrize(
    ("fields", "is_valid"),
    [
        ({"mcpConfig": {"a": {"command": "node"}}}, True),
        ({"gitRepo": "https://example.com/a.git"}, True),
        ({"gitRepo": "https://example.com/a.git", "strictMcpConfig": True}, False),
        ({"mcpConfig": {}}, False),
        ({}, False),
    ],
    ids=str,
)
def test_required_mcp_needs_a_server(fields: dict[str, Any], *, is_valid: bool) -> None:
    """`requireMcp` without any possible server is an error."""
    body = {**MINIMAL, **fields, "requireMcp": True}
    if is_valid:
        assert parse(body).require_mcp
    else:
        message = "requireMcp needs MCP servers: give mcpConfig, or gitRepo without strictMcpConfig"
        assert {"requireMcp": message} == errors_of(body)


def test_sealed_task_has_every_field_of_the_request() -> None:
    """A sealed task has all defaults, in JSON names, so that two versions agree about them."""
    sealed = json.loads(codec.spec_to_bytes(parse(MINIMAL)))

    assert set(request_fields(Defaults())) - {"useNamedPipe"} | {"type"} == sealed.keys()
    assert (55, 6, "made-up-key", None) == (
        sealed["timeoutMinutes"],
        sealed["maxTurns"],
        sealed["anthropicApiKey"],
        sealed["anthropicOAuthToken"],
    )


# --- the network of the agent ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operators", "allowed"),
    [
        (AgentNetwork.PUBLIC, ("none", "allowlist", "public")),
        (AgentNetwork.ALLOWLIST, ("none", "allowlist")),
        (AgentNetwork.NONE, ("none",)),
    ],
)
def test_network_is_at_most_that_of_the_operator(operators: AgentNetwork, allowed: tuple[str, ...]) -> None:
    """A request can narrow the network and not widen it."""
    for network in ("none", "allowlist", "public", "host"):
        body = {**MINIMAL, "network": network, **({"allowedHosts": ["a.org"]} if network == "allowlist" else {})}
        if network in allowed:
            assert network == parse(body, agent_network=operators).network
        else:
            assert ["network"] == list(errors_of(body, agent_network=operators))


def test_allowed_hosts_go_with_an_allowlist() -> None:
    """Hosts without an allowlist are an error, and so is an allowlist without hosts."""
    hosts = {"allowedHosts": ["registry.modules.example", "*.example.com", "2001:db8::1"]}
    assert tuple(hosts["allowedHosts"]) == parse({**MINIMAL, **hosts, "network": "allowlist"}).allowed_hosts
    needed = {"allowedHosts": "allowedHosts needs network: allowlist"}
    assert needed == errors_of({**MINIMAL, **hosts})
    assert needed == errors_of({**MINIMAL, **hosts, "network": "none"})
    required = {"allowedHosts": "allowedHosts is required for network: allowlist"}
    assert required == errors_of({**MINIMAL, "network": "allowlist"})
    # That of the operator is enough, and the default then.
    assert () == parse({**MINIMAL}, agent_network=AgentNetwork.ALLOWLIST).allowed_hosts
    assert parse({**MINIMAL, **hosts}, agent_network=AgentNetwork.ALLOWLIST).allowed_hosts


@pytest.mark.parametrize(
    "host", ["", "*", "*.", "https://a.org", "a.org:443", "a.org/x", "a b", "-a.org", "*.*.org", "a.*", "ä.org"]
)
def test_host_has_no_other_parts(host: str) -> None:
    """A host is a name or an address, or `*.` and a name."""
    errors = errors_of({**MINIMAL, "network": "allowlist", "allowedHosts": [host]})
    assert ["allowedHosts[0]"] == list(errors)


# --- secrets in the wrong place --------------------------------------------------------------------------------------

TOKEN = "made-up-token-0123456789"


@pytest.mark.parametrize(
    "body",
    [
        {**MINIMAL, TOKEN: "anthropicApiKey"},
        {**MINIMAL, "environmentSecrets": {TOKEN: "TOKEN"}},
        {**MINIMAL, "anthropicApiKey": "no-digits-in-it", "no-digits-in-it": 1},
        {**MINIMAL, "environmentSecrets": {"A": "pass word", "B": 1}, "pass word": 1},
        {**MINIMAL, "postExecutionActions": {"git": {"my-git-secret": 1}}, "gitToken": "my-git-secret"},
    ],
    ids=str,
)
def test_error_does_not_repeat_a_secret(body: dict[str, Any]) -> None:
    """A secret that is given as a name by mistake is masked in the error."""
    errors = str(errors_of(body))
    assert "***" in errors
    for secret in (TOKEN, "no-digits-in-it", "pass word", "my-git-secret"):
        assert secret not in errors


def test_words_of_an_error_are_not_masked() -> None:
    """A value that is a word of a message leaves the message as it is."""
    body = {**MINIMAL, "maxTurns": "6", "environmentSecrets": {"A": "number", "B": "maxTurns"}}
    assert {"maxTurns": "maxTurns must be a whole number from 1 to 1000"} == errors_of(body)
