"""The whole way on a bundled model: real worker processes, tools that patch classes, one row each."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffeff.eval.bench.run import BenchSettings, run_bench
from diffeff.eval.settings import CallSettings


@pytest.mark.slow
def test_tools_that_patch_classes_in_processes_of_their_own(tmp_path: Path) -> None:
    settings = BenchSettings(
        model="sprites-wan",
        plans=["fast", "kv_downsample"],
        against=["cache-dit:dbcache@max_warmup_steps=2@residual_diff_threshold=0.6", "para-attn:fbcache", "tomesd"],
        limit=2,
        call=CallSettings(height=32, width=32, frames=5, steps=6),
        memory=False,
        out=tmp_path / "bench.jsonl",
    )
    rows = {row["arm"]["name"]: row for row in run_bench(settings)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "plain": "ok",
        "fast": "ok",
        "kv_downsample": "ok",
        "cache-dit:dbcache": "ok",
        "para-attn:fbcache": "ok",
        "tomesd": "failed",
    }
    assert rows["cache-dit:dbcache"]["flops"] < 0.9
    assert rows["cache-dit:dbcache"]["fidelity"]["identical"] == 0
    assert rows["fast"]["flops"] == 0.5
    assert rows["kv_downsample"]["noop"], "nothing to act on at this size"
    assert rows["tomesd"]["error"]["message"] == "'WanPipeline' object has no attribute 'named_modules'"
    assert rows["fast"]["model_fingerprint"]
    assert rows["para-attn:fbcache"]["environment"]["para-attn"]
