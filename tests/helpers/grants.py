"""Grants in the state of the gcloud stand-in, and those that docs/permissions.md documents."""

from __future__ import annotations

import re
from typing import Any, Final, TypeAlias

from helpers.deploy import BUCKET, BUCKET_NAME, JOB, KEY, PROJECT, ROOT, account

DOCUMENT: Final = ROOT / "docs" / "permissions.md"

#: Member, role, resource and condition.
Grant: TypeAlias = tuple[str, str, str, str]


def grants(state: dict[str, Any]) -> set[Grant]:
    """Return all grants in a state."""
    return {
        (member, binding["role"], resource, binding.get("condition", {}).get("expression", ""))
        for resource, policy in state["policies"].items()
        for binding in policy["bindings"]
        for member in binding["members"]
    }


def documented_roles() -> dict[str, list[str]]:
    """Return the documented custom roles and their permissions."""
    rows = re.findall(r"(?m)^\| `(ccrun[A-Z]\w+)` \| ([^|]+) \|$", DOCUMENT.read_text())
    return {role: sorted(re.findall(r"`([^`]+)`", permissions)) for role, permissions in rows}


def documented_grants() -> set[Grant]:
    """Return the documented grants."""
    text = DOCUMENT.read_text()
    conditions = dict(re.findall(r"(?m)^([A-Z]+_[A-Z]+) +(\S.*)$", text))
    resources = {"the bucket": BUCKET, "the key": KEY, "the job": JOB}
    found, identity = set(), ""
    section = text.partition("\n## Grants\n")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| (?:`(ccrun-\w+)`)? ?\| `([\w./]+)` \| (the \w+) \| (.+) \|$", section)
    for name, role, resource, condition in rows:
        # A row without an identity belongs to the one above.
        identity = name or identity
        full_role = role if "/" in role else f"projects/{PROJECT}/roles/{role}"
        names = [] if condition == "none" else condition.strip("`").split(" && ")
        expression = " && ".join(conditions[each] for each in names).replace("BUCKET", BUCKET_NAME)
        found.add((f"serviceAccount:{account(identity)}", full_role, resources[resource], expression))
    return found
