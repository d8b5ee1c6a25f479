"""The model API of a task: where it is, and what authenticates requests to it."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import Final, Protocol

import attrs
from multidict import CIMultiDict

from ccrun.errors import CredentialUnusable
from ccrun.task import Secret

#: The API needs it for an OAuth token. The CLI sends it only when it has such a token.
OAUTH_BETA: Final = "oauth-2025-04-20"

#: The headers of the agent that are forwarded. Others could make a gateway ignore its rules (`X-Original-URL`).
_FORWARDED: Final = re.compile(
    r"accept|content-(?:type|length|encoding)|user-agent|x-app|x-client-request-id|(anthropic|x-stainless|x-claude)-.+",
    re.IGNORECASE,
)
_CREDENTIAL: Final = re.compile(r"[!-~]+")

#: The requests that the agent may send, as in the request line. The same host and credential give access to much more (files,
#: sessions, batches, the administration of the organization), so this is an allowlist. It is matched before anything is decoded:
#: `..`, `%2e`, `//` and absolute URIs do not match.
_ALLOWED: Final = re.compile(
    r"(?:POST /v1/messages(?:/count_tokens)?|GET /v1/models(?:/[A-Za-z0-9][A-Za-z0-9._:@-]*)?)(?:\?[!\"$-~]*)?"
)


class ModelApi(Protocol):
    """A model API with its credential."""

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """What must not reach the agent."""

    @property
    def signs_body(self) -> bool:
        """Whether `headers` needs the body."""

    @property
    def repeats_rejected(self) -> bool:
        """Whether the CLI repeats a request with status 401 or 403 for minutes, since it wants to refresh its credential."""

    def variables(self, proxy_url: str, run_token: Secret) -> dict[str, str]:
        """Return the variables with which the CLI sends its requests to the proxy, with the run token."""

    def target(self, method: str, path: str) -> str | None:
        """Return the URL for a request of the agent; None if the agent may not send it.

        Args:
            path: The path of the request as it was sent, not decoded, with its query.
        """

    async def headers(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> CIMultiDict[str]:
        """Return the headers to forward, with the real credential instead of the agent's.

        Args:
            body: Empty unless `signs_body`.
        """


def forwarded_headers(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Return the headers of the agent that any model API gets."""
    forwarded = CIMultiDict((name, value) for name, value in headers.items() if _FORWARDED.fullmatch(name))
    # An uncompressed response can be redacted, and no gateway needs to buffer it.
    forwarded["Accept-Encoding"] = "identity"
    return forwarded


class CredentialKind(enum.StrEnum):
    """The kind of a credential: the header that has it."""

    API_KEY = "api_key"
    OAUTH = "oauth"
    #: A token of a gateway.
    BEARER = "bearer"


def _without_slash(url: str) -> str:
    return url.rstrip("/")


@attrs.frozen(kw_only=True)
class Upstream:
    """A model API.

    Args:
        url: Its base URL, as in `ANTHROPIC_BASE_URL`.
        credential: The real credential.
        custom_headers: The operator's additional headers. Their values may be secrets.

    Raises:
        CredentialUnusable: The credential cannot be part of a header.
    """

    url: str = attrs.field(converter=_without_slash)
    credential: Secret
    kind: CredentialKind
    custom_headers: tuple[tuple[str, Secret], ...] = ()

    def __attrs_post_init__(self) -> None:
        if _CREDENTIAL.fullmatch(self.credential.reveal()) is None:
            raise CredentialUnusable

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """What must not reach the agent."""
        return (self.credential, *(value for _, value in self.custom_headers))

    @property
    def signs_body(self) -> bool:
        """Whether `headers` needs the body."""
        return False

    @property
    def repeats_rejected(self) -> bool:
        """Whether the CLI repeats a request with a rejected credential."""
        return False

    def variables(self, proxy_url: str, run_token: Secret) -> dict[str, str]:
        """Return the variables of the agent. With an OAuth token, the CLI sends other requests."""
        is_oauth = self.kind is CredentialKind.OAUTH
        name = "CLAUDE_CODE_OAUTH_TOKEN" if is_oauth else "ANTHROPIC_API_KEY"
        return {"ANTHROPIC_BASE_URL": proxy_url, name: run_token.reveal()}

    def target(self, method: str, path: str) -> str | None:
        """Return the URL of an allowed request."""
        return f"{self.url}{path}" if _ALLOWED.fullmatch(f"{method} {path}") else None

    async def headers(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> CIMultiDict[str]:
        """Return the headers to forward, with the real credential instead of the agent's."""
        forwarded = forwarded_headers(headers)
        if self.kind is CredentialKind.API_KEY:
            forwarded["X-Api-Key"] = self.credential.reveal()
        else:
            forwarded["Authorization"] = f"Bearer {self.credential.reveal()}"
        if self.kind is CredentialKind.OAUTH and OAUTH_BETA not in ",".join(forwarded.getall("Anthropic-Beta", [])):
            forwarded.add("Anthropic-Beta", OAUTH_BETA)
        for name, value in self.custom_headers:
            forwarded[name] = value.reveal()
        return forwarded
