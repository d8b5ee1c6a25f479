"""The model APIs of clouds, with the real CLI and servers that check the credential."""

from __future__ import annotations

import asyncio
import datetime as dt
import re
from collections.abc import Mapping

import pytest
from helpers.worker import WorkerSetup, worker_setup
from standins.clouds import CloudModel, IsAuthentic

from ccrun.config import load
from ccrun.errors import ConfigError
from ccrun.task import Reason, Secret, Status
from ccrun.testing.model import Conversation, Reply, Say, UseTool
from ccrun.worker.clouds import open_cloud
from ccrun.worker.sigv4 import AwsCredential, signed_headers
from ccrun.worker.upstream import ModelApi

__all__ = ["worker_setup"]

SECRET = "made-up-cloud-secret"
VERTEX = {"CLAUDE_CODE_USE_VERTEX": "1", "ANTHROPIC_VERTEX_PROJECT_ID": "proj-1", "CLOUD_ML_REGION": "us-east5"}
BEDROCK = {"CLAUDE_CODE_USE_BEDROCK": "1", "AWS_REGION": "us-east-1"}
ACCESS_KEY = {
    "AWS_ACCESS_KEY_ID": "made-up-id",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_SESSION_TOKEN": f"{SECRET}-token",
}
EAST = "/projects/proj-1/locations/us-east5/publishers/anthropic/models"
GLOBAL = "/projects/proj-1/locations/global/publishers/anthropic/models"
ARN = "arn%3Aaws%3Abedrock%3Aus-east-1%3A1%3Ainference-profile%2Fa.b"
FOUNDRY = {"CLAUDE_CODE_USE_FOUNDRY": "1", "ANTHROPIC_FOUNDRY_RESOURCE": "res-1"}


async def token() -> str | None:
    """Return an access token of the service account."""
    return SECRET


def cloud(variables: Mapping[str, str]) -> ModelApi | None:
    """Return the cloud of an operator with these variables."""
    return open_cloud(load(variables, on_terminal=False), variables, token)


def has_header(name: str, value: str) -> IsAuthentic:
    """Return a check of one header."""
    return lambda method, path, headers, body: headers.get(name) == value


