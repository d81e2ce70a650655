"""Configs of methods: frozen, keyword-only dataclasses whose fields say their range and help.

The Python API, the CLI flags, the web controls and the ComfyUI inputs are all generated from these fields.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union

from diffeff.errors import ConfigError, UnknownName, nearest

if TYPE_CHECKING:
    from diffeff.core.method import Method

__all__ = ["Config", "Knob", "knob", "knobs"]


@dataclass(frozen=True)
class Knob:
    """One option of a method, as every face of the toolkit shows it."""

    name: str
    type: type
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False

    @property
    def range(self) -> str:
        """The allowed values in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.type is bool:
            return "true or false"
        if self.low is None and self.high is None:
            return f"any {self.type.__name__}"
        low = "" if self.low is None else f"{self.low:g} <= "
        high = "" if self.high is None else f" <= {self.high:g}"
        return f"{low}{self.type.__name__}{high}"


def knob(
    default: Any,
    help: str,  # noqa: A002 (the word every face shows it under)
    *,
    low: float | None = None,
    high: float | None = None,
    step: float | None = None,
) -> Any:
    """A config field with its allowed range `low..high`, the step of its slider and one line of help."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "step": step})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all method configs: JSON scalars (and tuples of them), checked when built, no behaviour but `build`."""

    name: ClassVar[str]
    """The method's key in the table and in plan files."""
    summary: ClassVar[str]
    """One line: what it buys the user."""

    def __post_init__(self) -> None:
        for spec in knobs(type(self)):
            _check(type(self), spec, getattr(self, spec.name))
        self.check()

    def check(self) -> None:
        """Rules between fields; raises ConfigError."""

    def build(self) -> Method[Any]:
        """The method this config describes."""
        raise TypeError(f"{type(self).__name__} builds no method")

    def to_dict(self) -> dict[str, Any]:
        """`{"use": name, field: value, ...}`, JSON-ready."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"use": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> typing.Self:
        """The inverse of `to_dict`. Raises UnknownName for a key that is no field, naming the nearest."""
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in data.items() if k != "use"}
        for key in values:
            if key not in known:
                raise UnknownName(f"{cls.name} has no option {key!r}. {nearest(key, known)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def knobs(config: type[Config]) -> tuple[Knob, ...]:
    """The options of a config class in order of declaration, its own before those it shares with others."""
    hints = typing.get_type_hints(config)
    return tuple(_knob(f, hints[f.name]) for f in sorted(fields(config), key=lambda f: _depth(config, f.name)))


def _depth(config: type[Config], name: str) -> int:
    """How many classes up a field was first declared."""
    return max(i for i, base in enumerate(config.__mro__) if name in inspect.get_annotations(base))


def _knob(f: dataclasses.Field[Any], hint: Any) -> Knob:
    optional = False
    if typing.get_origin(hint) in (Union, types.UnionType):
        arms = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        optional, hint = True, arms[0]
    choices = tuple(typing.get_args(hint)) if typing.get_origin(hint) is Literal else ()
    kind = str if choices else (typing.get_origin(hint) or hint)
    meta = f.metadata
    return Knob(f.name, kind, f.default, meta["help"], meta["low"], meta["high"], meta["step"], choices, optional)


def _check(config: type[Config], spec: Knob, value: Any) -> None:
    if value is None and spec.optional:
        return
    items = value if spec.type is tuple and isinstance(value, tuple) else (value,)
    kinds = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}.get(spec.type, (object,))
    for item in items:
        wrong = not isinstance(item, kinds) or (isinstance(item, bool) and spec.type in (int, float))
        wrong = wrong or (bool(spec.choices) and item not in spec.choices)
        wrong = wrong or (spec.low is not None and not item >= spec.low)
        wrong = wrong or (spec.high is not None and not item <= spec.high)
        if wrong:
            raise ConfigError(f"{config.name}.{spec.name} is {value!r}; allowed: {spec.range}")
