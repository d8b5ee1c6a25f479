from __future__ import annotations

import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "testing.md"


async def test_the_example_for_users_passes() -> None:
    """The test that the document shows runs against a real service and a real CLI."""
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102 - our own document
    test = names["test_summary_is_requested"]
    assert callable(test)
    await test()
