"""What holds for every method of the table, alone and in pairs, on several families."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from tiny import make, run

from diffeff.core.config import Config, knobs
from diffeff.errors import PlanConflict
from diffeff.methods.table import TABLE, config_class
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan
from diffeff.presets import PRESETS

FAMILIES = ["wan", "cogvideox", "flux-cfg", "sd", "dit"]
# Settings at which a method acts on models as tiny as these.
SMALL: dict[str, dict[str, Any]] = {
    "feature_cache": {"first": 1, "last": 1},
    "guidance_skip": {"first": 1, "last": 1},
    "kv_downsample": {"min_tokens": 4},
    "int8_weights": {"min_features": 8},
}
SEGMENT = {"use": "feature_cache", "site": "segment", "first": 1, "last": 1}
ENTRIES = [*({"use": name, **SMALL.get(name, {})} for name in TABLE), SEGMENT]


def plan_of(*entries: dict[str, Any]) -> Plan:
    return Plan.from_dict({"diffeff_plan": 1, "methods": list(entries)})


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: "-".join(str(v) for v in list(e.values())[:2]))
def test_alone(entry: dict[str, Any], family: str) -> None:
    """It acts and says so, is reproducible, changes something, and comes off without a trace."""
    pipe = DiffEffPipeline(make(family))
    plain = run(family, pipe, steps=8)
    keys = list(pipe.denoisers[0].module.state_dict())
    plan = plan_of(entry)
    assert all(row.applies for row in plan.check(pipe.denoisers))
    pipe.apply(plan)
    first = run(family, pipe, steps=8)
    assert pipe.report is not None
    outcome = pipe.report.methods[0]
    assert outcome.engaged, outcome.reason
    assert outcome.reason
    assert pipe.report.to_dict()["methods"][0]["method"] == entry["use"]
    assert torch.isfinite(first).all()
    assert not torch.equal(first, plain)
    assert torch.equal(run(family, pipe, steps=8), first)
    pipe.remove()
    assert torch.equal(run(family, pipe, steps=8), plain)
    assert list(pipe.denoisers[0].module.state_dict()) == keys


@pytest.mark.parametrize("family", ["wan", "sd"])
@pytest.mark.parametrize("pair", list(combinations(ENTRIES, 2)), ids=lambda p: f"{p[0]['use']}+{p[1]['use']}")
def test_in_pairs_they_compose_or_are_refused(pair: tuple[dict[str, Any], dict[str, Any]], family: str) -> None:
    pipe = DiffEffPipeline(make(family))
    plain = run(family, pipe, steps=8)
    if all(entry["use"] == "feature_cache" for entry in pair):
        with pytest.raises(PlanConflict, match=r"feature_cache and feature_cache .*(Instead|Use one of them)"):
            pipe.apply(plan_of(*pair))
    else:
        pipe.apply(plan_of(*pair))
        first = run(family, pipe, steps=8)
        assert torch.isfinite(first).all()
        assert torch.equal(run(family, pipe, steps=8), first)
        pipe.remove()
    assert torch.equal(run(family, pipe, steps=8), plain)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_plans_that_apply_everywhere(name: str) -> None:
    plan = Plan.preset(name)
    for family in FAMILIES:
        pipe = DiffEffPipeline(make(family), plan=plan)
        assert torch.isfinite(run(family, pipe, steps=12)).all()
    assert PRESETS[name].summary
