"""Checks an HTML page as strictly as is possible without a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = frozenset({"br", "col", "hr", "img", "input", "link", "meta", "source"})
LOADING = frozenset({"src", "href", "srcset", "poster", "data", "action", "formaction", "background"})


class Page(HTMLParser):
    """Parses a page; raises AssertionError for tags that do not balance, ids given twice, links to nowhere, and for
    anything that would be loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.raw: dict[str, str] = {"style": "", "script": ""}
        assert text.startswith("<!doctype html>\n")
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        assert len(self.ids) == len(set(self.ids)), "an id stands twice"
        assert set(self.targets) <= set(self.ids), f"links to nowhere: {set(self.targets) - set(self.ids)}"
        assert not re.search(r"url\(|@import", self.raw["style"])
        assert not re.search(r"https?:|fetch\(|XMLHttp|import\(|WebSocket|sendBeacon", self.raw["script"])
        assert self.raw["style"].count("{") == self.raw["style"].count("}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), f"an attribute of {tag} stands twice"
        assert not [name for name in found if name.startswith("on")], "inline event handlers"
        for name in LOADING & found.keys():
            self.loads(found[name] or "")
        self.ids += [found["id"] or ""] if "id" in found else []
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)

    def loads(self, where: str) -> None:
        assert where.startswith(("#", "data:image/", "data:video/")), f"loads {where[:60]}"
        self.targets += [where[1:]] if where.startswith("#") else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        opened = self.open.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]] += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        """What a reader reads, in one line."""
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        """The attributes of every element of a tag that has these attributes; a class may be one of several."""
        return [
            found
            for name, found in self.elements
            if name == tag and all(value in (found.get(key.rstrip("_")) or "").split() for key, value in wanted.items())
        ]
