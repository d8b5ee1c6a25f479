"""Which model API a task uses, with which credential."""

from __future__ import annotations

from ccrun.errors import CcrunError
from ccrun.spec import TaskSpec
from ccrun.worker.dependencies import WorkerDependencies
from ccrun.worker.upstream import CredentialKind, ModelApi, Upstream


def choose_upstream(deps: WorkerDependencies, spec: TaskSpec) -> ModelApi:
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
    headers = deps.custom_headers if is_operators else ()
    for credential, kind in own:
        if credential is not None:
            return Upstream(url=url, credential=credential, kind=kind, custom_headers=headers)
    if is_operators and deps.cloud is not None:
        return deps.cloud
    for credential, kind in operators if is_operators else ():
        if credential is not None:
            return Upstream(url=url, credential=credential, kind=kind, custom_headers=headers)
    raise CcrunError("There is no credential for the model API: neither the request nor the worker has one.")
