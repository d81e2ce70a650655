"""HarmoniCa: a table is played to the letter, holds at other lengths, and is refused where it does not fit."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from tiny import make, run

from diffeff.core.run import Clock
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.published.harmonica import HarmoniCa
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan


def table(pipe: DiffEffPipeline, steps: int, seed: int = 0) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modules of a model, and random rows for them; the first computes all."""
    sites = tuple(m.name for m in pipe.denoisers[0].modules)
    drawn = torch.randint(0, 2, (steps, len(sites)), generator=torch.Generator().manual_seed(seed))
    drawn[0] = 1
    return sites, tuple("".join(str(int(v)) for v in row) for row in drawn)


def times(family: str, steps: int) -> tuple[float, ...]:
    """The noise levels of a run."""
    scheduler = make(family).scheduler
    scheduler.set_timesteps(steps)
    return tuple(scheduler.sigmas[:steps].tolist())


def innermost(site: Any) -> torch.nn.Module:
    """A layer that runs exactly when the module does."""
    return next(m for m in site.module.modules() if isinstance(m, torch.nn.Linear))


@pytest.mark.parametrize("family", ["wan", "sd3", "wan-2expert"])
def test_what_the_table_says_is_computed_and_nothing_else(family: str) -> None:
    steps, pipe = 8, DiffEffPipeline(make(family))
    sites, rows = table(pipe, steps)
    pipe.apply(HarmoniCa(sites=sites, times=times(family, steps), router=rows))
    seen: dict[str, set[int]] = defaultdict(set)

    def note(name: str) -> Any:
        return lambda *_: seen[name].add(pipe._session.run.clock.index)  # type: ignore[union-attr]

    for denoiser in pipe.denoisers:
        denoiser.module.register_forward_pre_hook(note(denoiser.name))
        for site in denoiser.modules:
            innermost(site).register_forward_hook(note(f"{denoiser.name}.{site.name}"))
    run(family, pipe, steps=steps)
    for denoiser in pipe.denoisers:
        called = seen[denoiser.name]
        for column, name in enumerate(sites):
            wanted = {i for i in called if rows[i][column] == "1" or i == min(called)}
            assert seen[f"{denoiser.name}.{name}"] == wanted


def test_an_all_computing_table_is_bit_identical() -> None:
    pipe = DiffEffPipeline(make("wan"))
    sites, rows = table(pipe, 5)
    pipe.apply(HarmoniCa(sites=sites, times=times("wan", 5), router=("1" * len(sites),) * len(rows)))
    assert torch.equal(run("wan", pipe, steps=5), run("wan", make("wan"), steps=5))


def test_a_column_may_stand_for_a_kind() -> None:
    kinds = HarmoniCa(sites=("self", "cross", "feed_forward"), times=(1.0, 0.5), router=("111", "011"))
    pipe = DiffEffPipeline(make("wan"), kinds)
    run("wan", pipe, steps=6)
    assert pipe.report is not None
    skipped = pipe.report.methods[0].details["skipped_by_kind"]
    assert skipped["cross"] == skipped["feed_forward"] == []
    assert skipped["self"] != []


def test_a_named_module_goes_before_its_kind() -> None:
    kinds = ("self", "cross", "feed_forward", "blocks.1.attn1")
    pipe = DiffEffPipeline(make("wan"), HarmoniCa(sites=kinds, times=(1.0, 0.0), router=("1111", "0001")))
    scheduler = pipe.wrapped.scheduler
    run("wan", pipe, steps=6)
    late = sum(sigma < 0.5 for sigma in scheduler.sigmas[:6].tolist())
    assert pipe.report is not None
    found, modules = pipe.report.methods[0].details, len(pipe.denoisers[0].modules)
    branches = found["total"] // (6 * modules)
    assert late > 0
    assert found["total"] - found["computed"] == branches * late * (modules - 1)


def test_rows_are_found_by_noise_at_other_lengths() -> None:
    config = HarmoniCa(sites=("self",), times=(1.0, 0.75, 0.5, 0.25), router=("1", "0", "1", "0"))
    same = Clock(total=4, sigmas=torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    assert config.row_of(same) == (0, 1, 2, 3)
    twice = Clock(total=8, sigmas=torch.linspace(1, 0, 9))
    assert config.row_of(twice) == (0, 0, 1, 1, 2, 2, 3, 3)
    half = Clock(total=2, sigmas=torch.tensor([1.0, 0.5, 0.0]))
    assert config.row_of(half) == (0, 2)


def test_without_a_router_it_says_how_to_get_one() -> None:
    with pytest.raises(MethodInapplicable, match=r"diffeff train-router MODEL -o plan\.json"):
        DiffEffPipeline(make("wan"), HarmoniCa())


def test_a_router_of_another_model_is_refused() -> None:
    pipe = DiffEffPipeline(make("wan"))
    sites, rows = table(pipe, 6)
    config = HarmoniCa(sites=sites, times=times("wan", 6), router=rows)
    with pytest.raises(MethodInapplicable, match="Train one for this model"):
        DiffEffPipeline(make("sd3"), config)
    with pytest.raises(MethodInapplicable, match=r"blocks\.0\.attn1"):
        pipe.apply(HarmoniCa(sites=sites[1:], times=(1.0,), router=(rows[0][1:],)))


@pytest.mark.parametrize(
    "options",
    [
        {"sites": ("self",), "times": (1.0,), "router": ("1", "0")},
        {"sites": ("self",), "times": (1.0,), "router": ("10",)},
        {"sites": ("self",), "times": (1.0,), "router": ("2",)},
    ],
)
def test_tables_that_do_not_hold_together_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="harmonica"):
        HarmoniCa(**options)


def test_a_table_survives_its_plan_file(tmp_path: Any) -> None:
    config = HarmoniCa(sites=("self", "cross"), times=(1.0, 0.5), router=("11", "01"), note="made by hand")
    path = Plan([config]).save(tmp_path / "plan.json")
    assert Plan.load(path).methods == (config,)
    assert config.share == 0.75
