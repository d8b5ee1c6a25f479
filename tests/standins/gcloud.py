"""A stand-in for `gcloud`: it keeps a project in a file, notes each call, and refuses what the real one refuses.

The file that GCLOUD_STANDIN names holds the state as JSON; beside it, `.calls` gets a line a call: its words, its input, what it
showed. Commands and flags are those of gcloud 528; where that is installed, a test compares.
"""

# ruff: noqa: D103 - they are named after the commands and the things that they are of.

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

# It is started hundreds of times: what a test of the scripts takes is what this file takes to begin.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

FILE = Path(os.environ["GCLOUD_STANDIN"])
STATE: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))

#: Of the command that is called.
WORDS: list[str] = []
GLOBAL = {"project", "quiet", "format", "flatten"}
#: Also as --no-…
SWITCHES = {
    "uniform-bucket-level-access", "public-access-prevention", "clear-soft-delete", "versioning", "dry-run", "recursive",
    "primary", "clear-secrets", "allow-unauthenticated", "cpu-throttling", "enabled",
}  # fmt: skip
#: What must be enabled for a command: by its first word.
APIS = {
    "storage": "storage",
    "kms": "cloudkms",
    "secrets": "secretmanager",
    "iam": "iam",
    "artifacts": "artifactregistry",
}
APIS |= {"builds": "cloudbuild", "run": "run", "scheduler": "cloudscheduler"}
READS = (
    "describe",
    "list",
    "list-cleanup-policies",
    "get-iam-policy",
    "access",
    "print-identity-token",
    "configure-docker",
)


def fail(message: str, status: int = 1) -> NoReturn:
    sys.stderr.write(f"ERROR: (gcloud.{'.'.join(WORDS)}) {message}\n")
    note()
    sys.exit(status)


def missing(what: str) -> NoReturn:
    fail(f"NOT_FOUND: {what} not found.")


def note(resource: Any = None, output: str | None = None) -> None:
    """Keep the call, and what it showed of what."""
    entry = {"argv": sys.argv[1:], "reads": WORDS[-1] in READS, "resource": resource, "output": output}
    with FILE.with_suffix(".calls").open("a", encoding="utf-8") as calls:
        calls.write(json.dumps(entry) + "\n")


# --- what the resources are -------------------------------------------------------------------------------------------


class Command:
    """The words, the names and the flags of a call."""

    def __init__(self, flags: dict[str, Any], names: list[str]) -> None:
        self.flags, self.names = flags, names

    def __getitem__(self, flag: str) -> Any:
        return self.flags[flag]

    def get(self, flag: str, default: Any = None) -> Any:
        return self.flags.get(flag, default)


def key(kind: str, *names: str) -> str:
    return "/".join((kind, *names))


def found(key_: str, what: str | None = None) -> Any:
    resource = STATE["resources"].get(key_)
    if resource is None:
        missing(what or key_)
    return resource


def put(key_: str, resource: Any) -> None:
    if key_ in STATE["resources"]:
        fail(f"ALREADY_EXISTS: {key_} already exists.")
    STATE["resources"][key_] = resource


def drop(key_: str) -> None:
    found(key_)
    del STATE["resources"][key_]
    STATE["policies"].pop(key_, None)


# --- services, projects, logins ----------------------------------------------------------------------------------------


def auth_list(call: Command) -> Any:
    return [{"account": STATE["account"]}] if STATE["account"] else []


def auth_print_identity_token(call: Command) -> Any:
    if not STATE["account"]:
        fail("You do not currently have an active account selected.")
    return "made-up-identity-token\n"


def auth_configure_docker(call: Command) -> Any:
    return ""


def projects_describe(call: Command) -> Any:
    return found(key("project", call.names[0]))


def billing_projects_describe(call: Command) -> Any:
    return {"billingEnabled": found(key("project", call.names[0]))["billed"]}


def services_list(call: Command) -> Any:
    return [{"config": {"name": name}} for name in STATE["services"]]


def services_enable(call: Command) -> Any:
    STATE["services"] = sorted({*STATE["services"], *call.names})


# --- storage -----------------------------------------------------------------------------------------------------------