def is_signed(method: str, path: str, headers: Mapping[str, str], body: bytes) -> bool:
    """Check the signature of a request, as AWS does: from what was received."""
    match = re.search(
        r"Credential=made-up-id/\d+/us-east-1/bedrock/aws4_request, SignedHeaders=([^,]+), ", headers["Authorization"]
    )
    if match is None or headers.get("X-Amz-Security-Token") != f"{SECRET}-token":
        return False
    names = [name for name in match[1].split(";") if name not in ("host", "x-amz-date", "x-amz-security-token")]
    credential = AwsCredential(
        access_key_id="made-up-id", secret_access_key=Secret(SECRET), session_token=Secret(f"{SECRET}-token")
    )
    at = dt.datetime.strptime(headers["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=dt.UTC)
    expected = signed_headers(
        credential,
        method=method,
        url=f"http://{headers['Host']}{path}",
        headers={name: headers[name] for name in names},
        body=body,
        service="bedrock",
        region="us-east-1",
        at=at,
    )
    return {"accept", "content-type"} >= set(names) and headers["Authorization"] == expected["Authorization"]


def print_environment(conversation: Conversation) -> Reply:
    """Let the agent print its environment, and that of the CLI."""
    if conversation.turn == 0:
        command = "env; tr '\\0' '\\n' </proc/$PPID/environ"
        return UseTool("Bash", {"command": command, "description": "Print the environment"})
    return Say(f"Output: {conversation.last_tool_result}")


# --- with the real CLI -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "base", "is_authentic", "path"),
    [
        (
            VERTEX,
            "ANTHROPIC_VERTEX_BASE_URL",
            has_header("Authorization", f"Bearer {SECRET}"),
            "/projects/proj-1/locations/us-east5/publishers/anthropic/models/",
        ),
        (
            {**BEDROCK, "AWS_BEARER_TOKEN_BEDROCK": SECRET},
            "ANTHROPIC_BEDROCK_BASE_URL",
            has_header("Authorization", f"Bearer {SECRET}"),
            "/model/",
        ),
        ({**BEDROCK, **ACCESS_KEY}, "ANTHROPIC_BEDROCK_BASE_URL", is_signed, "/model/"),
        (
            {**FOUNDRY, "ANTHROPIC_FOUNDRY_API_KEY": SECRET},
            "ANTHROPIC_FOUNDRY_BASE_URL",
            has_header("X-Api-Key", SECRET),
            "/v1/messages",
        ),
        (
            {**FOUNDRY, "ANTHROPIC_FOUNDRY_AUTH_TOKEN": SECRET},
            "ANTHROPIC_FOUNDRY_BASE_URL",
            has_header("Authorization", f"Bearer {SECRET}"),
            "/v1/messages",
        ),
    ],
    ids=["vertex", "bedrock-token", "bedrock-signature", "foundry-key", "foundry-token"],
)
async def test_proxy_adds_the_credential_of_the_cloud(
    worker_setup: WorkerSetup, variables: Mapping[str, str], base: str, is_authentic: IsAuthentic, path: str
) -> None:
    """A task runs with the operator's cloud. The agent cannot read the credential."""
    async with CloudModel(print_environment, is_authentic) as model:
        await worker_setup.submit(anthropic_api_key=None, allowed_tools=("Bash",))
        record = await worker_setup.run(cloud=await asyncio.to_thread(cloud, {**variables, base: model.url}))
    assert (Status.COMPLETED, 0) == (record.status, model.rejected)
    assert all(each.startswith(path) for each in model.paths)
    assert record.summary is not None
    assert base in str(record.summary.result)
    assert SECRET not in str(await worker_setup.log())


async def test_credential_of_the_request_comes_first(worker_setup: WorkerSetup) -> None:
    """A request with a credential for the model API of Anthropic uses that API."""
    async with CloudModel(print_environment, has_header("X-Api-Key", "made-up-own-key")) as model:
        await worker_setup.submit(anthropic_api_key=Secret("made-up-own-key"))
        record = await worker_setup.run(
            upstream=model.url, cloud=await asyncio.to_thread(cloud, {**FOUNDRY, "ANTHROPIC_FOUNDRY_API_KEY": SECRET})
        )
    assert (Status.COMPLETED, 0) == (record.status, model.rejected)


@pytest.mark.parametrize(
    ("variables", "base"),
    [
        (VERTEX, "ANTHROPIC_VERTEX_BASE_URL"),
        ({**BEDROCK, **ACCESS_KEY}, "ANTHROPIC_BEDROCK_BASE_URL"),
        ({**FOUNDRY, "ANTHROPIC_FOUNDRY_API_KEY": SECRET}, "ANTHROPIC_FOUNDRY_BASE_URL"),
    ],
    ids=["vertex", "bedrock", "foundry"],
)
async def test_rejected_credential_is_named(worker_setup: WorkerSetup, variables: Mapping[str, str], base: str) -> None:
    """The task fails at once, and the error has the words of the cloud."""
    async with CloudModel(print_environment, lambda *_: False) as model:
        await worker_setup.submit(anthropic_api_key=None)
        record = await worker_setup.run(cloud=await asyncio.to_thread(cloud, {**variables, base: model.url}))
    assert (Reason.CREDENTIAL_REJECTED, "The signature or the token is not valid.") == (record.reason, record.error)
    assert record.summary is not None
    assert record.summary.api_error is not None
    assert 403 == record.summary.api_error.status


# --- the requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "path", "target"),
    [
        (
            VERTEX,
            f"{EAST}/claude-x@20250101:streamRawPredict",
            f"https://us-east5-aiplatform.googleapis.com/v1{EAST}/claude-x@20250101:streamRawPredict",
        ),
        (
            VERTEX,
            f"{GLOBAL}/count-tokens:rawPredict",
            f"https://aiplatform.googleapis.com/v1{GLOBAL}/count-tokens:rawPredict",
        ),
        (VERTEX, "/projects/other/locations/us-east5/publishers/anthropic/models/a:rawPredict", None),
        (VERTEX, "/projects/proj-1/locations/evil.com%2f/publishers/anthropic/models/a:rawPredict", None),
        (VERTEX, "/projects/proj-1/locations/us-east5/publishers/google/models/a:rawPredict", None),
        (VERTEX, "/projects/proj-1/locations/us-east5/publishers/anthropic/models/../../x:rawPredict", None),
        (VERTEX, "/projects/proj-1/locations/us-east5/publishers/anthropic/models/a:rawPredict?x=1", None),
        (
            {**BEDROCK, **ACCESS_KEY},
            "/model/us.anthropic.claude-x-v1%3A0/invoke-with-response-stream",
            "https://bedrock-runtime.us-east-1.amazonaws.com/model/us.anthropic.claude-x-v1%3A0/invoke-with-response-stream",
        ),
        (
            {**BEDROCK, **ACCESS_KEY},
            f"/model/{ARN}/invoke",
            f"https://bedrock-runtime.us-east-1.amazonaws.com/model/{ARN}/invoke",
        ),
        ({**BEDROCK, **ACCESS_KEY}, "/model/a/../b/invoke", None),
        ({**BEDROCK, **ACCESS_KEY}, "/model/..%2F..%2Fx/invoke", None),
        ({**BEDROCK, **ACCESS_KEY}, "/model/a/converse", None),
        ({**BEDROCK, **ACCESS_KEY}, "/inference-profiles", None),
        (
            {**FOUNDRY, "ANTHROPIC_FOUNDRY_API_KEY": SECRET},
            "/v1/messages?beta=true",
            "https://res-1.services.ai.azure.com/anthropic/v1/messages?beta=true",
        ),
        ({**FOUNDRY, "ANTHROPIC_FOUNDRY_API_KEY": SECRET}, "/v1/files", None),
    ],
)
def test_only_requests_to_the_model_are_allowed(variables: Mapping[str, str], path: str, target: str | None) -> None:
    """The same credential gives access to much more, so nothing else passes."""
    api = cloud(variables)
    assert api is not None
    assert target == api.target("POST", path)
    assert api.target("DELETE", path) is None


