"""Plots: they can be written, are the same every time, and no label covers another or a point."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from bench_rows import bench_rows, matrix_rows, scaling_rows

from diffeff.errors import ConfigError, MissingExtra
from diffeff.eval.render import plots
from diffeff.eval.render.records import cells
from diffeff.eval.render.speed_plot import speed_psnr
from diffeff.eval.render.style import place

CELLS = cells(bench_rows(samples=False))
DRAWINGS: dict[str, Callable[[], Any]] = {
    "speed": lambda: speed_psnr(CELLS, "speed"),
    "memory": lambda: plots.memory_bars(CELLS, "memory"),
    "adherence": lambda: plots.adherence_bars(CELLS[:6], "adherence"),
    "scaling": lambda: plots.scaling(scaling_rows(), "scaling"),
    "matrix": lambda: plots.matrix_map(matrix_rows(), "matrix"),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_plots_are_written_and_the_same_every_time(name: str, tmp_path: Path) -> None:
    one = plots.save(DRAWINGS[name](), tmp_path / "one.png").read_bytes()
    two = plots.save(DRAWINGS[name](), tmp_path / "two.png").read_bytes()
    assert one[:4] == b"\x89PNG"
    assert one == two
    assert not list(tmp_path.glob(".*"))


def test_labels_of_the_speed_plot_do_not_overlap() -> None:
    figure = speed_psnr(CELLS, "speed")
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    (axes,) = figure.axes
    texts = [text for text in axes.texts if text.get_text() != "exact"]
    assert {"high", "balanced", "fast", "fewer steps"} <= {text.get_text() for text in texts}
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert not any(one.overlaps(two) for one, two in combinations(boxes, 2))
    spots = [axes.transData.transform((c.speed.value, c.psnr.value)) for c in CELLS if c.rated and c.speed and c.psnr]
    assert not any(box.contains(*spot) for box in boxes for spot in spots)


def test_identical_clips_stand_above_all_others() -> None:
    rows = bench_rows(samples=False)
    rows[1]["fidelity"] = dict(rows[0]["fidelity"])
    figure = speed_psnr(cells(rows), "speed")
    assert "exact" in [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: speed_psnr(CELLS[:1], ""),
        lambda: plots.memory_bars([], ""),
        lambda: plots.adherence_bars([], ""),
        lambda: plots.scaling([], ""),
        lambda: plots.matrix_map([], ""),
    ],
)
def test_nothing_to_plot_is_said(draw: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match="nothing to plot"):
        draw()


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"diffeff\[eval\]"):
        plots.scaling(scaling_rows(), "")


def test_labels_find_room_or_stay_away() -> None:
    anchors = [(50.0, 50.0), (52.0, 50.0), (50.0, 52.0)]
    sizes = [(30.0, 10.0)] * 3
    found = place(anchors, sizes, (0, 0, 200, 100), anchors)
    boxes = [(x, y, x + 30, y + 10) for x, y in (corner for corner in found if corner)]
    assert len(boxes) == 3
    for one, two in combinations(boxes, 2):
        assert one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
    for box in boxes:
        assert box[0] >= 0
        assert box[2] <= 200
        assert not any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in anchors)
    assert place(anchors, [(300.0, 10.0)] * 3, (0, 0, 200, 100)) == [None, None, None]


def test_a_label_is_nearer_to_its_own_point_than_to_others() -> None:
    own, other = (50.0, 50.0), (50.0, 66.0)
    (corner,) = place([own], [(10.0, 8.0)], (0, 0, 100, 100), [own, other])
    assert corner is not None
    middle = corner[0] + 5, corner[1] + 4
    assert abs(middle[1] - own[1]) < abs(middle[1] - other[1])
