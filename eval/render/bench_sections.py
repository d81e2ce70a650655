"""Parts of the page of a bench, each made from the cells of one run."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Sequence

from diffeff.eval.render.advice import Choice, beaten, choices, verdict
from diffeff.eval.render.document import Column, anchor, card, chip, facts, folded, said, sortable
from diffeff.eval.render.markup import Markup, element, joined
from diffeff.eval.render.records import Cell, Spread
from diffeff.eval.render.scatter import package_class
from diffeff.eval.render.tables import DASH, adherence_text, mebibytes, percent, psnr_text

__all__ = ["arm_table", "clips", "headline", "identified", "settings"]

Ident = Callable[[Cell], str]


def identified(cells: Sequence[Cell], model: str) -> Ident:
    """Gives each cell's row an id that is unique on the page."""
    numbers = {id(cell): number for number, cell in enumerate(cells)}
    return lambda cell: f"{anchor(model)}-arm-{numbers[id(cell)]}"


# --- what to choose -------------------------------------------------------------------------------------------------
def headline(cells: Sequence[Cell]) -> Markup:
    """Cards of what to choose for which closeness to plain, then where fewer steps is better and what did not work."""
    cards = [_choice_card(choice, cells[0]) for choice in choices(cells)]
    none = [] if cards else ["No arm was faster than plain at 30 dB or more."]
    return joined(
        [
            element("div", *cards, class_="cards") if cards else None,
            said([*none, *beaten(cells), *_left_out(cells), *_alone(cells)]),
        ]
    )


def _choice_card(choice: Choice, plain: Cell) -> Markup:
    cell, other = choice.cell, choice.other
    whole, own = cell.adherence.get("all"), plain.adherence.get("all")
    entries = [("PSNR", psnr_text(cell)), ("quartiles", _range(cell.speed))]
    entries += [("captions shown", f"{adherence_text(whole)}; plain {adherence_text(own)}")] if whole and own else []
    return card(
        f"{choice.meaning.capitalize()}: {choice.floor:.0f} dB or more",
        f"{cell.speed.value:.2f}x" if cell.speed else DASH,
        "as fast as plain",
        cell.label,
        entries,
        _next(choice) if other else _unrivalled(cell),
        package_class(cell.package),
    )


def _next(choice: Choice) -> str:
    other = choice.other
    if other is None or other.speed is None or other.psnr is None:
        return ""
    kind = "Best plan or peer" if choice.cell.kind == "fewer-steps" else "Best with fewer steps"
    close = "identical" if math.isinf(other.psnr.value) else f"{other.psnr.value:.1f} dB"
    return f"{kind}: {other.label}, {other.speed.value:.2f}x at {close}"


def _unrivalled(cell: Cell) -> str:
    return "No plan or peer reaches that." if cell.kind == "fewer-steps" else "No run of fewer steps reaches that."


def _range(spread: Spread | None) -> str:
    return DASH if spread is None else f"{spread.low:.2f}x to {spread.high:.2f}x"


def _left_out(cells: Sequence[Cell]) -> Iterator[str]:
    """How many arms have no place among the choices, and why."""
    for state, words in (("idle", "Ran and changed nothing"), ("refused", "Refused"), ("failed", "Failed")):
        names = list(dict.fromkeys(cell.group for cell in cells if cell.state == state))
        if names:
            yield f"{words}: {', '.join(names)}. The table says why."


def _alone(cells: Sequence[Cell]) -> Iterator[str]:
    if not any(cell.kind == "fewer-steps" for cell in cells):
        yield "Fewer steps was not measured: add `--against fewer-steps` to see whether it does better."