def bucket_key(call: Command) -> Any:
    if not call.names[0].startswith("gs://"):
        fail("gs:// is missing")
    return key("bucket", call.names[0].removeprefix("gs://"))


def bucket_describe(call: Command) -> Any:
    return found(bucket_key(call), f"gs://{call.names[0]} not found: 404")


def bucket_set(bucket: dict[str, Any], call: Command) -> None:
    if "uniform-bucket-level-access" in call.flags:
        bucket["uniform_bucket_level_access"] = True
    if "public-access-prevention" in call.flags:
        bucket["public_access_prevention"] = "enforced"
    if "soft-delete-duration" in call.flags:
        bucket["soft_delete_policy"] = {"retentionDurationSeconds": call["soft-delete-duration"]}
    if "clear-soft-delete" in call.flags:
        bucket["soft_delete_policy"] = {"retentionDurationSeconds": "0"}
    if "versioning" in call.flags:
        bucket["versioning_enabled"] = call["versioning"]
    if "lifecycle-file" in call.flags:
        bucket["lifecycle_config"] = json.loads(Path(call["lifecycle-file"]).read_text())["lifecycle"]


def bucket_create(call: Command) -> Any:
    bucket = {"name": call.names[0].removeprefix("gs://"), "location": call["location"].upper()}
    # What a bucket has that nobody asked for.
    bucket |= {"uniform_bucket_level_access": False, "soft_delete_policy": {"retentionDurationSeconds": "604800"}}
    bucket_set(bucket, call)
    put(bucket_key(call), bucket)


def bucket_update(call: Command) -> Any:
    bucket_set(bucket_describe(call), call)


def storage_rm(call: Command) -> Any:
    drop(bucket_key(call))


# --- keys --------------------------------------------------------------------------------------------------------------


def ring_key(call: Command) -> Any:
    return key("ring", call["location"], call.names[0])


def kms_key(call: Command) -> Any:
    found(key("ring", call["location"], call["keyring"]))
    return key("key", call["location"], call["keyring"], call.get("key") or call.names[0])


def rotation(resource: dict[str, Any], call: Command) -> None:
    if "rotation-period" in call.flags:
        resource["rotationPeriod"] = f"{int(call['rotation-period'].removesuffix('d')) * 86400}s"
        resource["nextRotationTime"] = call["next-rotation-time"]


def key_create(call: Command) -> Any:
    if call["purpose"] != "encryption":
        fail("purpose?")
    resource = {"purpose": "ENCRYPT_DECRYPT", "primary": {"state": "ENABLED"}, "versions": ["ENABLED"]}
    rotation(resource, call)
    put(kms_key(call), resource)


def key_update(call: Command) -> Any:
    rotation(found(kms_key(call)), call)


def versions_list(call: Command) -> Any:
    path = kms_key(call)
    return [{"name": f"{path}/cryptoKeyVersions/{n}", "state": s} for n, s in enumerate(found(path)["versions"], 1)]


def versions_create(call: Command) -> Any:
    resource = found(kms_key(call))
    resource["versions"].append("ENABLED")
    resource["primary"] = {"state": "ENABLED"}


def versions_destroy(call: Command) -> Any:
    resource = found(kms_key(call))
    number = int(call.names[0])
    resource["versions"][number - 1] = "DESTROY_SCHEDULED"
    if number == len(resource["versions"]):
        resource["primary"] = {"state": "DESTROY_SCHEDULED"}


# --- secrets -----------------------------------------------------------------------------------------------------------


def secret_key(call: Command) -> Any:
    return key("secret", call.get("secret") or call.names[0])


def secret_create(call: Command) -> Any:
    put(secret_key(call), {"name": f"projects/1/secrets/{call.names[0]}", "versions": []})


def secret_add(call: Command) -> Any:
    if call["data-file"] != "-":
        fail("a secret in a file")
    found(secret_key(call))["versions"].append(sys.stdin.read())


def secret_access(call: Command) -> Any:
    versions = found(secret_key(call))["versions"]
    if not versions:
        missing(f"Secret [{secret_key(call)}/versions/latest]")
    return versions[-1]


# --- identities --------------------------------------------------------------------------------------------------------


def account_key(call: Command) -> Any:
    return key("account", call.names[0])


