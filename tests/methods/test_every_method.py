"""What holds for every method of the table, alone and in pairs, on several families."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import combinations
from typing import Any

import diffusers
import pytest
import torch
from small import entries
from tiny import call_kwargs, make, run

from diffeff.core.config import Config, knobs
from diffeff.errors import MethodInapplicable, PlanConflict
from diffeff.methods.table import TABLE, config_class
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan, check_methods
from diffeff.presets import PRESETS

FAMILIES = ["wan", "cogvideox", "flux-cfg", "sd", "dit"]
STEPS = 8
ENTRIES = entries(TABLE)
Entry = dict[str, Any]


def plan_of(*chosen: Entry) -> Plan:
    return Plan.from_dict({"diffeff_plan": 1, "methods": list(chosen)})


def label(entry: Entry) -> str:
    return "-".join(str(v) for v in list(entry.values())[:2])


@cache
def plain(family: str) -> torch.Tensor:
    """The output without any plan."""
    return run(family, make(family), steps=STEPS)


@cache
def denoisers(family: str) -> Any:
    """The denoisers of a pipeline that nothing is applied to."""
    return DiffEffPipeline(make(family)).denoisers


def refusal(entry: Entry, family: str) -> str:
    """Why the method cannot act on this family; empty where it can."""
    rows = plan_of(entry).check(denoisers(family))
    assert all(row.reason for row in rows)
    return next((row.reason for row in rows if not row.applies), "")


def home(entry: Entry, families: Iterable[str] = ("wan", "sd", "flux-cfg")) -> str:
    """The first of these families that the method acts on."""
    reasons = {family: refusal(entry, family) for family in families}
    able = [family for family, reason in reasons.items() if not reason]
    if not able:
        pytest.fail(f"{entry['use']} acts on no family: give it settings in tests/support/small.py. {reasons}")
    return able[0]


@pytest.mark.parametrize("name", TABLE)
def test_config_tells_name_summary_and_help_of_every_option(name: str) -> None:
    config = config_class(name)
    assert config.name == name
    assert config.summary
    assert config.__doc__ is not None
    for knob in knobs(config):
        assert knob.help
        assert knob.range
    assert isinstance(config(), Config)
    assert config.from_dict(config().to_dict()) == config()


@pytest.mark.parametrize("entry", ENTRIES, ids=label)
def test_plans_keep_every_option(entry: Entry) -> None:
    plan = plan_of(entry)
    assert Plan.from_dict(plan.to_dict()) == plan
    assert plan.to_dict()["methods"][0].items() >= {k: v for k, v in entry.items() if not isinstance(v, tuple)}.items()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("entry", ENTRIES, ids=label)
def test_alone(entry: Entry, family: str) -> None:
    """It acts and says so, is reproducible, changes something, and comes off without a trace; or is refused whole."""
    pipe, plan = DiffEffPipeline(make(family)), plan_of(entry)
    keys = list(pipe.denoisers[0].module.state_dict())
    if refusal(entry, family):
        with pytest.raises(MethodInapplicable, match=entry["use"]):
            pipe.apply(plan)
    else:
        pipe.apply(plan)
        first = run(family, pipe, steps=STEPS)
        assert pipe.report is not None
        outcome = pipe.report.methods[0]
        assert outcome.engaged, outcome.reason
        assert outcome.reason
        assert pipe.report.to_dict()["methods"][0]["method"] == entry["use"]
        assert torch.isfinite(first).all()
        assert not torch.equal(first, plain(family))
        assert torch.equal(run(family, pipe, steps=STEPS), first)
        pipe.remove()
    assert torch.equal(run(family, pipe, steps=STEPS), plain(family))
    assert list(pipe.denoisers[0].module.state_dict()) == keys


@pytest.mark.parametrize("entry", ENTRIES, ids=label)
def test_interrupts_other_shapes_and_second_applications_leave_nothing(entry: Entry) -> None:
    family = home(entry)
    pipe = DiffEffPipeline(make(family), plan=plan_of(entry))
    first = run(family, pipe, steps=STEPS)

    def stop(pipeline: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == STEPS // 2:
            raise InterruptedError
        return kwargs

    with pytest.raises(InterruptedError):
        pipe(**call_kwargs(family, pipe, batch=2, steps=STEPS), callback_on_step_end=stop)
    assert torch.equal(run(family, pipe, steps=STEPS), first)
    assert torch.isfinite(run(family, pipe, steps=STEPS, size=(8, 8), seed=1)).all()
    pipe.apply(plan_of(entry))
    assert torch.equal(run(family, pipe, steps=STEPS), first)


@pytest.mark.parametrize("entry", ENTRIES, ids=label)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy 2 about their schedulers
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
def test_another_scheduler_between_runs(entry: Entry) -> None:
    family = home(entry)
    pipe = DiffEffPipeline(make(family), plan=plan_of(entry))
    run(family, pipe, steps=STEPS)
    other: Any = diffusers.HeunDiscreteScheduler if family == "sd" else diffusers.FlowMatchHeunDiscreteScheduler
    if family == "wan":
        other = diffusers.FlowMatchEulerDiscreteScheduler
    before = pipe.wrapped.scheduler
    pipe.wrapped.scheduler = other.from_config(before.config) if family != "wan" else other(shift=3.0)
    assert torch.isfinite(run(family, pipe, steps=STEPS)).all()
    pipe.wrapped.scheduler = before
    pipe.remove()
    assert torch.equal(run(family, pipe, steps=STEPS), plain(family))


# --- pairs --------------------------------------------------------------------------------------------------------
def signature(entry: Entry) -> tuple[Any, ...]:
    """What decides whether two methods can hold together: where it stands, and what it claims, needs and breaks."""
    (method,) = plan_of(entry).build()
    return method.layer, method.claims, method.needs, method.breaks


REPRESENTATIVES = list({signature(entry): entry for entry in reversed(ENTRIES)}.values())[::-1]


def verdict(pair: tuple[Entry, Entry], family: str) -> str:
    """Why the pair is refused; empty where it is not. Nothing is attached."""
    methods = plan_of(*pair).build()
    for method in methods:
        method.bind(denoisers(family))
    try:
        check_methods(methods, denoisers(family))
    except PlanConflict as error:
        return str(error)
    return ""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_composes_or_is_refused_with_a_way_out(family: str) -> None:
    able = [entry for entry in ENTRIES if not refusal(entry, family)]
    assert able
    for pair in combinations(able, 2):
        reason = verdict(pair, family)
        if reason:
            assert all(entry["use"] in reason for entry in pair), reason
            assert any(word in reason for word in ("Instead", "Use one of them", "Leave out one")), reason


@pytest.mark.parametrize("entry", ENTRIES, ids=label)
def test_twice_the_same_is_refused_or_composes(entry: Entry) -> None:
    """A method that claims anything cannot stand twice in a plan."""
    reason = verdict((entry, entry), home(entry))
    (method,) = plan_of(entry).build()
    assert bool(reason) == bool(method.claims), reason


@pytest.mark.parametrize("pair", list(combinations(REPRESENTATIVES, 2)), ids=lambda p: f"{label(p[0])}+{label(p[1])}")
def test_pairs_run_together_or_are_refused(pair: tuple[Entry, Entry]) -> None:
    """One pair for each two kinds of claims, on the first family that both act on."""
    shared = [f for f in ("wan", "sd", "flux-cfg") if not any(refusal(entry, f) for entry in pair)]
    if not shared:
        pytest.skip("no family has both")
    family = shared[0]
    pipe = DiffEffPipeline(make(family))
    if verdict(pair, family):
        with pytest.raises(PlanConflict):
            pipe.apply(plan_of(*pair))
    else:
        pipe.apply(plan_of(*pair))
        first = run(family, pipe, steps=STEPS)
        assert torch.isfinite(first).all()
        assert torch.equal(run(family, pipe, steps=STEPS), first)
        pipe.remove()
    assert torch.equal(run(family, pipe, steps=STEPS), plain(family))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_plans_that_apply_everywhere(name: str) -> None:
    plan = Plan.preset(name)
    for family in FAMILIES:
        pipe = DiffEffPipeline(make(family), plan=plan)
        assert torch.isfinite(run(family, pipe, steps=12)).all()
    assert PRESETS[name].summary
