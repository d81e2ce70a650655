"""Command-line flags from a request's fields and from the configs of the methods.

`--feature-cache` switches a method on, `--no-feature-cache` takes it out of the plan, and
`--feature-cache.interval 3` sets one option (and switches the method on).
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.markup import escape

from diffeff.core.config import Config, Knob, knobs
from diffeff.errors import ConfigError
from diffeff.plan import Plan

__all__ = ["command", "flagged_plan"]

RequestT = TypeVar("RequestT")
_DOT, _OFF = "__of__", "no__"


def command(
    request: type[RequestT],
    run: Callable[[RequestT, dict[str, Any]], None],
    methods: Mapping[str, type[Config]],
) -> Callable[..., None]:
    """A function for typer: its parameters are the fields of the dataclass `request` and the methods' options.

    Called, it hands `run` the request and the flags that were given, by parameter name.
    """
    own = [_field_parameter(request, name) for name in (f.name for f in fields(request))]  # type: ignore[arg-type]
    extra = [parameter for name, config in methods.items() for parameter in _method_parameters(name, config)]

    def call(**values: Any) -> None:
        given = {p.name: values.pop(p.name) for p in extra}
        run(request(**values), {k: v for k, v in given.items() if v is not None})

    call.__doc__ = run.__doc__
    call.__signature__ = inspect.Signature([*own, *extra])  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in (*own, *extra)}
    return call


def flagged_plan(plan: Plan, given: Mapping[str, Any], methods: Mapping[str, type[Config]]) -> Plan:
    """`plan` with the flags of `command` laid over it: methods added, taken out, or their options changed.

    Raises ConfigError for a value outside its range, and for a method switched off and configured at once.
    """
    entries = [config.to_dict() for config in plan.methods]
    for name, config in methods.items():
        options = {
            k.name: _value(k, given[name + _DOT + k.name]) for k in knobs(config) if name + _DOT + k.name in given
        }
        if given.get(_OFF + name):
            if options or given.get(name):
                raise ConfigError(f"--no-{_dashed(name)} and other flags of {name} exclude each other; leave one out")
            entries = [entry for entry in entries if entry["use"] != name]
        elif options or given.get(name):
            if not any(entry["use"] == name for entry in entries):
                entries.append({"use": name})
            entries = [entry | options if entry["use"] == name else entry for entry in entries]
    chosen = [methods[entry["use"]].from_dict(entry) for entry in entries]
    return Plan(chosen, plan.model, plan.artefacts, plan.folder)


def _field_parameter(request: type[Any], name: str) -> inspect.Parameter:
    hint = typing.get_type_hints(request, include_extras=True)[name]
    (found,) = (f for f in fields(request) if f.name == name)
    default = inspect.Parameter.empty if found.default is MISSING else found.default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _method_parameters(name: str, config: type[Config]) -> list[inspect.Parameter]:
    flag, panel = _dashed(name), f"{name}: {config.summary}"
    on = typer.Option(f"--{flag}", help="Add this method to the plan.", rich_help_panel=panel, metavar="")
    off = typer.Option(f"--no-{flag}", hidden=True)
    made = [_parameter(name, Annotated[bool | None, on]), _parameter(_OFF + name, Annotated[bool | None, off])]
    return made + [_parameter(name + _DOT + k.name, _annotation(flag, k, panel)) for k in knobs(config)]


def _annotation(flag: str, knob: Knob, panel: str) -> Any:
    text = f"{escape(knob.help)} [dim]({escape(_allowed(knob))})[/]"
    option = typer.Option(f"--{flag}.{_dashed(knob.name)}", help=text, rich_help_panel=panel, metavar=_metavar(knob))
    return Annotated[_kind(knob) | None, option]


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kind(knob: Knob) -> Any:
    """What typer parses. An option that may be none, and is not by default, is text: `none` can be said."""
    choices = ("on", "off") if knob.type is bool else knob.choices
    if choices:
        return Literal[(*choices, "none")] if _may_unset(knob) else Literal[choices]
    return str if knob.type is tuple or _may_unset(knob) else knob.type


def _may_unset(knob: Knob) -> bool:
    return knob.optional and knob.default is not None


def _metavar(knob: Knob) -> str | None:
    if knob.choices or knob.type is bool:
        return None
    return "A,B,..." if knob.type is tuple else knob.type.__name__.upper()


def _allowed(knob: Knob) -> str:
    known = "" if knob.choices or knob.type in (bool, tuple, str) else f"{knob.range}; "
    return f"{known}default {_shown(knob.default)}{', or none' if _may_unset(knob) else ''}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(str(v) for v in value) or "empty"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if value is None else str(value)


def _value(knob: Knob, given: Any) -> Any:
    """A flag's value as the config wants it."""
    if given == "none" and _may_unset(knob):
        return None
    if knob.type is bool:
        return given == "on"
    if knob.type is tuple:
        return tuple(_scalar(part) for part in given.split(",") if part.strip())
    return _scalar(given) if isinstance(given, str) and knob.type is not str else given


def _scalar(text: str) -> Any:
    try:
        return json.loads(text.strip())
    except json.JSONDecodeError:
        return text.strip()


def _dashed(name: str) -> str:
    return name.replace("_", "-")
