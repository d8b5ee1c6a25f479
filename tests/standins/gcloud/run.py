"""Commands for Cloud Run jobs and services, and for Cloud Scheduler."""

# ruff: noqa: D103 - the functions are named after the commands and resources.

from __future__ import annotations

from .project import STATE, Call, create, delete, fail, get, parse_pairs, resource_key

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def container(call: Call) -> Any:
    environment: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in parse_pairs(call["set-env-vars"]).items()
    ]
    for name, secret in parse_pairs(call["set-secrets"]).items() if "set-secrets" in call.flags else ():
        secret, version = secret.split(":")
        get(resource_key("secret", secret))
        environment.append({"name": name, "valueFrom": {"secretKeyRef": {"key": version, "name": secret}}})
    limits = {"cpu": call["cpu"], "memory": call["memory"]}
    made: dict[str, Any] = {"env": environment, "image": call["image"], "name": "", "resources": {"limits": limits}}
    return made | ({"args": call["args"].split(",")} if call.get("args") else {})


def check_account(email: str) -> None:
    get(resource_key("account", email), f"Service account {email}")


# --- jobs --------------------------------------------------------------------------------------------------------------


def job_key(call: Call) -> Any:
    return resource_key("job", call["region"], call.names[0])


def job_deploy(call: Call) -> Any:
    check_account(call["service-account"])
    task = {"containers": [container(call)], "maxRetries": int(call["max-retries"])}
    task |= {"serviceAccountName": call["service-account"], "timeoutSeconds": call["task-timeout"].removesuffix("s")}
    execution = {"parallelism": int(call["parallelism"]), "taskCount": int(call["tasks"]), "template": {"spec": task}}
    STATE["resources"][job_key(call)] = {"metadata": {"name": call.names[0]}, "spec": {"template": {"spec": execution}}}


def job_describe(call: Call) -> Any:
    return STATE["resources"].get(job_key(call)) or fail(f"Cannot find job [{call.names[0]}].")


# --- services ----------------------------------------------------------------------------------------------------------


def service_key(call: Call) -> Any:
    return resource_key("service", call["region"], call.names[0])


def parse_probe(text: str) -> dict[str, Any]:
    fields = parse_pairs(text)
    path = fields.pop("httpGet.path")
    return {"httpGet": {"path": path}} | {name: int(value) for name, value in fields.items()}


def service_deploy(call: Call) -> Any:
    check_account(call["service-account"])
    made = container(call) | {
        "startupProbe": parse_probe(call["startup-probe"]),
        "livenessProbe": parse_probe(call["liveness-probe"]),
    }
    annotations = {
        "autoscaling.knative.dev/maxScale": call["max-instances"],
        "run.googleapis.com/cpu-throttling": str(call["cpu-throttling"]),
        "run.googleapis.com/execution-environment": call["execution-environment"],
    }
    if call["min-instances"] != "0":
        annotations["autoscaling.knative.dev/minScale"] = call["min-instances"]
    spec = {"containerConcurrency": int(call["concurrency"]), "containers": [made]}
    spec |= {"serviceAccountName": call["service-account"], "timeoutSeconds": int(call["timeout"].removesuffix("s"))}
    STATE["resources"][service_key(call)] = {
        "metadata": {"name": call.names[0], "annotations": {"run.googleapis.com/ingress": call["ingress"]}},
        "spec": {"template": {"metadata": {"annotations": annotations}, "spec": spec}},
        "status": {"url": f"https://{call.names[0]}-made-up.a.run.app"},
    }


def service_describe(call: Call) -> Any:
    return STATE["resources"].get(service_key(call)) or fail(f"Cannot find service [{call.names[0]}].")


# --- schedules ---------------------------------------------------------------------------------------------------------


def schedule_key(call: Call) -> Any:
    return resource_key("schedule", call["location"], call.names[0])


def schedule(call: Call) -> Any:
    email = call["oauth-service-account-email"]
    check_account(email)
    target = {"uri": call["uri"], "httpMethod": call["http-method"], "oauthToken": {"serviceAccountEmail": email}}
    return {"schedule": call["schedule"], "timeZone": call["time-zone"], "httpTarget": target, "state": "ENABLED"}


def schedule_create(call: Call) -> Any:
    create(schedule_key(call), schedule(call))


def schedule_update(call: Call) -> Any:
    get(schedule_key(call)).update(schedule(call))


_JOB_FLAGS = (
    "region image args service-account memory cpu tasks parallelism task-timeout set-env-vars max-retries "
    "set-secrets clear-secrets"
)
_SERVICE_FLAGS = (
    "region image service-account allow-unauthenticated ingress execution-environment memory cpu concurrency "
    "timeout min-instances max-instances startup-probe liveness-probe set-env-vars clear-secrets cpu-throttling"
)
_SCHEDULE_FLAGS = (
    "location schedule time-zone uri http-method oauth-service-account-email attempt-deadline max-retry-attempts"
)
COMMANDS = {
    "run jobs describe": (1, "region", job_describe),
    "run jobs deploy": (1, _JOB_FLAGS, job_deploy),
    "run jobs delete": (1, "region", lambda call: delete(job_key(call))),
    "run deploy": (1, _SERVICE_FLAGS, service_deploy),
    "run services describe": (1, "region", service_describe),
    "run services delete": (1, "region", lambda call: delete(service_key(call))),
    "scheduler jobs describe": (1, "location", lambda call: get(schedule_key(call))),
    "scheduler jobs create http": (1, _SCHEDULE_FLAGS, schedule_create),
    "scheduler jobs update http": (1, _SCHEDULE_FLAGS, schedule_update),
    "scheduler jobs delete": (1, "location", lambda call: delete(schedule_key(call))),
}
