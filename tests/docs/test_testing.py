from __future__ import annotations

import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "testing.md"


async def test_example_for_users_passes() -> None:
    """The example test of the document passes with a real service and the real CLI."""
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102 - a document of this repository
    test = names["test_summary_is_requested"]
    assert callable(test)
    await test()
