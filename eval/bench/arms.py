"""The arms of a bench: what the user named, turned into ways to make the clips, each with everything to make it again.

A spec is a name with options: `balanced`, `plan.json`, `feature_cache@interval=3`, `diffusers:fbcache@threshold=0.2`,
`fewer-steps@steps=12`, `fewer-steps:dpm++@steps=10`. A sweep replaces an arm by the points of its curve.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from diffeff.errors import ConfigError, UnknownName, nearest
from diffeff.eval.bench.peers import PEERS, installed, peer
from diffeff.eval.bench.solvers import SOLVERS, solvers_of
from diffeff.methods.table import TABLE
from diffeff.plan import Plan

__all__ = ["FEWER", "OURS", "Arm", "Wanted", "expand", "plain_arm", "wanted_against", "wanted_plans"]

Kind = Literal["plain", "plan", "peer", "fewer-steps"]
FEWER = "fewer-steps"
OURS = "diffeff"
"""The worker that runs plain, plans and fewer steps."""
_ALL = "all"
_SOLVERS = "fewer-steps:solvers"
_FRACTIONS, _FEW = (0.8, 0.65, 0.5, 0.4, 0.3, 0.2), (0.75, 0.5, 0.35, 0.25)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to make the clips. `spec` names it on the command line; `key` tells apart what could measure otherwise.

    `worker` is the process it runs in. `plan` is a plan's JSON object and `folder` where its artefacts lie.
    """

    kind: Kind
    name: str
    label: str
    spec: str
    steps: int
    options: Mapping[str, Any] = field(default_factory=dict)
    worker: str = OURS
    plan: Mapping[str, Any] | None = None
    folder: str | None = None
    solver: str | None = None

    @property
    def key(self) -> str:
        """16 hex digits over what defines the work: two names for one plan are one arm."""
        names = ("name", "label", "spec", "options") if self.kind == "plan" else ("label", "spec")
        facts = {k: v for k, v in asdict(self).items() if k not in names}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for the worker."""
        return asdict(self) | {"options": dict(self.options)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Arm:
        """The inverse of `to_dict`."""
        return cls(**data)


@dataclass(frozen=True)
class Wanted:
    """A spec that was understood; what depends on the model (the steps) is still open."""

    kind: Kind
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> str:
        return "@".join([self.name, *(f"{k}={_text(v)}" for k, v in self.options.items())])


def wanted_plans(specs: Sequence[str]) -> list[Wanted]:
    """Plans by preset, file or method. Raises UnknownName, ConfigError or PlanFormatError before a model is loaded."""
    found = [Wanted("plan", *_split(spec)) for spec in specs]
    for entry in found:
        _plan(entry)
    return found


def wanted_against(specs: Sequence[str]) -> list[Wanted]:
    """Peers and fewer steps. `all` means every peer that is installed, and fewer steps with every solver."""
    everything = [name for name, found in PEERS.items() if installed(found.package)] + [FEWER, _SOLVERS]
    names = [name for spec in specs for name in (everything if spec == _ALL else [spec])]
    return [_against(spec) for spec in dict.fromkeys(names)]


def _against(spec: str) -> Wanted:
    name, options = _split(spec)
    if name.partition(":")[0] == FEWER:
        _check_fewer(name, options)
        return Wanted("fewer-steps", name, options)
    if name not in PEERS:
        known = [*PEERS, FEWER, _SOLVERS, *(f"{FEWER}:{solver}" for solver in SOLVERS), _ALL]
        raise UnknownName(f"there is nothing called {name!r} to compare with. {nearest(name, known)}")
    return Wanted("peer", name, options)


def _check_fewer(name: str, options: Mapping[str, Any]) -> None:
    solver = name.partition(":")[2]
    if solver not in ("", "solvers", *SOLVERS):
        raise UnknownName(f"there is no solver {solver!r}. {nearest(solver, SOLVERS)}")
    for key, value in options.items():
        if key != "steps" or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}@{key}={value}: fewer steps take steps=N with N >= 1, and nothing else")


def plain_arm(steps: int) -> Arm:
    """The reference: the pipeline as it is, at its full number of steps."""
    return Arm(kind="plain", name="plain", label="plain", spec="plain", steps=steps)


def expand(wanted: Sequence[Wanted], scheduler: Mapping[str, Any], steps: int, sweep: bool) -> list[Arm]:
    """The arms for a model with this `scheduler` (class and config) and number of `steps`, each arm once.

    With `sweep`, each is replaced by the points of its curve, unless its options were given. A plan that is also a
    point of another plan's curve keeps its own name.
    """
    arms = [arm for entry in wanted for arm in _arms(entry, scheduler, steps, sweep)]
    named = {arm.key: arm for arm in reversed(arms) if not (arm.kind == "plan" and arm.options)}
    unique = {arm.key: named.get(arm.key, arm) for arm in arms}
    return list(unique.values())


def _arms(entry: Wanted, scheduler: Mapping[str, Any], steps: int, sweep: bool) -> Iterator[Arm]:
    if entry.kind == "plan":
        yield from _plan_arms(entry, steps, sweep)
    elif entry.kind == "peer":
        yield from _peer_arms(entry, steps, sweep)
    elif entry.name == _SOLVERS:
        for name in solvers_of(scheduler):
            yield from _fewer_arms(replace(entry, name=f"{FEWER}:{name}"), steps, sweep)
    else:
        yield from _fewer_arms(entry, steps, sweep)


# --- plans ----------------------------------------------------------------------------------------------------------
_POINTS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "feature_cache": ("interval", (2, 3, 4, 5, 6, 8)),
    "guidance_skip": ("interval", (2, 3, 4, 6)),
    "kv_downsample": ("stride", (2, 3, 4)),
}
"""Per method, the option whose values draw its curve."""
_FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""For policies with a threshold, factors on the plan's own one."""


