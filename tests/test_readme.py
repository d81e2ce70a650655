"""README.md is true: its Python runs, its generated tables are up to date."""

from __future__ import annotations

import re

import pytest

from diffeff.eval.readme import ROOT, update

TEXT = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL))
def test_python_blocks_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})
    assert "engaged" in capsys.readouterr().out


def test_generated_parts_are_up_to_date() -> None:
    assert update(TEXT) == TEXT, "run `python -m diffeff.eval.readme`"


def test_pictures_exist() -> None:
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT):
        assert (ROOT / path).is_file()
