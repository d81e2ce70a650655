"""The examples of the pages on methods run, each page from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["caching.md", "kernels.md", "memory.md"])
def test_examples_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for number, code in enumerate(blocks):
        exec(compile(code, f"{page}, example {number + 1}", "exec"), names)
    assert capsys.readouterr().out
