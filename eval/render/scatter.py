"""The plot of speed against PSNR as inline SVG: every point is a link to its row of the table and has a tooltip."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from diffeff.eval.render.advice import curves, front
from diffeff.eval.render.layout import Frame, frame_of, groups_of, labels_of, lines_of, markers_of, rated_of
from diffeff.eval.render.markup import Markup, element, joined
from diffeff.eval.render.records import Cell
from diffeff.eval.render.style import Point, place, samples
from diffeff.eval.render.tables import mebibytes, psnr_text, spread_text

__all__ = ["scatter", "summary"]

_WIDTH, _HEIGHT = 880.0, 480.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 14.0, 14.0, 50.0
_DASHES = (None, "7 4", "2 3", "9 3 2 3")
Place = Callable[[Point], Point]


def scatter(cells: Sequence[Cell], ident: Callable[[Cell], str]) -> Markup:
    """The plot and its legend. `ident` gives the id of a cell's row. Raises ConfigError when nothing can be plotted."""
    shown = rated_of(cells)
    frame = frame_of(shown)
    markers, put = markers_of(groups_of(shown)), _placing(frame)
    drawing = element(
        "svg",
        *_axes(frame, put),
        *_lines(shown, frame, put),
        *(_dot(cell, markers, put(frame.spot(cell)), ident(cell)) for cell in _back_to_front(shown)),
        *_labels(shown, frame, put),
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        role="group",
        aria_label="Speed-up against PSNR; every point links to its row of the table",
    )
    return joined([element("div", drawing, class_="plot"), _legend(shown, markers)])


def summary(cell: Cell) -> list[str]:
    """What a tooltip says of a cell, line by line."""
    lines = [cell.label, f"{spread_text(cell.speed)} x plain's speed", f"PSNR {psnr_text(cell)}"]
    if whole := cell.adherence.get("all"):
        lines.append(f"shows its caption: {whole.right} of {whole.trials}")
    lines += [f"FLOPs left: {100 * cell.flops:.0f} %"] if cell.flops is not None else []
    return lines + ([f"peak memory {mebibytes(cell.peak_bytes)}"] if cell.peak_bytes is not None else [])


def _placing(frame: Frame) -> Place:
    def put(spot: Point) -> Point:
        x = (spot[0] - frame.x[0]) / (frame.x[1] - frame.x[0])
        y = (spot[1] - frame.y[0]) / (frame.y[1] - frame.y[0])
        return _LEFT + x * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - y * (_HEIGHT - _TOP - _BOTTOM)

    return put


def ticks(low: float, high: float, about: int = 7) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten apart) from `low` to `high`."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _axes(frame: Frame, put: Place) -> Iterator[Markup]:
    (left, top), (right, bottom) = put((frame.x[0], frame.y[1])), put((frame.x[1], frame.y[0]))
    for value in ticks(*frame.x):
        x = put((value, 0))[0]
        yield element("line", x1=x, x2=x, y1=top, y2=bottom, class_="start" if value == 1 else "grid")
        yield element("text", f"{value:g}x", x=x, y=bottom + 18, class_="tick", text_anchor="middle")
    for value in ticks(*frame.y):
        y = put((0, value))[1]
        yield element("line", x1=left, x2=right, y1=y, y2=y, class_="grid")
        yield element("text", f"{value:g}", x=left - 8, y=y + 4, class_="tick", text_anchor="end")
    if frame.exact:
        y = put((0, frame.ceiling))[1]
        yield element("line", x1=left, x2=right, y1=y, y2=y, class_="ceiling")
        yield element("text", "exact", x=right - 4, y=y - 8, class_="tick", text_anchor="end")
    middle = f"rotate(-90 14 {(top + bottom) / 2:g})"
    yield element(
        "text", "speed-up over plain", x=(left + right) / 2, y=_HEIGHT - 8, class_="axis", text_anchor="middle"
    )
    yield element(
        "text", "PSNR to plain, dB", x=14.0, y=(top + bottom) / 2, transform=middle, class_="axis", text_anchor="middle"
    )


def _lines(shown: Sequence[Cell], frame: Frame, put: Place) -> Iterator[Markup]:
    def path(cells: Sequence[Cell]) -> str:
        return " ".join("{:.1f},{:.1f}".format(*put(spot)) for spot in frame.line(cells))

    yield element("polyline", points=path(front(shown)), class_="front")
    for number, (name, curve) in enumerate(curves(shown).items()):
        dash = _DASHES[number % len(_DASHES)]
        style = {"class_": "curve p-fewer-steps", "stroke_dasharray": dash, "data_group": name}
        yield element("polyline", points=path(curve), **style)
    for name, group in groups_of(shown).items():
        yield element("polyline", points=path(group), class_=f"sweep {_class(group[0])}", data_group=name)
        for cell in group:
            yield _whisker(cell, frame, put, name)


