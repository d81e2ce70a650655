"""docs/methods.md: made from the code, and true to it."""

from __future__ import annotations

import re

import pytest

from diffeff.core.config import knobs
from diffeff.eval.render.methods import PAGE, facts, page
from diffeff.methods.caching.recipe import CacheConfig
from diffeff.methods.table import TABLE, config_class, config_classes

PUBLISHED = [name for name, place in TABLE.items() if ".published." in place]


def row(name: str) -> list[str]:
    (line,) = (line for line in page().splitlines() if line.startswith(f"| [`{name}`]"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text("utf-8") == page(), "run `python -m diffeff.eval.render.methods`"


def test_every_method_has_a_row_and_a_section_with_all_its_options() -> None:
    text = page()
    for name, config in config_classes().items():
        assert config.summary in row(name)[1]
        (section,) = re.findall(rf'<a id="{name}"></a>\n(.*?)(?=\n<a id=|\Z)', text, flags=re.DOTALL)
        assert all(f"| `{knob.name}` |" in section for knob in knobs(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_caches_say_where_they_differ_what_defaults_are_and_what_they_hold(name: str) -> None:
    told = facts(config_class(name))
    assert {"Defaults", "Differs", "Memory", "Source"} <= told.keys()
    assert row(name)[-1] not in ("", "-", "—")


def test_parts_come_from_the_recipe() -> None:
    assert row("dbcache")[2:6] == ["`StackSite`", "`Threshold`", "`hold`", "batch together"]
    assert row("bwcache")[3] == "`Threshold + Burst + TailGuard`"
    assert row("fora")[2:6] == ["`Modules`", "`Interval`", "`hold`", "beforehand"]
    assert row("deepcache")[2:4] == ["`DepthOf`", "`AtEntries`"]
    assert row("easycache")[5] == "batch together, or rows apart"


def test_decisions_are_those_of_the_methods() -> None:
    for name, config in config_classes().items():
        if issubclass(config, CacheConfig):
            method = config().build()
            assert row(name)[5].startswith(str(getattr(method, "decides", "beforehand")))


def test_every_part_that_is_named_is_explained() -> None:
    parts = page().partition('<a id="parts"></a>')[2]
    for name in PUBLISHED:
        for part in [*row(name)[2:3], *row(name)[3].strip("`").split(" + ")]:
            assert f"- `{part.strip('`')}`: " in parts, part