def _plan_arms(entry: Wanted, steps: int, sweep: bool) -> Iterator[Arm]:
    own = _plan(entry)
    yield _plan_arm(entry, own, steps)
    if sweep and not entry.options:
        for method, option, value in _curve(own):
            options = {f"{method}.{option}" if len(own.methods) > 1 else option: value}
            point = Wanted("plan", entry.name, options)
            yield _plan_arm(point, _plan(point), steps)


def _plan_arm(entry: Wanted, plan: Plan, steps: int) -> Arm:
    name = Path(entry.name).name
    return Arm(
        kind="plan",
        name=name,
        label=_label(name, entry.options),
        spec=entry.spec,
        steps=steps,
        options=entry.options,
        plan=plan.to_dict(),
        folder=None if plan.folder is None else os.fspath(plan.folder.resolve()),
    )


def _curve(plan: Plan) -> Iterator[tuple[str, str, Any]]:
    """Points along the first method that has a curve."""
    for config in plan.methods:
        if config.name not in _POINTS:
            continue
        option, values = _POINTS[config.name]
        policy, own = getattr(config, "policy", "interval"), config.to_dict()
        if policy == "interval":
            yield from ((config.name, option, value) for value in values if value != own[option])
        elif policy == "threshold":
            yield from ((config.name, policy, round(own[policy] * factor, 6)) for factor in _FACTORS if factor != 1)
        return


def _plan(entry: Wanted) -> Plan:
    """The plan of a preset, a file or a single method, with the options laid over it."""
    base = Plan.from_dict({"diffeff_plan": 1, "methods": [{"use": entry.name}]}) if entry.name in TABLE else None
    plan = base or Plan.of(entry.name.removeprefix("preset:"))
    if not entry.options:
        return plan
    methods = [config.to_dict() for config in plan.methods]
    for key, value in entry.options.items():
        place, option = _place(methods, key, entry)
        place[option] = value
    data = plan.to_dict() | {"methods": methods}
    return Plan.from_dict(data, plan.folder)


def _place(methods: list[dict[str, Any]], key: str, entry: Wanted) -> tuple[dict[str, Any], str]:
    """The method entry that an option `interval` or `feature_cache.interval` belongs to."""
    method, dot, option = key.rpartition(".")
    holders = [m for m in methods if (m["use"] == method if dot else option in m)]
    if len(holders) != 1:
        names = ", ".join(m["use"] for m in methods) or "no method"
        raise ConfigError(
            f"{entry.spec}: {key} fits {len(holders)} methods of this plan ({names}); write METHOD.OPTION"
        )
    return holders[0], option


# --- peers and fewer steps ------------------------------------------------------------------------------------------
def _peer_arms(entry: Wanted, steps: int, sweep: bool) -> Iterator[Arm]:
    found = peer(entry.name)
    points = found.sweep if sweep and not entry.options else (entry.options,)
    shown = {key for point in (*found.sweep, *points) for key in point}
    for given in points:
        yield Arm(
            kind="peer",
            name=entry.name,
            label=_label(found.label, {k: v for k, v in {**found.options, **given}.items() if k in shown}),
            spec=Wanted("peer", entry.name, given).spec,
            steps=steps,
            options={**found.options, **given},
            worker=found.worker,
        )


def _fewer_arms(entry: Wanted, steps: int, sweep: bool) -> Iterator[Arm]:
    solver = entry.name.partition(":")[2] or None
    calls = SOLVERS[solver].calls if solver else 1
    given = entry.options.get("steps")
    fractions = _FRACTIONS if sweep else _FEW
    counts = [given] if given else dict.fromkeys(max(1, round(steps * f / calls)) for f in fractions)
    for count in counts:
        title = f"fewer steps, {SOLVERS[solver].title}" if solver else "fewer steps"
        yield Arm(
            kind="fewer-steps",
            name=entry.name,
            label=f"{title}, {count} step{'s' if count > 1 else ''}",
            spec=f"{entry.name}@steps={count}",
            steps=count,
            options={"steps": count},
            solver=solver,
        )


# --- specs ----------------------------------------------------------------------------------------------------------
def _split(spec: str) -> tuple[str, dict[str, Any]]:
    name, *parts = spec.strip().split("@")
    options = {}
    for part in parts:
        key, sign, value = part.partition("=")
        if not (key and sign and value):
            raise ConfigError(
                f"{spec!r}: {part!r} is no option; expected NAME@option=value, as in feature_cache@interval=3"
            )
        options[key] = _value(value)
    if not name:
        raise ConfigError(f"{spec!r} names nothing; expected NAME or NAME@option=value")
    return name, options


def _value(text: str) -> Any:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return text
    return found if isinstance(found, bool | int | float | str) else text


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _label(title: str, options: Mapping[str, Any]) -> str:
    return ", ".join([title, *(f"{_words(key)} {_text(value)}" for key, value in options.items())])


_SHORT: Mapping[str, str] = {
    "cache_interval": "interval",
    "cross_attention_block_skip_range": "cross every",
    "max_consecutive_cached": "at most",
    "max_skip_steps": "at most",
    "max_warmup_steps": "warm-up",
    "residual_diff_threshold": "threshold",
    "spatial_attention_block_skip_range": "attention every",
}
"""Words for options whose names are too long for a plot."""


def _words(option: str) -> str:
    name = option.rpartition(".")[2]
    return _SHORT.get(name, name.replace("_", " "))