def _whisker(cell: Cell, frame: Frame, put: Place, group: str) -> Markup:
    """Quartiles of the speed-up."""
    _, height = frame.spot(cell)
    speed = cell.speed
    x1, x2 = (put((value, height))[0] for value in ((speed.low, speed.high) if speed else (0.0, 0.0)))
    y = put((0, height))[1]
    return element("line", x1=x1, x2=x2, y1=y, y2=y, class_=f"whisker {_class(cell)}", data_group=group)


def _back_to_front(shown: Sequence[Cell]) -> list[Cell]:
    return sorted(shown, key=lambda cell: (cell.kind != "fewer-steps", cell.kind == "plan"))


def _dot(cell: Cell, markers: dict[str, str], at: Point, ident: str) -> Markup:
    lines = summary(cell)
    marker = "." if cell.kind == "fewer-steps" else markers[cell.group]
    return element(
        "a",
        element("circle", cx=at[0], cy=at[1], r=11.0, class_="hit"),
        _marker(marker, at),
        href=f"#{ident}",
        class_=f"dot {_class(cell)}",
        data_tip="\n".join(lines),
        data_group=cell.group,
        aria_label=", ".join(lines),
    )


def _class(cell: Cell) -> str:
    return package_class(cell.package)


def package_class(package: str) -> str:
    """The CSS class that carries a package's colour."""
    plain = "".join(letter if letter.isalnum() else "-" for letter in package.lower())
    return f"p-{plain}"


_SHAPES: dict[str, tuple[Point, ...]] = {
    "s": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "D": ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
    "^": ((0, -1.3), (1.25, 1), (-1.25, 1)),
    "v": ((0, 1.3), (1.25, -1), (-1.25, -1)),
    "P": ((-0.45, -1.3), (0.45, -1.3), (0.45, -0.45), (1.3, -0.45), (1.3, 0.45), (0.45, 0.45), (0.45, 1.3),
          (-0.45, 1.3), (-0.45, 0.45), (-1.3, 0.45), (-1.3, -0.45), (-0.45, -0.45)),
    "X": ((0, -0.6), (0.7, -1.3), (1.3, -0.7), (0.6, 0), (1.3, 0.7), (0.7, 1.3), (0, 0.6), (-0.7, 1.3), (-1.3, 0.7),
          (-0.6, 0), (-1.3, -0.7), (-0.7, -1.3)),
}  # fmt: skip
_SHAPES["p"] = tuple((1.25 * math.sin(i * math.tau / 5), -1.25 * math.cos(i * math.tau / 5)) for i in range(5))
_SHAPES["*"] = tuple(
    ((1.6, 0.7)[i % 2] * math.sin(i * math.tau / 10), -(1.6, 0.7)[i % 2] * math.cos(i * math.tau / 10))
    for i in range(10)
)


def _marker(marker: str, at: Point, size: float = 5.2) -> Markup:
    if marker in ("o", "."):
        return element("circle", cx=at[0], cy=at[1], r=size * (1.1 if marker == "o" else 0.62), class_="mark")
    points = " ".join(f"{at[0] + size * x:.1f},{at[1] + size * y:.1f}" for x, y in _SHAPES[marker])
    return element("polygon", points=points, class_="mark")


def _labels(shown: Sequence[Cell], frame: Frame, put: Place) -> Iterator[Markup]:
    entries = labels_of(shown)
    widths = [(len(text) * (7.1 if strong else 6.4) + 2, 13.0 if strong else 11.0) for _, text, strong in entries]
    found = place(
        [_up(put(frame.spot(cell))) for cell, _, _ in entries],
        widths,
        (_LEFT + 3, _BOTTOM + 3 - _HEIGHT, _WIDTH - _RIGHT, -_TOP),
        [_up(put(frame.spot(cell))) for cell in shown],
        [_up(put(spot)) for line in lines_of(shown, frame) for spot in samples(line)],
        gap=10.0,
        margin=6.0,
        near=[not strong for _, _, strong in entries],
    )
    for (cell, text, strong), size, corner in zip(entries, widths, found, strict=True):
        if corner is not None:
            kind = f"label {_class(cell)}" + (" strong" if strong else "")
            yield element("text", text, x=round(corner[0], 1), y=round(-corner[1] - size[1] * 0.18, 1), class_=kind)


def _up(spot: Point) -> Point:
    """With y upwards: labels are placed above rather than below, as in the PNG."""
    return spot[0], -spot[1]


def _legend(shown: Sequence[Cell], markers: dict[str, str]) -> Markup:
    """Buttons that bring out one sweep or curve."""
    entries = [(name, group[0], markers[name]) for name, group in groups_of(shown).items()]
    entries += [(name, curve[0], ".") for name, curve in curves(shown).items()]
    buttons = [
        element(
            "button",
            element("svg", _marker(marker, (9.0, 9.0)), viewBox="0 0 18 18", class_=_class(cell), aria_hidden="true"),
            name,
            type="button",
            aria_pressed="false",
            data_group=name,
        )
        for name, cell, marker in entries
    ]
    yellow = element("span", element("i", class_="front-key"), "Pareto front: beaten by none in both", class_="key")
    return element("div", *buttons, yellow, class_="legend", role="group", aria_label="Bring out one line")