# --- every arm ------------------------------------------------------------------------------------------------------
def arm_table(cells: Sequence[Cell], ident: Ident) -> Markup:
    """Every arm in a table to sort; one that failed or was refused says why in its own words, across all columns."""
    attributes = list(dict.fromkeys(name for cell in cells for name in cell.adherence))
    memory = any(cell.peak_bytes is not None for cell in cells)
    columns = [
        Column("arm", words=True),
        Column("steps"),
        Column("speed-up"),
        Column("CPU time"),
        Column("PSNR, dB"),
        Column("against fewer steps", words=True),
        Column("SSIM"),
        Column("FLOPs left", rising=True),
        *([Column("peak memory", rising=True)] if memory else ()),
        *(Column("whole caption" if name == "all" else name) for name in attributes),
    ]
    rows = []
    for cell in cells:
        numbers = [*_closeness(cell), _standing(cell, cells), *_costs(cell, memory), *_shares(cell, attributes)]
        rows.append(_row(cell, numbers, len(columns), ident(cell)))
    return sortable("Speed-ups are medians over prompts with quartiles; [..] are 95 % intervals.", columns, rows)


def _row(cell: Cell, numbers: Sequence[Markup], width: int, ident: str) -> Markup:
    marked = {"failed": chip("failed", "no"), "refused": chip("refused", "no"), "idle": chip("no effect", "hm")}
    head = element(
        "th", element("i"), cell.label, " ", marked.get(cell.state), scope="row", data_value=cell.label,
        class_=package_class(cell.package),
    )  # fmt: skip
    if cell.hopeless:
        where = f"{cell.phase}: " if cell.phase else ""
        quote = element("td", where + cell.message, colspan=str(width - 1), class_="words quote")
        return element("tr", head, quote, id=ident)
    return element("tr", head, *numbers, id=ident)


def _closeness(cell: Cell) -> list[Markup]:
    psnr = cell.psnr
    same = "reference" if cell.is_plain else "identical"
    shown = None if psnr is None else same if math.isinf(psnr.value) else f"{psnr.value:.1f}"
    spread = "" if psnr is None or math.isinf(psnr.value) else f"[{psnr.low:.1f}, {psnr.high:.1f}]"
    worst = f"worst {cell.worst:.1f}" if cell.worst is not None else ""
    cpu = cell.cpu_speed
    return [
        _number(cell.steps, None if cell.steps is None else str(cell.steps)),
        _number(*_speed(cell.speed), _range(cell.speed) if cell.speed else ""),
        _number(*_speed(cpu)),
        _number(None if psnr is None else min(psnr.value, 999.0), shown, spread, worst),
    ]


def _costs(cell: Cell, memory: bool) -> list[Markup]:
    ssim = ((cell.row.get("fidelity") or {}).get("ssim") or {}).get("mean")
    return [
        _number(ssim, None if ssim is None else f"{ssim:.4f}"),
        _number(cell.flops, percent(cell.flops)),
        *([_number(cell.peak_bytes, mebibytes(cell.peak_bytes))] if memory else ()),
    ]


def _speed(spread: Spread | None) -> tuple[float | None, str | None]:
    return (None, None) if spread is None else (spread.value, f"{spread.value:.2f}x")


def _shares(cell: Cell, attributes: Sequence[str]) -> Iterator[Markup]:
    for name in attributes:
        entry = cell.adherence.get(name)
        if entry is None:
            yield _number(None, None)
        else:
            interval = f"[{100 * entry.share.low:.0f}, {100 * entry.share.high:.0f}]"
            yield _number(entry.share.value, f"{100 * entry.share.value:.0f} %", interval)


def _number(value: float | None, text: str | None, *under: str) -> Markup:
    small = [element("small", line) for line in under if line]
    return element("td", DASH if text is None else text, *small, data_value=None if value is None else repr(value))


def _standing(cell: Cell, cells: Sequence[Cell]) -> Markup:
    if cell.state == "idle":
        return element("td", "does nothing here: its results are plain's", class_="words", data_value="z")
    if cell.is_plain or cell.kind == "fewer-steps":
        return element("td", DASH, class_="words")
    found = verdict(cell, cells)
    kind = {"better": "ok", "worse": "no", "unclear": "hm"}.get(found.standing, "")
    expected = None if found.expected is None else element("small", f"{found.expected:.1f} dB at its speed")
    return element("td", chip(found.words, kind), expected, class_="words", data_value=found.words)