def account_create(call: Command) -> Any:
    email = f"{call.names[0]}@{PROJECT}.iam.gserviceaccount.com"
    put(key("account", email), {"email": email, "unseen": STATE["unseen"]})


def role_key(call: Command) -> Any:
    return key("role", call.names[0])


def role_describe(call: Command) -> Any:
    return found(role_key(call))


def role_create(call: Command) -> Any:
    put(role_key(call), {"includedPermissions": sorted(call["permissions"].split(","))})


def role_update(call: Command) -> Any:
    found(role_key(call))["includedPermissions"] = sorted(call["permissions"].split(","))


def role_delete(call: Command) -> Any:
    found(role_key(call))["deleted"] = True


def role_undelete(call: Command) -> Any:
    del found(role_key(call))["deleted"]


# --- images ------------------------------------------------------------------------------------------------------------


def repository_key(call: Command) -> Any:
    return key("repository", call["location"], call.names[0])


def repository_create(call: Command) -> Any:
    put(repository_key(call), {"format": call["repository-format"].upper(), "policies": []})


def cleanup_list(call: Command) -> Any:
    return found(repository_key(call))["policies"]


def cleanup_set(call: Command) -> Any:
    found(repository_key(call))["policies"] = json.loads(Path(call["policy"]).read_text())


def repository_delete(call: Command) -> Any:
    drop(repository_key(call))
    for name in [name for name in STATE["resources"] if name.startswith("image/")]:
        del STATE["resources"][name]


def image_describe(call: Command) -> Any:
    return found(key("image", call.names[0]), "Image")


def builds_submit(call: Command) -> Any:
    given = dict(pair.split("=", 1) for pair in call["substitutions"].split(","))
    images = re.findall(r"(?m)^  - (\S+)$", Path(call["config"]).read_text().partition("\nimages:\n")[2])
    assert Path(call.names[0]).read_bytes()[:2] == b"\x1f\x8b", "the source is no archive"
    for image in images:
        for name, value in given.items():
            image = image.replace("${" + name + "}", value)
        assert "$" not in image, image
        STATE["resources"][key("image", image)] = {"image_summary": {"digest": "sha256:" + f"{len(image):02x}" * 32}}


# --- what runs ---------------------------------------------------------------------------------------------------------


def pairs(text: str) -> dict[str, str]:
    separator = ","
    if text.startswith("^"):
        _, separator, text = text.split("^", 2)
    return dict(pair.split("=", 1) for pair in text.split(separator))


def container(call: Command) -> Any:
    environment: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in pairs(call["set-env-vars"]).items()
    ]
    for name, secret in pairs(call["set-secrets"]).items() if "set-secrets" in call.flags else ():
        secret, version = secret.split(":")
        found(key("secret", secret))
        environment.append({"name": name, "valueFrom": {"secretKeyRef": {"key": version, "name": secret}}})
    limits = {"cpu": call["cpu"], "memory": call["memory"]}
    made: dict[str, Any] = {"env": environment, "image": call["image"], "name": "", "resources": {"limits": limits}}
    return made | ({"args": call["args"].split(",")} if call.get("args") else {})


def act_as(call: Command) -> Any:
    found(key("account", call["service-account"]), f"Service account {call['service-account']}")


def job_key(call: Command) -> Any:
    return key("job", call["region"], call.names[0])


def job_deploy(call: Command) -> Any:
    act_as(call)
    task = {"containers": [container(call)], "maxRetries": int(call["max-retries"])}
    task |= {"serviceAccountName": call["service-account"], "timeoutSeconds": call["task-timeout"].removesuffix("s")}
    execution = {"parallelism": int(call["parallelism"]), "taskCount": int(call["tasks"]), "template": {"spec": task}}
    STATE["resources"][job_key(call)] = {"metadata": {"name": call.names[0]}, "spec": {"template": {"spec": execution}}}


def job_describe(call: Command) -> Any:
    return STATE["resources"].get(job_key(call)) or fail(f"Cannot find job [{call.names[0]}].")


def service_key(call: Command) -> Any:
    return key("service", call["region"], call.names[0])


def probe(text: str) -> dict[str, Any]:
    given = pairs(text)
    path = given.pop("httpGet.path")
    return {"httpGet": {"path": path}} | {name: int(value) for name, value in given.items()}


