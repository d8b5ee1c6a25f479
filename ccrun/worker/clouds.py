"""The model APIs of clouds: Vertex AI, Amazon Bedrock and Microsoft Foundry, with the operator's credential.

The CLI sends its requests without a credential to the proxy, which knows them by the run token in their path. What is said about
the CLI here was observed with version 2.1.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import attrs
from multidict import CIMultiDict

from ccrun.config import Config
from ccrun.errors import ConfigError
from ccrun.task import Secret
from ccrun.worker.sigv4 import AwsCredential, signed_headers
from ccrun.worker.upstream import CredentialKind, ModelApi, Upstream, forwarded_headers

#: The characters of regions, projects and models. `..`, `%2e`, `//` and queries do not match.
_NAME: Final = "[A-Za-z0-9_-]+"
_MODEL: Final = "[A-Za-z0-9_@-]+(?:[.:][A-Za-z0-9_@-]+)*"

#: The variables of the worker by which the CLI finds a cloud and its credential, and those of them that are secrets.
_CLOUD_VARIABLES: Final = re.compile(
    r"(?:AWS|AZURE|ANTHROPIC_BEDROCK|ANTHROPIC_FOUNDRY)_\w+|CLAUDE_CODE_USE_(?:BEDROCK|FOUNDRY)"
)
_SECRET: Final = re.compile(r"SECRET|TOKEN|KEY$|PASSWORD")

#: Returns an access token.
GetToken = Callable[[], Awaitable[str | None]]


@attrs.frozen(kw_only=True)
class Vertex:
    """Claude on Vertex AI.

    See https://docs.cloud.google.com/vertex-ai/generative-ai/docs/partner-models/claude.

    Args:
        region: The region of models for which the CLI has no other.
        base_url: The URL of a gateway; None for Google's.
        get_token: Returns an access token of the service account.
    """

    project: str
    region: str
    base_url: str | None
    get_token: GetToken = attrs.field(repr=False)
    signs_body: bool = attrs.field(default=False, init=False)
    repeats_rejected: bool = attrs.field(default=True, init=False)
    secrets: tuple[Secret, ...] = attrs.field(default=(), init=False)

    def variables(self, proxy_url: str, run_token: Secret) -> dict[str, str]:
        """Return the variables of the agent."""
        return {
            "CLAUDE_CODE_USE_VERTEX": "1",
            "CLAUDE_CODE_SKIP_VERTEX_AUTH": "1",
            "ANTHROPIC_VERTEX_BASE_URL": f"{proxy_url}/{run_token.reveal()}",
            "ANTHROPIC_VERTEX_PROJECT_ID": self.project,
            "CLOUD_ML_REGION": self.region,
        }

    def target(self, method: str, path: str) -> str | None:
        """Return the URL of an allowed request."""
        match = re.fullmatch(
            rf"/projects/{re.escape(self.project)}/locations/({_NAME})/publishers/anthropic/models/"
            rf"{_MODEL}:(?:streamRawPredict|rawPredict)",
            path,
        )
        if match is None or method != "POST":
            return None
        host = "aiplatform.googleapis.com" if match[1] == "global" else f"{match[1]}-aiplatform.googleapis.com"
        return f"{self.base_url or f'https://{host}/v1'}{path}"

    async def headers(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> CIMultiDict[str]:
        """Return the headers to forward, with an access token."""
        forwarded = forwarded_headers(headers)
        forwarded["Authorization"] = f"Bearer {await self.get_token()}"
        return forwarded


@attrs.frozen(kw_only=True)
class Bedrock:
    """Claude on Amazon Bedrock.

    See https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_InvokeModel.html.

    Args:
        base_url: The URL of a gateway; None for Amazon's.
        credential: An access key, or a bearer token of Bedrock.
    """

    region: str
    base_url: str | None
    credential: AwsCredential | Secret = attrs.field(repr=False)
    repeats_rejected: bool = attrs.field(default=True, init=False)

    @property
    def signs_body(self) -> bool:
        """Whether a request is signed with its body."""
        return isinstance(self.credential, AwsCredential)

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """What must not reach the agent."""
        if isinstance(self.credential, Secret):
            return (self.credential,)
        return tuple(filter(None, (self.credential.secret_access_key, self.credential.session_token)))

    def variables(self, proxy_url: str, run_token: Secret) -> dict[str, str]:
        """Return the variables of the agent."""
        return {
            "CLAUDE_CODE_USE_BEDROCK": "1",
            "CLAUDE_CODE_SKIP_BEDROCK_AUTH": "1",
            "ANTHROPIC_BEDROCK_BASE_URL": f"{proxy_url}/{run_token.reveal()}",
            "AWS_REGION": self.region,
        }

    def target(self, method: str, path: str) -> str | None:
        """Return the URL of an allowed request."""
        # A model may be given by its ARN, whose slashes and colons are encoded.
        model = r"(?:[A-Za-z0-9_:-]|\.(?!\.)|%3A|%2F(?!\.))+"
        allowed = rf"/model/{model}/(?:invoke|invoke-with-response-stream|count-tokens)"
        if method != "POST" or re.fullmatch(allowed, path, re.IGNORECASE) is None:
            return None
        return f"{self.base_url or f'https://bedrock-runtime.{self.region}.amazonaws.com'}{path}"

    async def headers(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> CIMultiDict[str]:
        """Return the headers to forward, with a signature or the bearer token."""
        forwarded = forwarded_headers(headers)
        if isinstance(self.credential, Secret):
            forwarded["Authorization"] = f"Bearer {self.credential.reveal()}"
            return forwarded
        forwarded.popall("Content-Length", None)
        signed = {name: forwarded[name] for name in ("Accept", "Content-Type") if name in forwarded}
        forwarded.update(
            signed_headers(
                self.credential,
                method=method,
                url=url,
                headers=signed,
                body=body,
                service="bedrock",
                region=self.region,
                at=dt.datetime.now(dt.UTC),
            )
        )
        return forwarded


@attrs.frozen(kw_only=True)
class Foundry:
    """Claude on Microsoft Foundry, whose requests are those of the model API.

    Args:
        api: The API, with an API key or a bearer token.
    """

    api: Upstream
    repeats_rejected: bool = attrs.field(default=False, init=False)

    @property
    def signs_body(self) -> bool:
        """Whether a request is signed with its body."""
        return False

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """What must not reach the agent."""
        return self.api.secrets

    def variables(self, proxy_url: str, run_token: Secret) -> dict[str, str]:
        """Return the variables of the agent."""
        return {
            "CLAUDE_CODE_USE_FOUNDRY": "1",
            "ANTHROPIC_FOUNDRY_BASE_URL": proxy_url,
            "ANTHROPIC_FOUNDRY_API_KEY": run_token.reveal(),
        }

    def target(self, method: str, path: str) -> str | None:
        """Return the URL of an allowed request."""
        return self.api.target(method, path)

    async def headers(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> CIMultiDict[str]:
        """Return the headers to forward, with the key or the token."""
        return await self.api.headers(method, url, headers, body)


@attrs.frozen(kw_only=True)
class Exposed:
    """A cloud whose credential the agent has, since the operator wants it: the CLI sends its requests there itself.

    Args:
        environment: The variables of the worker that the agent gets.
    """

    environment: Mapping[str, str] = attrs.field(repr=False)
    signs_body: bool = attrs.field(default=False, init=False)
    repeats_rejected: bool = attrs.field(default=False, init=False)

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """What is redacted nevertheless."""
        return tuple(Secret(value) for name, value in self.environment.items() if _SECRET.search(name))

    def variables(self, proxy_url: str, run_token: Secret) -> dict[str, str]:
        """Return the variables of the agent."""
        return dict(self.environment)

    def target(self, method: str, path: str) -> str | None:
        """Return None: no request comes to the proxy."""
        return None

    async def headers(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> CIMultiDict[str]:
        """Return the headers to forward."""
        return forwarded_headers(headers)


def open_cloud(config: Config, inherited: Mapping[str, str], get_token: GetToken | None) -> ModelApi | None:
    """Return the cloud that an operator uses, None for the model API of Anthropic or a gateway to it.

    Args:
        inherited: The environment of the worker.
        get_token: Returns an access token of Google's.

    Raises:
        ConfigError: A setting is missing, or the credential cannot be kept from the agent.
    """
    if config.expose_cloud_credentials and (config.use_bedrock or config.use_foundry):
        return Exposed(
            environment={name: value for name, value in inherited.items() if _CLOUD_VARIABLES.fullmatch(name)}
        )
    if config.use_vertex:
        project = config.anthropic_vertex_project_id or config.project_id
        if project is None or config.cloud_ml_region is None or get_token is None:
            raise ConfigError("CLAUDE_CODE_USE_VERTEX needs ANTHROPIC_VERTEX_PROJECT_ID and CLOUD_ML_REGION.")
        return Vertex(
            project=project,
            region=config.cloud_ml_region,
            base_url=config.anthropic_vertex_base_url,
            get_token=get_token,
        )
    if config.use_bedrock:
        return _bedrock(config)
    if config.use_foundry:
        return _foundry(config)
    return None


def check_cloud(config: Config, inherited: Mapping[str, str]) -> None:
    """Check the settings of a cloud, without its credentials of Google's.

    Raises:
        ConfigError: See `open_cloud`.
    """

    async def no_token() -> str | None:
        return None

    open_cloud(config, inherited, no_token)


_KEPT: Final = (
    "others could not be kept from the agent. To give them to it nevertheless, set CCRUN_EXPOSE_CLOUD_CREDENTIALS=1."
)


def _bedrock(config: Config) -> Bedrock:
    if config.aws_region is None:
        raise ConfigError("CLAUDE_CODE_USE_BEDROCK needs AWS_REGION.")
    credential: AwsCredential | Secret
    if config.aws_bearer_token_bedrock is not None:
        credential = config.aws_bearer_token_bedrock
    elif config.aws_access_key_id is not None and config.aws_secret_access_key is not None:
        credential = AwsCredential(
            access_key_id=config.aws_access_key_id,
            secret_access_key=config.aws_secret_access_key,
            session_token=config.aws_session_token,
        )
    else:
        raise ConfigError(
            "CLAUDE_CODE_USE_BEDROCK needs AWS_BEARER_TOKEN_BEDROCK, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: "
            f"{_KEPT}"
        )
    return Bedrock(region=config.aws_region, base_url=config.anthropic_bedrock_base_url, credential=credential)


def _foundry(config: Config) -> Foundry:
    url = config.anthropic_foundry_base_url
    if url is None:
        if config.anthropic_foundry_resource is None:
            raise ConfigError("CLAUDE_CODE_USE_FOUNDRY needs ANTHROPIC_FOUNDRY_RESOURCE or ANTHROPIC_FOUNDRY_BASE_URL.")
        url = f"https://{config.anthropic_foundry_resource}.services.ai.azure.com/anthropic"
    if config.anthropic_foundry_api_key is not None:
        credential, kind = config.anthropic_foundry_api_key, CredentialKind.API_KEY
    elif config.anthropic_foundry_auth_token is not None:
        credential, kind = config.anthropic_foundry_auth_token, CredentialKind.BEARER
    else:
        raise ConfigError(
            f"CLAUDE_CODE_USE_FOUNDRY needs ANTHROPIC_FOUNDRY_API_KEY or ANTHROPIC_FOUNDRY_AUTH_TOKEN: {_KEPT}"
        )
    return Foundry(api=Upstream(url=url, credential=credential, kind=kind))
