"""Building HTML so that tags balance and every text is escaped: `element("p", "1 < 2", class_="note")`."""

from __future__ import annotations

import html
from collections.abc import Iterable

__all__ = ["VOID", "Markup", "element", "joined"]

VOID = frozenset({"br", "col", "hr", "img", "input", "link", "meta", "source"})
"""Elements without an end tag."""


class Markup(str):
    """Text that is HTML already; any other string is escaped when it becomes a child or an attribute."""

    __slots__ = ()


def element(tag: str, /, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """One element. A trailing underscore of an attribute is dropped, other underscores become hyphens.

    None children and None or False attributes are left out; True attributes stand alone.
    """
    head = "".join(_attribute(key, value) for key, value in attributes.items())
    if tag in VOID:
        return Markup(f"<{tag}{head}>")
    return Markup(f"<{tag}{head}>{joined(children)}</{tag}>")


def joined(children: Iterable[str | None]) -> Markup:
    """Children one after the other, None left out."""
    return Markup("".join(_child(child) for child in children if child is not None))


def _child(child: str) -> str:
    return child if isinstance(child, Markup) else html.escape(child, quote=False)


def _attribute(key: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-") if key != "viewBox" else key
    if value is True:
        return f" {name}"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f' {name}="{html.escape(text)}"'
