"""Makes docs/methods.md: every method's row, from the methods themselves (`python -m diffeff.eval.render.docs`).

What a config's docstring says in paragraphs that begin with `Defaults:`, `Differs:`, `Memory:` (or a sentence with
`Holds`) and `Source:` is taken from there, options and ranges from its fields, and what a cache is built from out of
its recipe. A test compares the page.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffeff.core.config import Config, knobs
from diffeff.core.method import Method
from diffeff.eval.render.tables import DASH, markdown
from diffeff.files import write_text
from diffeff.methods.caching.entries import AtEntries
from diffeff.methods.caching.policy import FirstOf
from diffeff.methods.caching.predictor import PREDICTORS
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.methods.table import config_classes

__all__ = ["PAGE", "facts", "page"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
_LABELS = ("Defaults", "Differs", "Memory", "Source", "Sources", "Related")
_INTRO = """# Methods

Every method by its name in plans. This page is made from the code (`python -m diffeff.eval.render.docs`); the same
options, with their ranges, are `diffeff methods NAME`. What the methods reach on the bundled models stands in
[benchmarks.md](benchmarks.md), which of them works on which family too.

```python
from diffeff import DiffEffPipeline, Plan

pipe = DiffEffPipeline.from_pretrained("sprites-wan", plan=Plan.from_dict({
    "diffeff_plan": 1, "methods": [{"use": "first_block_cache", "threshold": 0.2}],
}))
```

## Caches

A cache is built from a *site* (what is predicted), a *policy* (when it is computed) and a *predictor* (from what);
the parts are explained [below](#parts). *Decides*: `beforehand` by the clock or a table alone, the same steps for every
prompt; `batch together`, one measurement and one decision for all images or videos of a call, whose results then differ
from those of single runs; `rows apart` where the option `per_row` is on.

In runs of 8 steps or fewer a cache says that it is of little use there, and where its protected steps are the whole
run it is refused: make each step cheaper instead (`int8_weights`, `kv_downsample`, `guidance_skip`)."""
_PARTS = """<a id="parts"></a>
## Parts of a cache"""


def page() -> str:
    """The whole page."""
    configs = config_classes()
    caches = {name: config for name, config in configs.items() if issubclass(config, CacheConfig)}
    others = {name: config for name, config in configs.items() if name not in caches}
    heads = ["method", "what it buys", "site", "policy", "predictor", "decides", "holds"]
    sections = [
        _INTRO,
        markdown(heads, [_cache_row(config) for config in caches.values()]),
        "## Other methods",
        markdown(["method", "what it buys", "stands at", "takes", "holds"], [_row(c) for c in others.values()]),
        "## One by one",
        *(_section(config) for config in configs.values()),
        _PARTS,
        *(_glossary(title, kinds) for title, kinds in _parts(caches.values()).items()),
    ]
    return "\n\n".join(sections) + "\n"


# --- what a docstring says --------------------------------------------------------------------------------------------
def facts(config: type[Config]) -> Mapping[str, str]:
    """The labelled paragraphs of a config's docstring, each on one line, by label."""
    found = {}
    for paragraph in inspect.cleandoc(config.__doc__ or "").split("\n\n"):
        line = " ".join(paragraph.split())
        label, colon, rest = line.partition(": ")
        if colon and label in _LABELS:
            found[label] = rest[0].upper() + rest[1:]
    held = re.search(r"\b(?:Holds|Memory:) (.+?\.)(?: |$)", " ".join((config.__doc__ or "").split()))
    if held and "Memory" not in found:
        found["Memory"] = held[1][0].upper() + held[1][1:]
    return found


def _holds(config: type[Config]) -> str:
    """The first sentence on memory."""
    return facts(config).get("Memory", DASH).partition(". ")[0].rstrip(".")


# --- tables -----------------------------------------------------------------------------------------------------------
def _link(config: type[Config]) -> str:
    return f"[`{config.name}`](#{config.name})"


def _row(config: type[Config]) -> list[str]:
    method: Method[Any] = config().build()
    taken = sorted(claim.value for claim in method.claims)
    return [_link(config), config.summary, method.layer.name.lower(), ", ".join(taken) or "nothing", _holds(config)]


def _cache_row(config: type[CacheConfig]) -> list[str]:
    recipe, method = config().recipe(), config().build()
    decides = str(getattr(method, "decides", "beforehand"))
    if any(knob.name == "per_row" for knob in knobs(config)):
        decides += ", or rows apart"
    parts = [_kind(type(recipe.site)), _policy(recipe), _predictor(recipe)]
    return [_link(config), config.summary, *(f"`{part}`" for part in parts), decides, _holds(config)]


def _public(kind: type) -> type:
    """A part, or what it is made from where its own name is private to a method."""
    bases = [base for base in kind.__mro__[:-1] if not base.__name__.startswith("_")]
    return bases[0] if bases else kind


def _kind(kind: type) -> str:
    """The name a part goes by."""
    return _public(kind).__name__.lstrip("_")


def _own_rule(recipe: Recipe) -> bool:
    """Whether the site gives its parts policies of their own, in place of the recipe's."""
    rule = getattr(recipe.site, "rule", None)
    if not inspect.ismethod(rule):
        return rule is not None
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(rule.__func__))).body
    last = function.body[-1] if isinstance(function, ast.FunctionDef) else None
    return not (isinstance(last, ast.Return) and isinstance(last.value, ast.Constant))


