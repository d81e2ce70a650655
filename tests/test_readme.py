"""README.md and docs/benchmarks.md are true: Python runs, generated parts are up to date, links lead somewhere."""

from __future__ import annotations

import re

import pytest

from diffeff.errors import UnknownName
from diffeff.eval.render.docs import PAGES, ROOT, update

TEXT = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL))
def test_python_blocks_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})
    assert "engaged" in capsys.readouterr().out


@pytest.mark.parametrize("name", PAGES)
def test_generated_parts_are_up_to_date(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    assert update(text) == text, "run `python -m diffeff.eval.render.docs`"


def test_a_marker_nobody_fills_is_named() -> None:
    with pytest.raises(UnknownName, match=r"'bench-sprites-wam'.*bench-sprites-wan"):
        update("<!-- bench-sprites-wam -->\n<!-- /bench-sprites-wam -->")


@pytest.mark.parametrize("name", PAGES)
def test_pictures_exist(name: str) -> None:
    page = ROOT / name
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text("utf-8")):
        assert (page.parent / path).is_file(), f"{name} shows {path}: run `python -m diffeff.eval.render.docs`"


def test_links_into_the_benchmarks_lead_to_a_line() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    headings = {
        re.sub(r"[^a-z0-9]+", "-", title.lower()) for title in re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    }
    targets = headings | set(re.findall(r'<a id="([^"]+)">', page))
    for target in re.findall(r"\(docs/benchmarks\.md#([^)]+)\)", TEXT):
        assert target in targets
