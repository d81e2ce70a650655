"""The documents: bench rows when there are any, old rows or a word on how to measure when there are none."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bench_rows import bench_rows, matrix_rows, scaling_rows

from diffeff.eval.render.docs import PAGES, ROOT, draw, headline, update
from diffeff.eval.render.records import cells


def _results(folder: Path) -> Path:
    rows = {
        "bench": [*bench_rows(run="old", samples=False), *bench_rows(samples=False)],
        "scaling": scaling_rows(),
        "matrix": matrix_rows(),
    }
    for name, entries in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in entries), "utf-8")
    return folder


def _part(text: str, name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, flags=re.DOTALL)
    assert found is not None
    return found[1]


def test_benchmarks_page_from_rows(tmp_path: Path) -> None:
    page = update((ROOT / "docs" / "benchmarks.md").read_text("utf-8"), _results(tmp_path))
    part = _part(page, "bench-sprites-wan")
    assert "![sprites-wan: speed-up against PSNR](images/bench-sprites-wan.png)" in part
    assert '| <a id="sprites-wan-balanced"></a>balanced | 2.27' in part
    assert "diffeff bench sprites-wan --against fewer-steps --prompts 50" in part
    assert "| what happened |" in part
    assert part.count("| <a id=") == len(bench_rows())  # each arm of one run, once
    assert "Not measured yet" in _part(page, "bench-sprites-sd")
    assert "1.30 [1.24, 1.37]" in _part(page, "scaling")
    assert "too few" not in _part(page, "matrix")
    assert "no attention of 1024 tokens or more" in _part(page, "matrix")
    assert update(page, tmp_path) == page


def test_readme_shows_the_headline_arms_linked_to_their_lines(tmp_path: Path) -> None:
    text = "<!-- trade-sprites-wan -->\n<!-- /trade-sprites-wan -->"
    part = update(text, _results(tmp_path))
    whole = update("<!-- bench-sprites-wan -->\n<!-- /bench-sprites-wan -->", tmp_path)
    anchors = set(re.findall(r'<a id="([^"]+)">', whole))
    links = re.findall(r"\(docs/benchmarks\.md#([^)]+)\)", part)
    assert "sprites-wan-balanced" in links
    assert set(links) <= anchors
    assert len(links) == len(set(links)) == len(headline(cells(bench_rows())))


def test_headline_has_presets_and_their_nearest_rivals() -> None:
    labels = [cell.label for cell in headline(cells(bench_rows()))]
    assert labels[:4] == ["plain", "high", "balanced", "fast"]
    assert "fewer steps, 12 steps" in labels  # nearest to balanced
    assert "cache-dit DBCache, threshold 0.2" in labels
    assert not [label for label in labels if "feature_cache" in label]
    assert len(labels) < 20


def test_a_model_without_rows_says_how_to_measure_it(tmp_path: Path) -> None:
    text = "<!-- trade-sprites-wan -->\n<!-- /trade-sprites-wan -->"
    assert "Not measured yet: `diffeff bench sprites-wan" in update(text, tmp_path)


def test_every_plot_of_the_page_is_drawn(tmp_path: Path) -> None:
    results = _results(tmp_path)
    page = update((ROOT / "docs" / "benchmarks.md").read_text("utf-8"), results)
    shown = {Path(name).name for name in re.findall(r"!\[[^\]]*\]\((images/[^)]+)\)", page)}
    drawn = {path.name for path in draw(tmp_path / "images", results)}
    assert shown == drawn
    assert len(drawn) == 5


def test_pages_exist() -> None:
    assert all((ROOT / name).is_file() for name in PAGES)