# --- the settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"CLAUDE_CODE_USE_VERTEX": "1"},
            "CLAUDE_CODE_USE_VERTEX needs ANTHROPIC_VERTEX_PROJECT_ID and CLOUD_ML_REGION.",
        ),
        ({"CLAUDE_CODE_USE_BEDROCK": "1"}, "CLAUDE_CODE_USE_BEDROCK needs AWS_REGION."),
        (
            BEDROCK,
            "CLAUDE_CODE_USE_BEDROCK needs AWS_BEARER_TOKEN_BEDROCK, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: ",
        ),
        (
            {"CLAUDE_CODE_USE_FOUNDRY": "true"},
            "CLAUDE_CODE_USE_FOUNDRY needs ANTHROPIC_FOUNDRY_RESOURCE or ANTHROPIC_FOUNDRY_BASE_URL.",
        ),
        (FOUNDRY, "CLAUDE_CODE_USE_FOUNDRY needs ANTHROPIC_FOUNDRY_API_KEY or ANTHROPIC_FOUNDRY_AUTH_TOKEN: "),
        ({"CLAUDE_CODE_USE_VERTEX": "maybe"}, "CLAUDE_CODE_USE_VERTEX must be 1 or 0"),
    ],
)
def test_incomplete_settings_are_an_error(variables: Mapping[str, str], message: str) -> None:
    """The error says what is needed. A credential that could not be kept from the agent is refused."""
    with pytest.raises(ConfigError) as caught:
        cloud(variables)
    assert caught.value.message.startswith(message)


def test_operator_may_expose_the_credential() -> None:
    """Then the agent has the variables of the cloud, and sends its requests there itself. They are redacted nevertheless."""
    profile = {"AWS_PROFILE": "default", "AWS_CONFIG_FILE": "/etc/aws", "AWS_SESSION_TOKEN": SECRET}
    api = cloud({**BEDROCK, **profile, "PATH": "/bin", "CCRUN_EXPOSE_CLOUD_CREDENTIALS": "1"})
    assert api is not None
    assert {**BEDROCK, **profile} == api.variables("http://127.0.0.1:1", Secret("run-token"))
    assert (Secret(SECRET),) == api.secrets


def test_no_cloud_is_the_default() -> None:
    """A flag that is switched off counts as not set."""
    assert cloud({"CLAUDE_CODE_USE_BEDROCK": "0"}) is None
