"""The module site: outputs of attention and feed-forward modules, predicted by a recipe on tiny real models."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import make, run

from diffeff.anatomy.types import ModuleKind
from diffeff.core.config import knob
from diffeff.errors import MethodInapplicable
from diffeff.methods.caching.module_cache import Modules
from diffeff.methods.caching.policy import Interval
from diffeff.methods.caching.predictor import Polynomial
from diffeff.methods.caching.recipe import CacheConfig, Recipe
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Broadcast(CacheConfig):
    """Attention outputs of one kind, computed every n-th step: what Pyramid Attention Broadcast does."""

    name: ClassVar[str] = "broadcast"
    summary: ClassVar[str] = "for tests"
    kinds: tuple[str, ...] = knob(("self", "joint"), "kinds of modules")
    interval: int = knob(2, "compute every n-th step", low=1)
    order: int = knob(0, "of the predictor", low=0)
    first_block: int = knob(0, "first block", low=0)

    def recipe(self) -> Recipe:
        kinds: tuple[ModuleKind, ...] = self.kinds  # type: ignore[assignment]
        return Recipe(
            Modules(kinds, self.first_block), Interval(self.interval), Polynomial(self.order), exact=self.interval == 1
        )


def count_calls(pipe: object, kinds: set[str]) -> Counter[str]:
    """How often each attention was really computed, filled while the pipeline runs."""
    calls: Counter[str] = Counter()
    for denoiser in pipe.denoisers:  # type: ignore[attr-defined]
        for site in denoiser.modules:
            if site.kind in kinds:
                site.module.to_q.register_forward_hook(lambda *_, name=site.name: calls.update([name]))
    return calls


@pytest.mark.parametrize("family", ["wan", "ltx", "flux-cfg", "sd3", "sd", "animatediff", "dit"])
def test_interval_one_is_exact_and_interval_two_halves_the_calls(family: str) -> None:
    pipe = DiffEffPipeline(make(family))
    plain = run(family, pipe, steps=6)
    pipe.apply(Plan([Broadcast(interval=1)]))
    assert torch.equal(run(family, pipe, steps=6), plain)
    pipe.apply(Plan([Broadcast(interval=2)]))
    found = run(family, pipe, steps=6)
    report = pipe.report
    assert report is not None
    details = report.methods[0].details
    assert report.methods[0].engaged
    assert details["computed"] == details["total"] / 2
    assert details["bytes_held"] > 0
    assert not torch.equal(found, plain)
    pipe.remove()
    assert torch.equal(run(family, pipe, steps=6), plain)


def test_modules_outside_the_choice_still_run() -> None:
    pipe = DiffEffPipeline(make("wan"))
    pipe.apply(Plan([Broadcast(kinds=("cross",), interval=3, first_block=1)]))
    calls = count_calls(pipe, {"self", "cross"})
    run("wan", pipe, steps=6)
    assert {n for name, n in calls.items() if "attn1" in name} == {12}  # 6 steps, two branches
    assert {n for name, n in calls.items() if "attn2" in name and ".0." in name} == {12}
    skipped = {name for name, n in calls.items() if "attn2" in name and n == 4}
    assert skipped == {s.name for s in pipe.denoisers[0].modules if s.kind == "cross" and s.block >= 1}


def test_branches_keep_histories_apart() -> None:
    """Diffusers' PAB reuses the conditional attention for the unconditional branch where these are separate calls."""
    pipe = DiffEffPipeline(make("wan"))
    pipe.apply(Plan([Broadcast(interval=2)]))
    outputs: list[torch.Tensor] = []
    site = next(s for s in pipe.denoisers[0].modules if s.kind == "self" and s.block == 1)  # past the first text
    site.module.register_forward_hook(lambda module, args, out: outputs.append(out.clone()))
    run("wan", pipe, steps=4)
    cond, uncond = outputs[0::2], outputs[1::2]
    assert torch.equal(cond[0], cond[1])
    assert torch.equal(uncond[0], uncond[1])
    assert not torch.equal(cond[1], uncond[1])
    assert not torch.equal(cond[1], cond[2])


def test_a_kind_the_model_lacks_is_refused_by_name() -> None:
    pipe = DiffEffPipeline(make("wan"))
    with pytest.raises(MethodInapplicable, match=r"no temporal module.*cross, feed_forward, self"):
        pipe.apply(Plan([Broadcast(kinds=("temporal",))]))
