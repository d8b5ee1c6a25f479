"""Commands for logins, projects, APIs and secrets."""

# ruff: noqa: D103 - the functions are named after the commands and resources.

from __future__ import annotations

import sys

from .project import STATE, Call, create, delete, fail, get, resource_key

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def auth_list(call: Call) -> Any:
    return [{"account": STATE["account"]}] if STATE["account"] else []


def auth_print_identity_token(call: Call) -> Any:
    if not STATE["account"]:
        fail("You do not currently have an active account selected.")
    return "made-up-identity-token\n"


def auth_configure_docker(call: Call) -> Any:
    return ""


def projects_describe(call: Call) -> Any:
    return get(resource_key("project", call.names[0]))


def billing_projects_describe(call: Call) -> Any:
    return {"billingEnabled": get(resource_key("project", call.names[0]))["billed"]}


def services_list(call: Call) -> Any:
    return [{"config": {"name": name}} for name in STATE["services"]]


def services_enable(call: Call) -> Any:
    STATE["services"] = sorted({*STATE["services"], *call.names})


# --- secrets -----------------------------------------------------------------------------------------------------------


def secret_key(call: Call) -> Any:
    return resource_key("secret", call.get("secret") or call.names[0])


def secret_create(call: Call) -> Any:
    create(secret_key(call), {"name": f"projects/1/secrets/{call.names[0]}", "versions": []})


def secret_add_version(call: Call) -> Any:
    if call["data-file"] != "-":
        fail("The stand-in reads secrets from standard input only.")
    get(secret_key(call))["versions"].append(sys.stdin.read())


def secret_access(call: Call) -> Any:
    versions = get(secret_key(call))["versions"]
    if not versions:
        fail(f"NOT_FOUND: Secret [{secret_key(call)}/versions/latest] not found.")
    return versions[-1]


COMMANDS = {
    "auth list": (0, "filter", auth_list),
    "auth print-identity-token": (0, "audiences", auth_print_identity_token),
    "auth configure-docker": (1, "", auth_configure_docker),
    "projects describe": (1, "", projects_describe),
    "billing projects describe": (1, "", billing_projects_describe),
    "services list": (0, "enabled", services_list),
    "services enable": (None, "", services_enable),
    "secrets describe": (1, "", lambda call: get(secret_key(call))),
    "secrets create": (1, "replication-policy", secret_create),
    "secrets delete": (1, "", lambda call: delete(secret_key(call))),
    "secrets versions add": (1, "data-file", secret_add_version),
    "secrets versions access": (1, "secret", secret_access),
}