def _policies(recipe: Recipe) -> list[Any]:
    return list(recipe.policy.rules) if isinstance(recipe.policy, FirstOf) else [recipe.policy]


def _policy(recipe: Recipe) -> str:
    if _own_rule(recipe):
        return "AtEntries"
    return " + ".join(_kind(type(rule)) for rule in _policies(recipe))


def _predictor(recipe: Recipe) -> str:
    if getattr(recipe.site, "predictor", None) is not None:
        return "own"
    names = [name for name, predictor in PREDICTORS.items() if predictor == recipe.predictor]
    return names[0] if names else type(recipe.predictor).__name__


# --- one method -------------------------------------------------------------------------------------------------------
def _section(config: type[Config]) -> str:
    told = facts(config)
    named = {"Differs": "Differs from the original", "Memory": "Holds", "Sources": "Sources", "Related": "Related"}
    lines = [f"- **{named.get(label, label)}:** {told[label]}" for label in _LABELS if label in told]
    rows = [[f"`{k.name}`", f"`{_value(k.default)}`", k.range, k.help] for k in knobs(config)]
    parts = [f'<a id="{config.name}"></a>\n### {config.name}', config.summary, "\n".join(lines)]
    parts += [_published(config), markdown(["option", "default", "allowed", "what it does"], rows) if rows else ""]
    return "\n\n".join(part for part in parts if part)


def _published(config: type[Config]) -> str:
    published: Mapping[str, Any] = getattr(config, "PUBLISHED", {})
    entries = (f"{family} {_value(_short(setting))}" for family, setting in published.items())
    return f"Published settings: {'; '.join(entries)}." if published else ""


def _short(setting: Any) -> Any:
    if isinstance(setting, Mapping):
        return ", ".join(f"{key} {_value(_short(value))}" for key, value in setting.items())
    return setting


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        shown = ", ".join(_value(item) for item in value)
        return f"({shown})"
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- parts ------------------------------------------------------------------------------------------------------------
def _parts(configs: Iterable[type[CacheConfig]]) -> dict[str, list[type]]:
    recipes = [config().recipe() for config in configs]
    policies = [type(rule) for recipe in recipes if not _own_rule(recipe) for rule in _policies(recipe)]
    if any(_own_rule(recipe) for recipe in recipes):
        policies.append(AtEntries)
    found = {
        "Sites": [type(recipe.site) for recipe in recipes],
        "Policies": policies,
        "Predictors": [type(recipe.predictor) for recipe in recipes],
    }
    return {title: list(dict.fromkeys(kinds)) for title, kinds in found.items()}


def _glossary(title: str, kinds: Iterable[type]) -> str:
    """Each part by what its docstring says of it."""
    told = {_kind(kind): _public(kind) for kind in kinds}
    lines = [f"- `{name}`: {_sentence(kind)}" for name, kind in sorted(told.items())]
    return "\n".join([f"**{title}**", "", *lines])


def _sentence(kind: type) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())


def main() -> None:
    """Write the page."""
    write_text(PAGE, page())
    sys.stderr.write(f"wrote {PAGE}\n")


if __name__ == "__main__":
    main()