def service_deploy(call: Command) -> Any:
    act_as(call)
    made = container(call) | {
        "startupProbe": probe(call["startup-probe"]),
        "livenessProbe": probe(call["liveness-probe"]),
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


def service_describe(call: Command) -> Any:
    return STATE["resources"].get(service_key(call)) or fail(f"Cannot find service [{call.names[0]}].")


def schedule_key(call: Command) -> Any:
    return key("schedule", call["location"], call.names[0])


def schedule_set(call: Command) -> Any:
    act_as(Command({"service-account": call["oauth-service-account-email"]}, []))
    target = {"uri": call["uri"], "httpMethod": call["http-method"]}
    target |= {"oauthToken": {"serviceAccountEmail": call["oauth-service-account-email"]}}
    return {"schedule": call["schedule"], "timeZone": call["time-zone"], "httpTarget": target, "state": "ENABLED"}


def schedule_create(call: Command) -> Any:
    put(schedule_key(call), schedule_set(call))


def schedule_update(call: Command) -> Any:
    found(schedule_key(call)).update(schedule_set(call))


# --- policies ----------------------------------------------------------------------------------------------------------


def condition_of(call: Command) -> Any:
    text = call.get("condition")
    if text in (None, "None"):
        return None
    return pairs(text)


def policy(path: str) -> Any:
    found(path)
    return STATE["policies"].setdefault(path, {"bindings": []})


def add_binding(path: str, call: Command) -> None:
    bindings = policy(path)["bindings"]
    condition, role, member = condition_of(call), call["role"], call["member"]
    if "condition" not in call.flags and any("condition" in binding for binding in bindings):
        fail("Adding a binding without specifying a condition to a policy containing conditions is prohibited.")
    if member.startswith("serviceAccount:") and member.endswith(f"@{PROJECT}.iam.gserviceaccount.com"):
        account = STATE["resources"].get(key("account", member.partition(":")[2]))
        if account is None or account["unseen"] > 0:
            if account:
                account["unseen"] -= 1
                save()
            fail(f"INVALID_ARGUMENT: Service account {member.partition(':')[2]} does not exist.")
    if role.startswith("projects/"):
        custom = STATE["resources"].get(key("role", role.rpartition("/")[2]))
        if custom is None or custom.get("deleted"):
            fail(f"INVALID_ARGUMENT: Role {role} is not supported for this resource.")
    binding = next((b for b in bindings if b["role"] == role and b.get("condition") == condition), None)
    if binding is None:
        binding = {"role": role, "members": []} | ({"condition": condition} if condition else {})
        bindings.append(binding)
    binding["members"].append(member)


def remove_binding(path: str, call: Command) -> None:
    bindings = policy(path)["bindings"]
    for binding in bindings:
        if binding["role"] == call["role"] and binding.get("condition") == condition_of(call):
            binding["members"].remove(call["member"])
            break
    else:
        fail("Policy binding with the specified principal, role, and condition not found!")
    policy(path)["bindings"] = [binding for binding in bindings if binding["members"]]


def on_policy_of(path_of: Callable[[Command], str], do: Callable[[str, Command], Any]) -> Callable[[Command], Any]:
    return lambda call: do(path_of(call), call)


# --- the commands ------------------------------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[int | None, str, Callable[[Command], Any]]] = {
    "auth list": (0, "filter", auth_list),
    "auth print-identity-token": (0, "audiences", auth_print_identity_token),
    "auth configure-docker": (1, "", auth_configure_docker),
    "projects describe": (1, "", projects_describe),
    "billing projects describe": (1, "", billing_projects_describe),
    "services list": (0, "enabled", services_list),
    "services enable": (None, "", services_enable),
    "storage buckets describe": (1, "", bucket_describe),
    "storage buckets create": (1, "location uniform-bucket-level-access public-access-prevention soft-delete-duration lifecycle-file", bucket_create),  # noqa: E501
    "storage buckets update": (1, "uniform-bucket-level-access public-access-prevention clear-soft-delete versioning lifecycle-file", bucket_update),  # noqa: E501
    "storage rm": (1, "recursive", storage_rm),
    "kms keyrings describe": (1, "location", lambda call: found(ring_key(call))),
    "kms keyrings create": (1, "location", lambda call: put(ring_key(call), {"name": call.names[0]})),
    "kms keys describe": (1, "keyring location", lambda call: found(kms_key(call))),
    "kms keys create": (1, "keyring location purpose rotation-period next-rotation-time", key_create),
    "kms keys update": (1, "keyring location rotation-period next-rotation-time", key_update),
    "kms keys versions list": (0, "key keyring location", versions_list),
    "kms keys versions create": (0, "key keyring location primary", versions_create),
    "kms keys versions destroy": (1, "key keyring location", versions_destroy),
    "secrets describe": (1, "", lambda call: found(secret_key(call))),
    "secrets create": (1, "replication-policy", secret_create),
    "secrets delete": (1, "", lambda call: drop(secret_key(call))),
    "secrets versions add": (1, "data-file", secret_add),
    "secrets versions access": (1, "secret", secret_access),
    "iam service-accounts describe": (1, "", lambda call: found(account_key(call), "Unknown service account")),
    "iam service-accounts create": (1, "display-name description", account_create),
    "iam service-accounts delete": (1, "", lambda call: drop(account_key(call))),
    "iam roles describe": (1, "", role_describe),
    "iam roles create": (1, "title description permissions stage", role_create),
    "iam roles update": (1, "permissions", role_update),
    "iam roles delete": (1, "", role_delete),
    "iam roles undelete": (1, "", role_undelete),
    "artifacts repositories describe": (1, "location", lambda call: found(repository_key(call))),
    "artifacts repositories create": (1, "location repository-format description", repository_create),
    "artifacts repositories list-cleanup-policies": (1, "location", cleanup_list),
    "artifacts repositories set-cleanup-policies": (1, "location policy dry-run", cleanup_set),
    "artifacts repositories delete": (1, "location", repository_delete),
    "artifacts docker images describe": (1, "", image_describe),
    "builds submit": (1, "config substitutions service-account", builds_submit),
    "run jobs describe": (1, "region", job_describe),
    "run jobs deploy": (1, "region image args service-account memory cpu tasks parallelism task-timeout set-env-vars max-retries set-secrets clear-secrets", job_deploy),  # noqa: E501
    "run jobs delete": (1, "region", lambda call: drop(job_key(call))),
    "run deploy": (1, "region image service-account allow-unauthenticated ingress execution-environment memory cpu concurrency timeout min-instances max-instances startup-probe liveness-probe set-env-vars clear-secrets cpu-throttling", service_deploy),  # noqa: E501
    "run services describe": (1, "region", service_describe),
    "run services delete": (1, "region", lambda call: drop(service_key(call))),
    "scheduler jobs describe": (1, "location", lambda call: found(schedule_key(call))),
    "scheduler jobs create http": (1, "location schedule time-zone uri http-method oauth-service-account-email attempt-deadline max-retry-attempts", schedule_create),  # noqa: E501
    "scheduler jobs update http": (1, "location schedule time-zone uri http-method oauth-service-account-email attempt-deadline max-retry-attempts", schedule_update),  # noqa: E501
    "scheduler jobs delete": (1, "location", lambda call: drop(schedule_key(call))),
}  # fmt: skip
POLICIES = {
    "storage buckets": ("", "condition", bucket_key),
    "kms keys": ("keyring location", "condition", kms_key),
    "secrets": ("", "condition", secret_key),
    "run jobs": ("region", "", job_key),
    "run services": ("region", "condition", service_key),
}
for kind, (flags, condition, path_of) in POLICIES.items():
    change = f"{flags} member role {condition}"
    COMMANDS[f"{kind} get-iam-policy"] = (1, flags, on_policy_of(path_of, lambda path, _: policy(path)))
    COMMANDS[f"{kind} add-iam-policy-binding"] = (1, change, on_policy_of(path_of, add_binding))
    COMMANDS[f"{kind} remove-iam-policy-binding"] = (1, change, on_policy_of(path_of, remove_binding))


