"""What holds for every method of the table, alone and in pairs, on several families."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from every import CONFIGS, EXACT, STEPS, attempt, denoisers, home, label, plain, refusal
from tiny import make, run

from diffeff.core.config import Config, knobs
from diffeff.errors import ConfigError, MethodInapplicable, PlanConflict
from diffeff.methods.table import TABLE, config_class
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan, check_methods
from diffeff.presets import PRESETS

FAMILIES = ["wan", "cogvideox", "flux-cfg", "sd", "dit"]
Pair = tuple[Config, Config]


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


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_plans_keep_every_option(config: Config) -> None:
    plan = Plan([config])
    assert Plan.from_dict(plan.to_dict()) == plan
    assert plan.to_dict()["methods"] == [config.to_dict()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_alone(config: Config, family: str) -> None:
    """It acts and says so, is reproducible, changes something, and comes off without a trace; or is refused whole."""
    pipe = DiffEffPipeline(make(family))
    keys = list(pipe.denoisers[0].module.state_dict())
    if refusal(config, family):
        with pytest.raises((MethodInapplicable, ConfigError), match=config.name):
            run(family, pipe.apply([config]), steps=STEPS)
    else:
        first = run(family, pipe.apply([config]), steps=STEPS)
        assert pipe.report is not None
        outcome = pipe.report.methods[0]
        assert outcome.engaged, outcome.reason
        assert outcome.reason
        assert pipe.report.to_dict()["methods"][0]["method"] == config.name
        assert torch.isfinite(first).all()
        error = ((first - plain(family)).norm() / plain(family).norm()).item()
        assert error < 1e-5 if config.name in EXACT else error > 0, error
        assert torch.equal(first, torch.as_tensor(attempt(config, family)))
    pipe.remove()
    assert torch.equal(run(family, pipe, steps=STEPS), plain(family))
    assert list(pipe.denoisers[0].module.state_dict()) == keys


# --- pairs --------------------------------------------------------------------------------------------------------
@cache
def verdict(pair: Pair, family: str) -> str:
    """Why the pair is refused; empty where it is not. Nothing is attached."""
    methods = Plan(pair).build()
    for method in methods:
        method.bind(denoisers(family))
    try:
        check_methods(methods, denoisers(family))
    except PlanConflict as error:
        return str(error)
    return ""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_composes_or_is_refused_with_a_way_out(family: str) -> None:
    able = [config for config in CONFIGS if not refusal(config, family)]
    assert able
    for pair in combinations(able, 2):
        reason = verdict(pair, family)
        if reason:
            assert all(config.name in reason for config in pair), reason
            assert any(word in reason for word in ("Instead", "Use one of them", "Leave out one")), reason


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_twice_the_same_is_refused_or_composes(config: Config) -> None:
    """A method that claims anything cannot stand twice in a plan."""
    reason = verdict((config, config), home(config))
    assert bool(reason) == bool(config.build().claims), reason
    assert config.name in reason or not reason


def signature(config: Config) -> tuple[Any, ...]:
    """What decides whether two methods can hold together: where it stands, and what it claims, needs and breaks."""
    method = config.build()
    return method.layer, method.claims, method.needs, method.breaks


@pytest.mark.parametrize("family", ["wan", "sd"])
def test_those_that_compose_run_together(family: str) -> None:
    """A pair for each two kinds of claims: finite, reproducible, both report, and nothing stays behind."""
    able = [config for config in reversed(CONFIGS) if not refusal(config, family)]
    kinds = list({signature(config): config for config in able}.values())
    pipe = DiffEffPipeline(make(family))
    for pair in combinations(kinds[::-1], 2):
        if verdict(pair, family):
            continue
        names = " + ".join(label(config) for config in pair)
        first = run(family, pipe.apply(pair), steps=STEPS)
        assert torch.isfinite(first).all(), names
        assert pipe.report is not None
        assert {row.method for row in pipe.report.methods} == {config.name for config in pair}
        assert all(row.reason for row in pipe.report.methods), names
        assert torch.equal(run(family, pipe, steps=STEPS), first), names
    pipe.remove()
    assert torch.equal(run(family, pipe, steps=STEPS), plain(family))


def test_a_refused_pair_leaves_the_plan_before_it() -> None:
    pipe = DiffEffPipeline(make("wan"))
    able = [config for config in CONFIGS if not refusal(config, "wan")]
    refused = [pair for pair in combinations(able, 2) if verdict(pair, "wan")]
    for pair in {verdict(pair, "wan").split()[-1]: pair for pair in refused}.values():
        with pytest.raises(PlanConflict):
            pipe.apply(pair)
    assert not pipe.plan.methods
    assert torch.equal(run("wan", pipe, steps=STEPS), plain("wan"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_plans_that_apply_everywhere(name: str) -> None:
    plan = Plan.preset(name)
    for family in FAMILIES:
        pipe = DiffEffPipeline(make(family), plan=plan)
        assert torch.isfinite(run(family, pipe, steps=12)).all()
    assert PRESETS[name].summary
