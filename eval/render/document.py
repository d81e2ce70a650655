"""The frame of an HTML page, and the parts that the pages share: cards, tables to sort, folded facts, chips."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffeff.eval.render.assets import SCRIPT, style_sheet
from diffeff.eval.render.markup import Markup, element, joined

__all__ = ["Column", "anchor", "card", "chip", "document", "facts", "folded", "said", "section", "sortable"]

_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The browser itself sees to it that nothing is fetched."""


def document(title: str, kicker: str, meta: Sequence[str], sections: Mapping[str, Markup], footer: str) -> str:
    """A whole page. `sections` are name -> section, each with `anchor(name)` as its id; the names make the contents."""
    links = [element("li", element("a", name, href=f"#{anchor(name)}")) for name in sections]
    contents = element("nav", element("ul", *links), aria_label="Contents") if len(links) > 1 else None
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(style_sheet())),
    )
    top = element(
        "header",
        element("p", kicker, class_="kicker"),
        element("h1", title),
        *(element("p", line, class_="meta") for line in meta if line),
        contents,
    )
    skip = element("a", "To the results", href="#main", class_="skip")
    main = element("main", *sections.values(), element("footer", footer), id="main")
    tip = element("div", id="tip", hidden=True)
    body = element("body", skip, top, main, tip, element("script", Markup(SCRIPT)))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def anchor(name: str) -> str:
    """An id for a name: letters, digits and hyphens."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split()) or "part"


def section(name: str, *children: str | None) -> Markup:
    """A part of the page with a heading that the contents link to."""
    return element("section", element("h2", name), *children, id=anchor(name))


def card(
    title: str, big: str, unit: str, name: str, entries: Iterable[tuple[str, str]], note: str, class_: str
) -> Markup:
    """A headline number with what it is of, a few facts under it, and a note at the foot."""
    listed = [part for key, value in entries for part in (element("dt", key), element("dd", value))]
    return element(
        "article",
        element("h3", title),
        element("p", big, element("small", f" {unit}") if unit else None, class_="big"),
        element("p", name, class_="name") if name else None,
        element("dl", *listed) if listed else None,
        element("p", note, class_="next") if note else None,
        class_=f"card {class_}",
    )


def said(lines: Iterable[str]) -> Markup | None:
    """Sentences as a list; None without any."""
    items = [element("li", line) for line in lines]
    return element("ul", *items, class_="said") if items else None


def chip(text: str, kind: str = "") -> Markup:
    """A word on a coloured ground: `ok`, `no`, `hm` or neutral."""
    return element("span", text, class_=f"chip {kind}".strip())


@dataclass(frozen=True)
class Column:
    """A column of a table that can be sorted. `words` is text; numbers start with the largest unless `rising`."""

    title: str
    words: bool = False
    rising: bool = False


def sortable(caption: str, columns: Sequence[Column], rows: Iterable[Markup]) -> Markup:
    """A table whose heads sort it; cells carry what to sort by in `data-value`."""
    heads = [
        element(
            "th",
            element("button", column.title, type="button"),
            scope="col",
            aria_sort="none",
            data_first="ascending" if column.words or column.rising else None,
            class_="words" if column.words else None,
        )
        for column in columns
    ]
    body = element("tbody", *rows)
    table = element("table", element("caption", caption), element("thead", element("tr", *heads)), body)
    return element("div", table, class_="wide", tabindex="0", role="region", aria_label=caption)


def folded(title: str, *children: str | None) -> Markup:
    """Something to unfold."""
    return element("details", element("summary", title), *children)


def facts(entries: Mapping[str, Any]) -> Markup:
    """Names and values as a two-column table; nested values as JSON."""
    rows = [
        element("tr", element("th", str(key), scope="row"), element("td", _value(value)))
        for key, value in entries.items()
    ]
    return element("div", element("table", element("tbody", *rows), class_="facts"), class_="wide")


def _value(value: Any) -> Markup:
    if isinstance(value, Mapping | list | tuple):
        return element("pre", json.dumps(value, indent=1, ensure_ascii=False)) if value else joined(["none"])
    return joined(["none" if value is None else str(value)])
