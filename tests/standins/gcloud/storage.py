"""Commands for buckets, KMS keys, image repositories and builds."""

# ruff: noqa: D103 - the functions are named after the commands and resources.

from __future__ import annotations

import json
import re
from pathlib import Path

from .project import STATE, Call, create, delete, fail, get, resource_key

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


# --- buckets -----------------------------------------------------------------------------------------------------------


def bucket_key(call: Call) -> Any:
    if not call.names[0].startswith("gs://"):
        fail(f"The URL of the bucket must begin with gs://: {call.names[0]}")
    return resource_key("bucket", call.names[0].removeprefix("gs://"))


def bucket_describe(call: Call) -> Any:
    return get(bucket_key(call), f"gs://{call.names[0]} not found: 404")


def set_bucket_flags(bucket: dict[str, Any], call: Call) -> None:
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


def bucket_create(call: Call) -> Any:
    bucket = {"name": call.names[0].removeprefix("gs://"), "location": call["location"].upper()}
    # The defaults of a new bucket.
    bucket |= {"uniform_bucket_level_access": False, "soft_delete_policy": {"retentionDurationSeconds": "604800"}}
    set_bucket_flags(bucket, call)
    create(bucket_key(call), bucket)


def bucket_update(call: Call) -> Any:
    set_bucket_flags(bucket_describe(call), call)


def storage_rm(call: Call) -> Any:
    delete(bucket_key(call))


# --- keys --------------------------------------------------------------------------------------------------------------


def ring_key(call: Call) -> Any:
    return resource_key("ring", call["location"], call.names[0])


def ring_create(call: Call) -> Any:
    create(ring_key(call), {"name": call.names[0]})


def kms_key(call: Call) -> Any:
    get(resource_key("ring", call["location"], call["keyring"]))
    return resource_key("key", call["location"], call["keyring"], call.get("key") or call.names[0])


def set_rotation(key: dict[str, Any], call: Call) -> None:
    if "rotation-period" in call.flags:
        key["rotationPeriod"] = f"{int(call['rotation-period'].removesuffix('d')) * 86400}s"
        key["nextRotationTime"] = call["next-rotation-time"]


def key_create(call: Call) -> Any:
    if call["purpose"] != "encryption":
        fail(f"The stand-in has no keys with the purpose {call['purpose']}.")
    key = {"purpose": "ENCRYPT_DECRYPT", "primary": {"state": "ENABLED"}, "versions": ["ENABLED"]}
    set_rotation(key, call)
    create(kms_key(call), key)


def key_update(call: Call) -> Any:
    set_rotation(get(kms_key(call)), call)


def versions_list(call: Call) -> Any:
    name = kms_key(call)
    return [{"name": f"{name}/cryptoKeyVersions/{n}", "state": s} for n, s in enumerate(get(name)["versions"], 1)]


def versions_create(call: Call) -> Any:
    key = get(kms_key(call))
    key["versions"].append("ENABLED")
    key["primary"] = {"state": "ENABLED"}


def versions_destroy(call: Call) -> Any:
    key = get(kms_key(call))
    number = int(call.names[0])
    key["versions"][number - 1] = "DESTROY_SCHEDULED"
    if number == len(key["versions"]):
        key["primary"] = {"state": "DESTROY_SCHEDULED"}


# --- images ------------------------------------------------------------------------------------------------------------


def repository_key(call: Call) -> Any:
    return resource_key("repository", call["location"], call.names[0])


def repository_create(call: Call) -> Any:
    create(repository_key(call), {"format": call["repository-format"].upper(), "policies": []})


def repository_delete(call: Call) -> Any:
    delete(repository_key(call))
    for name in [name for name in STATE["resources"] if name.startswith("image/")]:
        del STATE["resources"][name]


def list_cleanup_policies(call: Call) -> Any:
    return get(repository_key(call))["policies"]


def set_cleanup_policies(call: Call) -> Any:
    get(repository_key(call))["policies"] = json.loads(Path(call["policy"]).read_text())


def image_describe(call: Call) -> Any:
    return get(resource_key("image", call.names[0]), "Image")


def builds_submit(call: Call) -> Any:
    substitutions = dict(pair.split("=", 1) for pair in call["substitutions"].split(","))
    images = re.findall(r"(?m)^  - (\S+)$", Path(call["config"]).read_text().partition("\nimages:\n")[2])
    assert Path(call.names[0]).read_bytes()[:2] == b"\x1f\x8b", "the source is not a gzip archive"
    for image in images:
        for name, value in substitutions.items():
            image = image.replace("${" + name + "}", value)
        assert "$" not in image, image
        digest = "sha256:" + f"{len(image):02x}" * 32
        STATE["resources"][resource_key("image", image)] = {"image_summary": {"digest": digest}}


COMMANDS = {
    "storage buckets describe": (1, "", bucket_describe),
    "storage buckets create": (
        1,
        "location uniform-bucket-level-access public-access-prevention soft-delete-duration lifecycle-file",
        bucket_create,
    ),
    "storage buckets update": (
        1,
        "uniform-bucket-level-access public-access-prevention clear-soft-delete versioning lifecycle-file",
        bucket_update,
    ),
    "storage rm": (1, "recursive", storage_rm),
    "kms keyrings describe": (1, "location", lambda call: get(ring_key(call))),
    "kms keyrings create": (1, "location", ring_create),
    "kms keys describe": (1, "keyring location", lambda call: get(kms_key(call))),
    "kms keys create": (1, "keyring location purpose rotation-period next-rotation-time", key_create),
    "kms keys update": (1, "keyring location rotation-period next-rotation-time", key_update),
    "kms keys versions list": (0, "key keyring location", versions_list),
    "kms keys versions create": (0, "key keyring location primary", versions_create),
    "kms keys versions destroy": (1, "key keyring location", versions_destroy),
    "artifacts repositories describe": (1, "location", lambda call: get(repository_key(call))),
    "artifacts repositories create": (1, "location repository-format description", repository_create),
    "artifacts repositories list-cleanup-policies": (1, "location", list_cleanup_policies),
    "artifacts repositories set-cleanup-policies": (1, "location policy dry-run", set_cleanup_policies),
    "artifacts repositories delete": (1, "location", repository_delete),
    "artifacts docker images describe": (1, "", image_describe),
    "builds submit": (1, "config substitutions service-account", builds_submit),
}
