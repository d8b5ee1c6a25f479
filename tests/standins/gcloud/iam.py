"""Commands for service accounts, custom roles and the policies of resources."""

# ruff: noqa: D103 - the functions are named after the commands and resources.

from __future__ import annotations

from .project import STATE, Call, create, delete, fail, get, parse_pairs, resource_key, save
from .run import job_key, service_key
from .services import secret_key
from .storage import bucket_key, kms_key

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def account_key(call: Call) -> Any:
    return resource_key("account", call.names[0])


def account_create(call: Call) -> Any:
    email = f"{call.names[0]}@{call['project']}.iam.gserviceaccount.com"
    create(resource_key("account", email), {"email": email, "unseen": STATE["unseen"]})


# --- roles -------------------------------------------------------------------------------------------------------------


def role_key(call: Call) -> Any:
    return resource_key("role", call.names[0])


def role_create(call: Call) -> Any:
    create(role_key(call), {"includedPermissions": sorted(call["permissions"].split(","))})


def role_update(call: Call) -> Any:
    get(role_key(call))["includedPermissions"] = sorted(call["permissions"].split(","))


def role_delete(call: Call) -> Any:
    get(role_key(call))["deleted"] = True


def role_undelete(call: Call) -> Any:
    del get(role_key(call))["deleted"]


# --- policies ----------------------------------------------------------------------------------------------------------


def condition_of(call: Call) -> Any:
    text = call.get("condition")
    return None if text in (None, "None") else parse_pairs(text)


def policy_of(resource: str) -> Any:
    get(resource)
    return STATE["policies"].setdefault(resource, {"bindings": []})


def check_account_is_known(email: str) -> None:
    """Fail while a new account is not known to all of Google Cloud."""
    account = STATE["resources"].get(resource_key("account", email))
    if account is None or account["unseen"] > 0:
        if account:
            account["unseen"] -= 1
            save()
        fail(f"INVALID_ARGUMENT: Service account {email} does not exist.")


def add_binding(resource: str, call: Call) -> None:
    bindings = policy_of(resource)["bindings"]
    condition, role, member = condition_of(call), call["role"], call["member"]
    if "condition" not in call.flags and any("condition" in binding for binding in bindings):
        fail("Adding a binding without specifying a condition to a policy containing conditions is prohibited.")
    if member.startswith("serviceAccount:") and member.endswith(f"@{call['project']}.iam.gserviceaccount.com"):
        check_account_is_known(member.partition(":")[2])
    if role.startswith("projects/"):
        custom = STATE["resources"].get(resource_key("role", role.rpartition("/")[2]))
        if custom is None or custom.get("deleted"):
            fail(f"INVALID_ARGUMENT: Role {role} is not supported for this resource.")
    binding = next((b for b in bindings if b["role"] == role and b.get("condition") == condition), None)
    if binding is None:
        binding = {"role": role, "members": []} | ({"condition": condition} if condition else {})
        bindings.append(binding)
    binding["members"].append(member)


def remove_binding(resource: str, call: Call) -> None:
    bindings = policy_of(resource)["bindings"]
    for binding in bindings:
        if binding["role"] == call["role"] and binding.get("condition") == condition_of(call):
            binding["members"].remove(call["member"])
            break
    else:
        fail("Policy binding with the specified principal, role, and condition not found!")
    policy_of(resource)["bindings"] = [binding for binding in bindings if binding["members"]]


def on_resource(key_of: Callable[[Call], str], run: Callable[[str, Call], Any]) -> Callable[[Call], Any]:
    """Return a command that runs with the key of its resource."""
    return lambda call: run(key_of(call), call)


COMMANDS: dict[str, tuple[int | None, str, Callable[[Call], Any]]] = {
    "iam service-accounts describe": (1, "", lambda call: get(account_key(call), "Unknown service account")),
    "iam service-accounts create": (1, "display-name description", account_create),
    "iam service-accounts delete": (1, "", lambda call: delete(account_key(call))),
    "iam roles describe": (1, "", lambda call: get(role_key(call))),
    "iam roles create": (1, "title description permissions stage", role_create),
    "iam roles update": (1, "permissions", role_update),
    "iam roles delete": (1, "", role_delete),
    "iam roles undelete": (1, "", role_undelete),
}
#: Flags that name the resource, flag for a condition, key of the resource; by resource.
_WITH_POLICY: dict[str, tuple[str, str, Callable[[Call], Any]]] = {
    "storage buckets": ("", "condition", bucket_key),
    "kms keys": ("keyring location", "condition", kms_key),
    "secrets": ("", "condition", secret_key),
    "run jobs": ("region", "", job_key),
    "run services": ("region", "condition", service_key),
}
for _kind, (_flags, _condition, _key_of) in _WITH_POLICY.items():
    _binding_flags = f"{_flags} member role {_condition}"
    COMMANDS[f"{_kind} get-iam-policy"] = (1, _flags, on_resource(_key_of, lambda resource, _: policy_of(resource)))
    COMMANDS[f"{_kind} add-iam-policy-binding"] = (1, _binding_flags, on_resource(_key_of, add_binding))
    COMMANDS[f"{_kind} remove-iam-policy-binding"] = (1, _binding_flags, on_resource(_key_of, remove_binding))
