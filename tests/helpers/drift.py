"""Changes to a deployed project that the scripts must undo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from helpers.deploy import BUCKET, JOB, KEY, PROJECT, SCHEDULE, SERVICE, SWEEP, account

Drift: TypeAlias = Callable[[dict[str, Any]], None]


def role_deleted(state: dict[str, Any]) -> None:
    """A role is deleted, but can be restored."""
    state["resources"]["role/ccrunAdd"]["deleted"] = True


def role_with_more_permissions(state: dict[str, Any]) -> None:
    """A role has one permission too many."""
    state["resources"]["role/ccrunList"]["includedPermissions"].append("storage.objects.delete")


def bucket_with_defaults(state: dict[str, Any]) -> None:
    """The bucket has the default settings of a new bucket."""
    bucket = state["resources"][BUCKET]
    for name in ("public_access_prevention", "lifecycle_config"):
        del bucket[name]
    bucket |= {"uniform_bucket_level_access": False, "soft_delete_policy": {"retentionDurationSeconds": "604800"}}


def grants_removed(state: dict[str, Any]) -> None:
    """The grants on the bucket and the key are removed."""
    state["policies"] = {name: policy for name, policy in state["policies"].items() if name[:3] not in ("buc", "key")}


def key_not_rotated(state: dict[str, Any]) -> None:
    """The key has no rotation."""
    del state["resources"][KEY]["rotationPeriod"], state["resources"][KEY]["nextRotationTime"]


def job_with_retries(state: dict[str, Any]) -> None:
    """The job retries failed executions."""
    state["resources"][JOB]["spec"]["template"]["spec"]["template"]["spec"]["maxRetries"] = 3


def sweep_with_other_account(state: dict[str, Any]) -> None:
    """The sweep runs as another service account."""
    task = state["resources"][SWEEP]["spec"]["template"]["spec"]["template"]["spec"]
    task["serviceAccountName"] = f"1-compute@developer.gserviceaccount.com{PROJECT}"


def service_with_other_variable(state: dict[str, Any]) -> None:
    """An environment variable of the service has another value."""
    state["resources"][SERVICE]["spec"]["template"]["spec"]["containers"][0]["env"][2]["value"] = "other-project"


def service_with_other_ingress(state: dict[str, Any]) -> None:
    """The service has another ingress and no liveness probe."""
    service = state["resources"][SERVICE]
    service["metadata"]["annotations"]["run.googleapis.com/ingress"] = "internal"
    del service["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]


def schedule_with_other_account(state: dict[str, Any]) -> None:
    """The schedule runs as the worker's service account."""
    state["resources"][SCHEDULE]["httpTarget"]["oauthToken"]["serviceAccountEmail"] = account("ccrun-worker")


def image_deleted(state: dict[str, Any]) -> None:
    """One of the images is deleted."""
    image = next(name for name in state["resources"] if name.startswith("image/") and "/worker:" in name)
    del state["resources"][image]
