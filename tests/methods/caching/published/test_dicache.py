"""DiCache: the probe decides, and steers the prediction along the last two residuals."""

from __future__ import annotations

import pytest
import torch
from patterns import our_run
from tiny import make, run

from diffeff.methods.caching.informed import ProbeAligned
from diffeff.methods.caching.published.dicache import DiCache
from diffeff.methods.caching.track import Moment, Snapshot


def snapshots(*probes: float) -> list[Snapshot]:
    return [Snapshot(Moment(i, 1.0 - i, i, 9), (None,), torch.tensor([p])) for i, p in enumerate(probes)]


@pytest.mark.parametrize(("now", "gamma"), [(1.0, 1.0), (1.2, 1.2), (9.0, 1.5), (0.5, 1.0)])
def test_gamma_is_the_way_the_probe_has_gone(now: float, gamma: float) -> None:
    weights = ProbeAligned().weigh(snapshots(0.0, 1.0), Moment(2, -1.0, 2, 7), torch.tensor([now]))
    assert weights == pytest.approx((1 - gamma, gamma))


def test_one_snapshot_or_a_probe_that_stood_still_holds() -> None:
    here = Moment(2, -1.0, 2, 7)
    assert ProbeAligned().weigh(snapshots(1.0), here, torch.tensor([2.0])) == (1.0,)
    assert ProbeAligned().weigh(snapshots(1.0, 1.0), here, torch.tensor([2.0])) == (0.0, 1.0)


@pytest.mark.parametrize("family", ["wan", "flux-cfg"])
def test_reach_one_holds_and_more_extrapolates(family: str) -> None:
    plain = run(family, make(family), steps=12)
    found = {}
    for reach in (1.0, 1.5):
        skipped, y = our_run(family, DiCache(threshold=9.0, max_skips=1, reach=reach), 12, guidance=True)
        assert skipped == [2, 4, 6, 8, 10]
        found[reach] = float((y - plain).norm() / plain.norm())
    assert found[1.5] != found[1.0]
    assert max(found.values()) < 0.1


def test_the_head_always_runs() -> None:
    skipped, _ = our_run("wan", DiCache(threshold=9.0, max_skips=3, head=2), 10)
    assert skipped == [2, 3, 4, 6, 7, 8]
