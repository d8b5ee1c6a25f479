"""The model API of a task: where it is, and what authenticates requests to it."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import Final

import attrs
from multidict import CIMultiDict

from ccrun.errors import CcrunError, CredentialUnusable
from ccrun.spec import TaskSpec
from ccrun.task import Secret
from ccrun.worker.dependencies import WorkerDependencies

#: The API needs it for an OAuth token. The CLI sends it only when it has such a token.
OAUTH_BETA: Final = "oauth-2025-04-20"

#: The headers of the agent that are forwarded. Others could make a gateway ignore its rules (`X-Original-URL`).
_FORWARDED: Final = re.compile(
    r"accept|content-(?:type|length|encoding)|user-agent|x-app|x-client-request-id|(anthropic|x-stainless|x-claude)-.+",
    re.IGNORECASE,
)
_CREDENTIAL: Final = re.compile(r"[!-~]+")


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

    def headers(self, headers: Mapping[str, str]) -> CIMultiDict[str]:
        """Return the headers to forward, with the real credential instead of the agent's."""
        forwarded = CIMultiDict((name, value) for name, value in headers.items() if _FORWARDED.fullmatch(name))
        # An uncompressed response can be redacted, and no gateway needs to buffer it.
        forwarded["Accept-Encoding"] = "identity"
        if self.kind is CredentialKind.API_KEY:
            forwarded["X-Api-Key"] = self.credential.reveal()
        else:
            forwarded["Authorization"] = f"Bearer {self.credential.reveal()}"
        if self.kind is CredentialKind.OAUTH and OAUTH_BETA not in ",".join(forwarded.getall("Anthropic-Beta", [])):
            forwarded.add("Anthropic-Beta", OAUTH_BETA)
        for name, value in self.custom_headers:
            forwarded[name] = value.reveal()
        return forwarded


def choose_upstream(deps: WorkerDependencies, spec: TaskSpec) -> Upstream:
    """Return the model API of a task, with the credential of the request, else with the operator's.

    A bearer token comes before an API key, and that before an OAuth token, as in the CLI. The operator's credential and headers
    are for the operator's model API alone.

    Raises:
        CcrunError: There is no credential.
    """
    url = deps.upstream if spec.anthropic_base_url is None else spec.anthropic_base_url
    is_operators = url == deps.upstream
    own = (
        (spec.anthropic_auth_token, CredentialKind.BEARER),
        (spec.anthropic_api_key, CredentialKind.API_KEY),
        (spec.anthropic_oauth_token, CredentialKind.OAUTH),
    )
    operators = (
        (deps.auth_token, CredentialKind.BEARER),
        (deps.api_key, CredentialKind.API_KEY),
        (deps.oauth_token, CredentialKind.OAUTH),
    )
    for credential, kind in (*own, *(operators if is_operators else ())):
        if credential is not None:
            headers = deps.custom_headers if is_operators else ()
            return Upstream(url=url, credential=credential, kind=kind, custom_headers=headers)
    raise CcrunError("There is no credential for the model API: neither the request nor the worker has one.")
