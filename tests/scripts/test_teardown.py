from __future__ import annotations

import pytest
from helpers.deploy import BUCKET, KEY, PROJECT, Clone
from helpers.grants import documented_grants, grants


def test_teardown_deletes_everything_but_the_data(deployed: Clone) -> None:
    """The script lists the resources and asks for confirmation. The bucket and the key remain, without any grant."""
    before = deployed.state["resources"]
    run = deployed.run("teardown.sh", stdin=f"{PROJECT}\n")
    assert 0 == run.code
    listed = run.output.partition("These stay: ")[0]
    assert listed.index("service claude-code-service") > listed.index("schedule claude-code-sweep")
    remaining = deployed.state["resources"]
    assert {"project", "bucket", "ring", "key", "role"} == {name.split("/")[0] for name in remaining}
    assert before[BUCKET] == remaining[BUCKET]
    assert all(role["deleted"] for name, role in remaining.items() if name.startswith("role/"))
    assert set() == grants(deployed.state)


def test_teardown_with_data_deletes_bucket_and_key_versions(deployed: Clone) -> None:
    """The versions of the key are scheduled for destruction, and a new deployment works afterwards."""
    run = deployed.run("teardown.sh", "--data", "--yes")
    assert 0 == run.code
    assert "the key itself can never be deleted" in run.output
    assert ["DESTROY_SCHEDULED"] == deployed.state["resources"][KEY]["versions"]
    assert BUCKET not in deployed.state["resources"]
    assert 0 == deployed.run("setup-project.sh").code
    assert ["DESTROY_SCHEDULED", "ENABLED"] == deployed.state["resources"][KEY]["versions"]
    assert documented_grants() >= grants(deployed.state)


@pytest.mark.parametrize("answer", ["", "\n", "yes\n", "another-project\n"])
def test_teardown_requires_the_project_id(deployed: Clone, answer: str) -> None:
    """With any other answer, or none, nothing is deleted."""
    run = deployed.run("teardown.sh", stdin=answer)
    assert (1, []) == (run.code, run.changes)
    assert f"That is not {PROJECT}: nothing was deleted." == run.complaints.splitlines()[-1]


def test_teardown_of_an_empty_project_succeeds(clone: Clone) -> None:
    """The script reports that there is nothing to delete, and does not ask for confirmation."""
    run = clone.run("teardown.sh")
    assert (0, []) == (run.code, run.changes)
    assert run.output.endswith("none: there is no deployment.\n")
