"""Off is off: attaching and removing a plan, and the lossless preset, leave every family bit-identical."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, make, run

from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan

PLANS = {
    "lossless": Plan.preset("lossless"),
    "every method": Plan.of(
        {
            "diffeff_plan": 1,
            "methods": [
                {"use": "feature_cache", "site": "segment", "first": 1, "last": 1},
                {"use": "kv_downsample", "min_tokens": 4},
                {"use": "int8_weights", "min_features": 8},
            ],
        }
    ),
}


def traces(pipe: object) -> dict[str, object]:
    """Everything of the pipeline that a plan could leave behind: instance attributes, module types, parameters."""
    found: dict[str, object] = {}
    for name, component in vars(pipe).items():
        found[name] = sorted(getattr(component, "__dict__", {}))
        if isinstance(component, torch.nn.Module):
            for path, module in component.named_modules():
                found[f"{name}.{path}"] = (type(module), sorted(module.__dict__))
            found[f"{name}:keys"] = list(component.state_dict())
            found[f"{name}:ids"] = [id(p) for p in component.parameters()]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_preset_is_bit_identical_and_leaves_nothing(family: str) -> None:
    pipe = make(family)
    plain = run(family, pipe)
    before = traces(pipe)
    accelerated = DiffEffPipeline(pipe, plan="lossless")
    assert torch.equal(run(family, accelerated), plain)
    assert accelerated.report is not None
    assert all(share.computed == share.total for share in accelerated.report.steps.values())
    accelerated.remove()
    assert traces(pipe) == before
    assert torch.equal(run(family, pipe), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_removed_plan_leaves_nothing(family: str) -> None:
    pipe = make(family)
    plain = run(family, pipe)
    before = traces(pipe)
    accelerated = DiffEffPipeline(pipe)
    applied = 0
    for config in PLANS["every method"].methods:
        check = Plan([config]).check(accelerated.denoisers)[0]
        if not check.applies:
            assert check.reason
            continue
        applied += 1
        accelerated.apply([config])
        run(family, accelerated)
        accelerated.remove()
        assert traces(pipe) == before
        assert torch.equal(run(family, pipe), plain)
    assert applied


def test_remove_is_idempotent_and_apply_replaces() -> None:
    pipe = make("wan")
    plain = run("wan", pipe)
    accelerated = DiffEffPipeline(pipe).apply("balanced").apply("balanced").apply("lossless")
    assert torch.equal(run("wan", accelerated), plain)
    accelerated.remove().remove()
    assert torch.equal(run("wan", accelerated), plain)


def test_use_enable_use_disable_use() -> None:
    pipe = DiffEffPipeline(make("flux"))
    plain = run("flux", pipe)
    pipe.apply("balanced")
    once = run("flux", pipe)
    assert torch.equal(run("flux", pipe), once)
    pipe.remove()
    assert torch.equal(run("flux", pipe), plain)
