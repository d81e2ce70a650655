"""The benchmark of real architectures, run on tiny ones: what it counts and tells, not how fast they are."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import call_kwargs, make

from diffeff.errors import UnknownName
from diffeff.eval import architectures
from diffeff.eval.architectures import ARCHITECTURES, BAR, STEPS, Architecture, measure
from diffeff.methods.table import config_class

CACHES: dict[str, dict[str, Any]] = {
    "scheduled_cache": {"actions": ("both", "both", "none", "both", "none", "both", "none", "both")},
    "first_block_cache": {"threshold": 10.0, "max_skips": 1, "first": 2, "last": 1},
}


def tiny_call(size: tuple[int, int, int]) -> dict[str, Any]:
    found = call_kwargs("wan", make("wan"), size=size, guidance=False)
    return {k: v for k, v in found.items() if k not in ("num_inference_steps", "generator", "output_type")}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    small, large = (3, 8, 12), (3, 16, 16)
    made = Architecture(lambda: make("wan"), tiny_call, small, large, CACHES, "a tiny Wan")
    monkeypatch.setattr(architectures, "ARCHITECTURES", {"tiny": made})
    return {row["method"]: row for row in measure("tiny", rounds=2)}


def test_compute_left_is_counted(rows: dict[str, dict[str, Any]]) -> None:
    whole, blocks = rows["scheduled_cache"], rows["first_block_cache"]
    assert whole["compute_left"] == 5 / STEPS  # three of eight calls are left out whole
    assert 5 / STEPS < blocks["compute_left"] < (5 + 3 / 2) / STEPS  # one of four blocks and the ends still run
    for row in rows.values():
        assert row["bar"] == pytest.approx(BAR / row["compute_left"], abs=1e-3)
        assert row["holds"] is (row["speedup"]["median"] >= BAR / row["compute_left"])
        assert row["rounds"] == 2
        assert (row["latents"], row["dtype"], row["device"], row["steps"]) == ([3, 8, 12], "float32", "cpu", STEPS)
        assert row["environment"]["torch"]
        assert {"commit", "run", "when", "threads", "peak_resident_bytes"} <= set(row)


def test_every_architecture_has_several_caches_that_its_options_fit() -> None:
    for made in ARCHITECTURES.values():
        assert len(made.caches) >= 4
        for name, options in made.caches.items():
            config_class(name).from_dict({"use": name, **options})


def test_an_unknown_one_is_named() -> None:
    with pytest.raises(UnknownName, match="sdxl"):
        next(measure("sdlx"))