# --- how it is called, and what it shows -------------------------------------------------------------------------------


def parse(argv: list[str]) -> Command:
    """Return the words of the command, its names and its flags."""
    words = next((argv[:n] for n in (4, 3, 2) if " ".join(argv[:n]) in COMMANDS), argv[:3])
    WORDS[:] = words
    if " ".join(words) not in COMMANDS:
        fail(f"Invalid choice: {argv}", 2)
    count, own, _ = COMMANDS[" ".join(words)]
    allowed = {*own.split(), *GLOBAL}
    flags, names = {}, []
    for word in argv[len(words) :]:
        if not word.startswith("--"):
            names.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        is_no = name.startswith("no-") and name[3:] in SWITCHES
        name = name[3:] if is_no else name
        if name not in allowed or (name in SWITCHES or name == "quiet") == bool(equals):
            fail(f"unrecognized arguments: {word}", 2)
        flags[name] = value if equals else not is_no
    if count is not None and len(names) != count:
        fail(f"{count} names, not {names}", 2)
    return Command(flags, names)


def steps(path: str) -> list[str | int]:
    """Return the parts of a key of a projection: names, and numbers in brackets."""
    found = re.findall(r"'([^']+)'|([A-Za-z_][A-Za-z0-9_-]*)|\[(\d+)\]", path)
    return [int(number) if number else quoted or plain for quoted, plain, number in found]


