"""Pages: sound HTML, everything escaped, nothing loaded, and the facts in them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_rows import bench_rows, evaluation, matrix_rows, scaling_rows
from html_check import Page

from diffeff.errors import ConfigError
from diffeff.eval.render import inline as inlining
from diffeff.eval.render.markup import element
from diffeff.eval.render.page import bench_page, evaluation_page
from diffeff.eval.render.scatter import ticks
from diffeff.media import write

ROWS = bench_rows()
WHOLE = bench_page([*ROWS, *bench_rows("sprites-sd"), *scaling_rows(), *matrix_rows()])


def test_the_whole_page_is_sound_and_says_what_matters() -> None:
    page = Page(WHOLE)
    for words in (
        "2.40x as fast as plain",
        "51.0 dB [50.4, 51.6], worst 43.0",
        "96 % [86, 99]",
        "Best with fewer steps:",
        "Fewer steps is also better than diffusers FirstBlockCache (4 of 4 settings)",
        "Ran and changed nothing: diffusers TaylorSeer",
        "apply: AttributeError: 'WanPipeline' object has no attribute 'unet'",
        "does nothing here: its results are plain's",
        "diffeff bench sprites-wan --against fewer-steps --prompts 50",
        "1.30 [1.24, 1.37]",
        "no attention of 1024 tokens or more",
    ):
        assert words in page.text, words


def test_messages_cannot_break_the_page() -> None:
    rows = bench_rows()
    for row in rows:
        row["arm"]["label"] += ' <script>alert(1)</script> "quoted" & more'
    page = Page(bench_page(rows))
    assert len(page.all("script")) == 1
    assert '<script>alert(1)</script> "quoted" & more' in page.text
    assert "<b>raw</b>" in page.text


def test_nothing_but_the_rows_is_needed_and_they_survive_json() -> None:
    assert bench_page(json.loads(json.dumps(ROWS))) == bench_page(ROWS)


def test_every_point_links_to_its_row_and_has_words() -> None:
    page = Page(bench_page(ROWS))
    dots = page.all("a", class_="dot")
    rated = [row for row in ROWS if row["status"] == "ok" and not row["noop"] and row["arm"]["kind"] != "plain"]
    assert len(dots) == len(rated)
    rows = {found["id"] for found in page.all("tr") if found.get("id")}
    assert {(dot["href"] or "")[1:] for dot in dots} <= rows
    assert all("x plain's speed" in (dot["data-tip"] or "") and dot["aria-label"] for dot in dots)


def test_tables_can_be_sorted_by_every_column() -> None:
    page = Page(bench_page(ROWS))
    heads = page.all("th", scope="col")
    assert len(heads) == len(page.all("th", aria_sort="none") or heads)
    assert all(head["aria-sort"] == "none" for head in heads)
    assert sum(1 for found in page.all("td") if found.get("colspan")) == 3  # two failed and one refused
    values = [found["data-value"] for found in page.all("td") if found.get("data-value")]
    assert "2.27" in values


def test_clips_are_in_the_page_with_their_number_of_frames() -> None:
    page = Page(bench_page(ROWS))
    figures = page.all("figure")
    assert len(figures) == sum(1 for row in ROWS if row["samples"])
    assert all((found["style"] or "").startswith("--n:9;--ratio:32/32") for found in figures)
    assert page.all("p", class_="controls")
    without = Page(bench_page(bench_rows(samples=False)))
    assert not without.all("figure")


def test_a_run_of_failures_only_still_makes_a_page() -> None:
    rows = [row for row in bench_rows() if row["status"] != "ok" or row["arm"]["kind"] == "plain"]
    page = Page(bench_page(rows))
    assert not page.all("a", class_="dot")
    assert "No arm was faster than plain" in page.text
    assert "Fewer steps was not measured" in page.text


def test_points_that_failed_are_named() -> None:
    rows = scaling_rows()
    rows[0]["failed"] = [{"value": 16384, "error": "OutOfMemoryError: 24 GiB"}]
    assert "16384 failed: OutOfMemoryError: 24 GiB" in Page(bench_page(rows)).text


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_is_sound() -> None:
    done = subprocess.run(
        ["node", "--check", "-"], input=Page(WHOLE).raw["script"], text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rows", [scaling_rows(), matrix_rows()])
def test_scaling_and_matrix_alone(rows: list[dict[str, Any]]) -> None:
    assert len(Page(bench_page(rows)).all("section")) == 1


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to show"):
        bench_page([])


def test_only_one_newest_run_is_shown() -> None:
    old = bench_rows(run="old")
    for row in old:
        row["arm"]["label"] += " stale"
    assert "stale" not in bench_page([*old, *ROWS])


def test_the_browser_is_told_to_load_nothing() -> None:
    policy = Page(WHOLE).all("meta", http_equiv="Content-Security-Policy") or Page(WHOLE).all("meta")
    assert any("default-src 'none'" in (found.get("content") or "") for found in policy)
    assert "prefers-color-scheme:dark" in WHOLE
    assert "@media print" in WHOLE


# --- diffeff eval ---------------------------------------------------------------------------------------------------
def test_an_evaluation_says_verdicts_numbers_and_notes() -> None:
    page = Page(evaluation_page(evaluation()))
    for words in (
        "Evaluation of sprites-wan with plan balanced",
        "gate failed fails if fid>1 : fid is 1.234",
        "against sprites-wan, plain · 200 prompts of sprites",
        "PSNR 56.9 dB: practically identical to plain.",
        "56.9 dB",
        "55.9 to 57.8",
        "FID-sprites: 200 items: FID is biased upwards; KID is not",
        "97.5 %",
        "identical",
        "motion <px>",
        "cd" * 32,
    ):
        assert words in page.text, words


def test_numbers_are_compared_with_the_reference_by_their_intervals() -> None:
    report = evaluation()
    own = {"metric": "clip", "label": "CLIP-sprites", "unit": "", "better": "higher", "n": 200, "interval": None}
    own |= {"features": None, "notes": [], "infinite": False, "value": 81.0}
    gap = {"value": -1.0, "low": -1.5, "high": -0.5}
    report["results"] = [own | {"details": {"reference": {"value": 82.0, "n": 200}, "difference": gap}}]
    said = Page(evaluation_page(report)).text
    assert "CLIP-sprites: 81 is worse than the reference's 82, difference -1 [-1.5, -0.5]." in said
    report["results"][0]["details"]["difference"] = gap | {"high": 0.5}
    said = Page(evaluation_page(report)).text
    assert "No clear difference to the reference: CLIP-sprites." in said
    assert "no clear difference" in said


def test_samples_are_put_into_the_page_side_by_side(tmp_path: Path) -> None:
    clip = np.zeros((3, 16, 16, 3), np.uint8)
    report = evaluation()
    report["samples"] = [
        {"name": "0001", "prompt": "a <red> circle", "subject": str(write(tmp_path / "a.gif", clip)),
         "reference": str(write(tmp_path / "b.mp4", clip))},
        {"name": "0002", "prompt": None, "subject": str(tmp_path / "gone.png"), "reference": None},
    ]  # fmt: skip
    page = Page(evaluation_page(report))
    assert (page.all("img")[0]["src"] or "").startswith("data:image/gif;base64,")
    assert page.all("img", class_="tiny")
    assert (page.all("video")[0]["src"] or "").startswith("data:video/mp4;base64,")
    assert "a <red> circle" in page.text
    assert "gone.png is gone or cannot be shown" in page.text


def test_large_files_are_reduced(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (2, 500, 400, 3), np.uint8)
    found = inlining.inline(write(tmp_path / "a.gif", noise), limit=1000)
    assert found is not None
    assert found.uri.startswith("data:image/webp;base64,")
    assert found.note == "reduced for this page"
    assert inlining.inline(tmp_path / "none.gif") is None
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    assert inlining.inline(tmp_path / "broken.png") is None


# --- parts ----------------------------------------------------------------------------------------------------------
def test_elements_escape_and_drop() -> None:
    made = element("p", "1 < 2", None, element("br"), class_='a"b', data_value=2, hidden=True, title=None, x=0.5)
    assert made == '<p class="a&quot;b" data-value="2" hidden x="0.5">1 &lt; 2<br></p>'


@pytest.mark.parametrize(("low", "high"), [(0.9, 5.6), (31.2, 65.4), (0.0, 0.001), (-3.0, 900.0)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 12
    assert all(low <= value <= high for value in found)
