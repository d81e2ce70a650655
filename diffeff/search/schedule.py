"""Schedule: which steps of a run compute which branch and what fills the others, with where it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from diffeff.errors import ConfigError, nearest
from diffeff.files import write_text
from diffeff.methods.caching.scheduled import ScheduledCache, entries_of

__all__ = ["Schedule"]

_FORMAT = "diffeff_schedule"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The result of a schedule search; `config()` is what plays it.

    `actions` (both, cond, none) and `sigmas` have one entry per step of the run it was searched on. `predictors` names
    what fills each skipped step, `weights` holds the fitted sums among them, `deltas` those of guidance differences
    (see ScheduledCache). `expected` is the relative root mean square error of the final latents that the search
    expects, `curve` the part of it that each gap between computed steps brings, in the order of the gaps.
    `provenance` says what it was searched on: model, scheduler, prompts, seeds, call, objective.
    """

    actions: tuple[str, ...]
    sigmas: tuple[float, ...] = ()
    predictors: tuple[str, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    deltas: tuple[tuple[float, ...], ...] = ()
    depth: int = 2
    expected: float | None = None
    curve: tuple[float, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def computed(self) -> tuple[int, ...]:
        """Steps that compute the conditional branch."""
        return tuple(k for k, action in enumerate(self.actions) if action != "none")

    @property
    def rows(self) -> int:
        """Branches computed over the run: what it costs, in rows of the denoiser."""
        return 2 * self.actions.count("both") + self.actions.count("cond")

    def config(self) -> ScheduledCache:
        """The method that plays it. Raises ConfigError where its parts do not fit together."""
        return ScheduledCache(
            actions=self.actions,
            sigmas=self.sigmas,
            predictors=self.predictors,
            weights=tuple(w for part in self.weights for w in part),
            deltas=tuple(w for part in self.deltas for w in part),
            depth=self.depth,
        )

    def on(self, sigmas: Sequence[float]) -> tuple[str, ...]:
        """The actions of a run with other noise levels: the computed steps are the nearest ones."""
        return tuple(entry.action for entry in entries_of(self.config(), sigmas))

    # --- JSON ---------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {_FORMAT: VERSION} | asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises ConfigError for another format and for unknown keys."""
        if data.get(_FORMAT) != VERSION:
            raise ConfigError(f"not a schedule of version {VERSION}: {_FORMAT!r} is {data.get(_FORMAT)!r}")
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in data.items() if key != _FORMAT}
        for key in values:
            if key not in known:
                raise ConfigError(f"unknown key {key!r} in the schedule. {nearest(str(key), known)}")
        return cls(**{key: _tuples(value) if key != "provenance" else value for key, value in values.items()})

    def save(self, path: Path) -> Path:
        """Write it as JSON, whole or not at all."""
        return write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises ConfigError naming the file."""
        try:
            data = json.loads(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path} is not a schedule: {error}") from error
        if not isinstance(data, Mapping):
            raise ConfigError(f"{path} is not a schedule: it holds no JSON object")
        return cls.from_dict(data)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value