def at(resource: Any, path: str) -> Any:
    for step in steps(path):
        if isinstance(step, int):
            resource = resource[step] if isinstance(resource, list) and len(resource) > step else None
        else:
            resource = resource.get(step) if isinstance(resource, dict) else None
    return resource


def flattened(resource: Any, path: str) -> Iterator[Any]:
    """Yield the resource once for each element of that list, with the element in place of the list."""
    *above, last = steps(path)
    elements = at(resource, path)
    if not isinstance(elements, list):
        # As gcloud has it: what has no such list is shown as a row of nothing.
        yield None
        return
    for element in elements:
        copy = json.loads(json.dumps(resource))
        holder = copy
        for step in above:
            holder = holder[step]
        holder[last] = element
        yield copy


def spelled(value: Any) -> str:
    if value is None:
        return ""
    return ";".join(map(str, value)) if isinstance(value, list) else str(value)


def show(call: Command, resource: Any) -> str:
    """Return what --format asks for."""
    rows = resource if isinstance(resource, list) else [resource]
    path = ""
    for part in call.get("flatten", "").split("[]")[:-1]:
        path += part
        rows = [row for each in rows for row in flattened(each, path)]
    match = re.fullmatch(r"value(?:\[separator=['\"](.)['\"]\])?\((.*)\)", call["format"])
    if match is None:
        fail(f"not a projection of this stand-in: {call['format']}", 2)
    separator, paths = match.groups()
    lines = ((separator or "\t").join(spelled(at(row, path)) for path in paths.split(",")) for row in rows)
    return "".join(f"{line}\n" for line in lines)


def save() -> None:
    FILE.write_text(json.dumps(STATE), encoding="utf-8")


CALL = parse(sys.argv[1:])
PROJECT = CALL.get("project")
COMMAND = " ".join(WORDS)
for refused, permission in STATE["denied"].items():
    if COMMAND == refused:
        fail(
            f"[{STATE['account']}] does not have permission to access this.\nPERMISSION_DENIED: "
            f"Permission '{permission}' denied on resource (or it may not exist)."
        )
if WORDS[0] != "auth" and (not PROJECT or PROJECT != STATE["project"]):
    fail(f"PERMISSION_DENIED: {STATE['account']} does not have permission to access projects instance [{PROJECT}].")
if WORDS[0] in APIS and f"{APIS[WORDS[0]]}.googleapis.com" not in STATE["services"]:
    fail(f"PERMISSION_DENIED: {APIS[WORDS[0]]} API has not been used in project {PROJECT} before or it is disabled.")
RESULT = COMMANDS[COMMAND][2](CALL)
if WORDS[-1] not in READS:
    save()
    note()
elif "format" in CALL.flags:
    OUTPUT = show(CALL, RESULT)
    sys.stdout.write(OUTPUT)
    note(RESULT, OUTPUT)
else:
    # What these answer is text.
    sys.stdout.write(RESULT)
    note()
