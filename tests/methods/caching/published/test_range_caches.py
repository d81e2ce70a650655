"""Module and range caches: FORA, Delta-DiT, BlockDance, ProfilingDiT, Elastic-Cache, AdaCache."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import make, run

from diffeff.core.config import Config
from diffeff.core.method import AttentionCall
from diffeff.core.run import Clock
from diffeff.errors import ConfigError, MethodInapplicable
from diffeff.methods.caching.entries import falling, thousandths
from diffeff.methods.caching.published.adacache import AdaCache
from diffeff.methods.caching.published.blockdance import BlockDance
from diffeff.methods.caching.published.delta_dit import DeltaDiT
from diffeff.methods.caching.published.elastic import ElasticCache, attended
from diffeff.methods.caching.published.fora import FORA
from diffeff.methods.caching.published.profilingdit import ProfilingDiT
from diffeff.methods.caching.ranges import runs_of
from diffeff.pipeline import DiffEffPipeline


def details(config: Config, family: str = "wan", steps: int = 10) -> Any:
    """The report of one run."""
    pipe = DiffEffPipeline(make(family), [config])
    run(family, pipe, steps=steps)
    assert pipe.report is not None
    return pipe.report.methods[0].details


def skipped(config: Config, family: str = "wan", steps: int = 10) -> dict[str, list[int]]:
    """Skipped steps by run of blocks, named by the numbers of its first and last block."""
    rows = details(config, family, steps)
    return {name: row["skipped_steps"] for name, row in rows.items() if name != "decided"}


EXACT = [FORA(interval=1), DeltaDiT(interval=1), BlockDance(interval=1), ElasticCache(threshold=0.0)]


@pytest.mark.parametrize("config", [*EXACT, AdaCache(limits=(1.0,), intervals=(1,))], ids=lambda c: c.name)
def test_exact_settings_are_bit_identical(config: Config) -> None:
    pipe = DiffEffPipeline(make("wan"), [config])
    assert torch.equal(run("wan", pipe, steps=5), run("wan", make("wan"), steps=5))


def test_fora_computes_every_nth_step_of_all_modules() -> None:
    assert details(FORA(interval=3))["skipped_steps"] == [1, 2, 4, 5, 7, 8]


def test_delta_dit_skips_the_rear_then_the_front() -> None:
    found = skipped(DeltaDiT(blocks=0.75, gate=0.5))
    assert found == {
        "transformer.blocks.0..blocks.0": [5, 7, 9],
        "transformer.blocks.1..blocks.2": [1, 3, 5, 7, 9],
        "transformer.blocks.3..blocks.3": [1, 3],
    }
    apart = skipped(DeltaDiT(blocks=0.25, gate=0.5))
    assert apart == {"transformer.blocks.0..blocks.0": [5, 7, 9], "transformer.blocks.3..blocks.3": [1, 3]}


def test_blockdance_starts_from_the_kept_output_itself() -> None:
    pipe = DiffEffPipeline(make("wan"), [BlockDance(interval=2, blocks=0.5, start=0.2, stop=0.9)])
    entered: list[torch.Tensor] = []
    block = pipe.wrapped.transformer.blocks[2]
    block.register_forward_pre_hook(lambda m, args: entered.append(args[0].clone()))
    run("wan", pipe, steps=10, guidance=False)
    assert pipe.report is not None
    steps = pipe.report.methods[0].details["transformer"]["skipped_steps"]
    assert steps == [2, 4, 6, 8]
    for i in range(1, 10):
        assert torch.equal(entered[i], entered[i - 1]) is (i in steps)


def test_profilingdit_keeps_one_residual_per_run_and_refreshes_ever_more_often() -> None:
    found = skipped(ProfilingDiT(blocks=(0, 2, 3)), steps=20)
    assert list(found) == ["transformer.blocks.0..blocks.0", "transformer.blocks.2..blocks.3"]
    (steps,) = {tuple(steps) for steps in found.values()}
    done = [i for i in range(20) if i not in steps and i > 2]
    gaps = [b - a for a, b in zip([2, *done], done, strict=False)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > gaps[-1]


def test_the_authors_refresh_table_comes_out_to_rounding() -> None:
    computed = falling(Clock(total=50), 6, 12, 2).computed
    found = sorted(i for i in computed if i >= 6)
    assert len(found) == 8
    assert max(abs(a - b) for a, b in zip(found, [6, 18, 26, 32, 38, 42, 46, 48], strict=True)) <= 2


@pytest.mark.parametrize("options", [{}, {"blocks": (9,)}])
def test_profilingdit_without_a_profile_or_with_another_models_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MethodInapplicable, match="block_drift"):
        DiffEffPipeline(make("wan"), [ProfilingDiT(**options)])


def test_runs_are_maximal() -> None:
    assert runs_of((5, 0, 2, 1, 7, 8)) == [(0, 2), (5, 5), (7, 8)]
    assert runs_of(()) == []


# --- cascades -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["wan", "flux", "dit"])
@pytest.mark.parametrize("cascade", ["refresh", "reuse"])
def test_once_the_cascade_tips_deeper_runs_follow(family: str, cascade: Any) -> None:
    config = ElasticCache(cascade=cascade, threshold=0.25, anchors=8, first=1, segments=4, cap=16)
    rows = [set(steps) for steps in skipped(config, family, steps=12).values()]
    assert any(rows)
    for shallow, deep in pairwise(rows):
        # refresh: what is computed shallow is computed deep; reuse: what is reused shallow is reused deep
        assert deep <= shallow if cascade == "refresh" else shallow <= deep


def test_anchors_are_the_most_attended_image_tokens() -> None:
    k = torch.zeros(1, 1, 12, 4)
    k[0, 0, [5, 9], 0] = 5.0
    q = torch.zeros(1, 1, 12, 4)
    q[..., 0] = 4.0
    call = AttentionCall(q, k, k, {})
    assert sorted(attended(call, 0, 12, 2).tolist()) == [5, 9]
    assert sorted(attended(call, 4, 12, 2).tolist()) == [1, 5]


def test_unets_are_refused_with_a_way_out() -> None:
    for config in (ElasticCache(), BlockDance(), DeltaDiT(), ProfilingDiT(blocks=(1,))):
        with pytest.raises(MethodInapplicable, match="deepcache"):
            DiffEffPipeline(make("sd"), [config])


# --- AdaCache -----------------------------------------------------------------------------------------------------
def test_all_modules_and_branches_follow_the_monitored_one() -> None:
    found = details(AdaCache(), steps=14)
    kinds = list(found["skipped_by_kind"].values())
    assert kinds[0]
    assert all(steps == kinds[0] for steps in kinds)
    per_module = 28 - 2 * len(kinds[0])
    assert found["computed"] == found["modules"] * per_module


def test_a_coarser_codebook_skips_more() -> None:
    quick = details(AdaCache(limits=(10.0,), intervals=(4,), last=0), steps=12)["skipped_steps"]
    assert quick == [2, 3, 4, 6, 7, 8, 10, 11]
    slow = details(AdaCache(limits=(1e-9, 10.0), intervals=(4, 2), last=0), steps=12)["skipped_steps"]
    assert slow == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("options", [{"limits": (0.2, 0.1), "intervals": (2, 1)}, {"limits": (), "intervals": ()}])
def test_odd_codebooks_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="rising limits"):
        AdaCache(**options)


def test_windows_in_timesteps_fall_back_to_progress() -> None:
    odd = Clock(total=4, timesteps=torch.tensor([1.6, 0.9, 0.1, -1.5]))
    assert thousandths(odd) == (1000.0, 750.0, 500.0, 250.0)