# --- clips ----------------------------------------------------------------------------------------------------------
def clips(cells: Sequence[Cell], ident: Ident, name: str) -> Markup | None:
    """The first prompt's clip of every arm side by side, playing in step; None when no row holds one."""
    figures = [_figure(cell, ident(cell)) for cell in cells if _sheet(cell)]
    if not figures:
        return None
    moving = any("--n:1;" not in figure for figure in figures)
    controls = element(
        "p",
        element("button", "Play", type="button"),
        " ",
        element("button", "Show all frames", type="button", aria_pressed="false"),
        class_="controls",
        data_clips=name,
        hidden=True,
    )
    return joined(
        [controls if moving else None, element("div", *figures, class_="clips frames" if moving else "clips", id=name)]
    )


def _sheet(cell: Cell) -> str:
    return str((cell.row.get("samples") or {}).get("sheet") or "")


def _figure(cell: Cell, ident: str) -> Markup:
    kind, width, height = _picture(_sheet(cell))
    count = _frames(cell, width, height)
    picture = element(
        "img",
        src=f"data:{kind};base64,{_sheet(cell)}",
        alt=f"{count} frames of the first prompt, {cell.label}",
        width=str(width),
        height=str(height),
    )
    figures = [f"{cell.speed.value:.2f}x" if cell.speed else "", "" if cell.is_plain else _decibels(cell)]
    text = element("small", ", ".join(part for part in figures if part))
    return element(
        "figure",
        element("div", picture, class_="clip"),
        element("figcaption", element("a", cell.label, href=f"#{ident}"), text),
        style=f"--n:{count};--ratio:{width / count:.6g}/{height}",
        class_="plain" if cell.is_plain else None,
    )


def _decibels(cell: Cell) -> str:
    return psnr_text(cell).partition(" [")[0].partition(",")[0]


def _picture(sheet: str) -> tuple[str, int, int]:
    """Media type, width and height of a base64 picture; 1 x 1 for what is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(base64.b64decode(sheet))) as found:
            return found.get_format_mimetype() or "image/png", found.width, found.height
    except (UnidentifiedImageError, ValueError):
        return "image/png", 1, 1


def _frames(cell: Cell, width: int, height: int) -> int:
    """How many frames lie in the strip: frames have the shape of the call's, square when it does not say."""
    call = cell.row.get("call") or {}
    shape = (call.get("width") or 1) / (call.get("height") or 1) if call.get("height") and call.get("width") else 1.0
    return max(1, round(width / (height * shape)))


# --- how it was measured --------------------------------------------------------------------------------------------
_SETTINGS: tuple[str, ...] = ("model", "model_fingerprint", "run", "when", "commit", "call", "prompts", "prompt_set")
_SETTINGS += ("prompt_set_sha256", "seed", "device", "dtype", "threads")


def settings(cells: Sequence[Cell]) -> Markup:
    """Folded: settings of the run, the environment, and of each arm its options, plan and command."""
    row = cells[0].row
    shared = {name.replace("_", " "): row[name] for name in _SETTINGS if name in row}
    environments = {name: value for cell in cells for name, value in (cell.row.get("environment") or {}).items()}
    arms = [folded(cell.label, facts(_arm(cell))) for cell in cells]
    return joined(
        [
            folded("Settings of the run", facts(shared)),
            folded("Environment", facts(environments)),
            folded("Every arm: options, plan, and the command that makes its line again", *arms),
        ]
    )


def _arm(cell: Cell) -> dict[str, object]:
    row = cell.row
    found = {"command": row.get("command"), "options": row["arm"].get("options"), "plan": row.get("plan")}
    found |= {"seconds per call": row.get("seconds"), "peak memory": row.get("peak_memory")}
    return {name: value for name, value in found.items() if value} or {"arm": row["arm"]["name"]}
