"""What the alternation protocol promises, on scripted workers: order, warm-up, resuming, failures, turns, rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from diffeff.errors import ConfigError, DiffEffError, OutputError
from diffeff.eval.bench import pool, run
from diffeff.eval.bench.arms import OURS
from diffeff.eval.bench.channel import Child, WorkerDied, WorkerError
from diffeff.eval.bench.pool import needs_turns
from diffeff.eval.bench.run import BenchSettings, run_bench, work_folder
from diffeff.eval.bench.store import scratch_folder

GIB = 2**30
FACTS = {
    "pipeline": "WanPipeline",
    "fingerprint": "0f" * 8,
    "scheduler": {"class": "UniPCMultistepScheduler", "config": {"prediction_type": "flow_prediction"}},
    "call": {"num_inference_steps": 10, "guidance_scale": 2.0},
    "classes": None,
    "held_bytes": GIB,
    "available_bytes": 100 * GIB,
    "threads": 1,
    "environment": {"torch": "2", "processor": "a CPU"},
}


class Interrupted(KeyboardInterrupt):
    """A kill, as far as the bench can tell."""


class Scripted:
    """Stands in for a worker process: answers from a script, remembers what it was asked."""

    log: ClassVar[list[tuple[str, str, int]]] = []
    """(what, arm's label, number of the process)"""
    alive: ClassVar[set[int]] = set()
    started: ClassVar[int] = 0
    facts: ClassVar[dict[str, Any]] = FACTS
    fail: ClassVar[dict[tuple[str, str], Exception]] = {}
    """(what, start of the arm's label) -> what it raises"""
    kill_at: ClassVar[int | None] = None

    def __init__(self, job: Mapping[str, Any], log: Path, limit: float) -> None:
        cls = type(self)
        cls.started += 1
        self.number, self.warmed = cls.started, set[str]()
        cls.alive.add(self.number)

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        cls, what = type(self), message["do"]
        if what == "describe":
            return cls.facts
        assert self.number in cls.alive, "an ended process was asked"
        label = message["arm"]["label"]
        cls.log.append((what, label, self.number))
        if cls.kill_at is not None and len(cls.log) >= cls.kill_at:
            raise Interrupted
        for (when, start), error in cls.fail.items():
            if when == what and label.startswith(start):
                raise error
        return getattr(self, f"_{what}")(message)  # type: ignore[no-any-return]

    def _count(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return {"flops": 100 * message["arm"]["steps"], "notes": {"found": 1} if "Mag" in str(message) else {}}

    def _memory(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert not self.warmed, "memory is measured in a fresh process"
        return {"bytes": 5 * GIB, "above_load_bytes": GIB, "how": "resident set"}

    def _run(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert message["arm"]["label"] in {label for what, label, at in self.log if at == self.number}, "not warm"
        kind, seed = message["arm"]["kind"], message["seed"]
        idle = "FirstBlock" in message["arm"]["label"]
        frames = np.random.default_rng(seed).random((2, 16, 16, 3), dtype=np.float32)
        if kind != "plain" and not idle:
            frames = (frames + 0.01 * (1 + seed)).clip(0, 1).astype(np.float32)
        np.save(message["frames"], frames)
        seconds = {"plain": 2.0, "plan": 1.0, "peer": 0.5, "fewer-steps": 0.25}[kind] * (1 + seed)
        return {"seconds": seconds, "cpu_seconds": 2 * seconds, "notes": message.get("notes") or {}}

    def close(self) -> None:
        type(self).alive.discard(self.number)

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    class Fresh(Scripted):
        log, alive, started, facts, fail, kill_at = [], set(), 0, FACTS, {}, None

    monkeypatch.setattr(pool, "Child", Fresh)
    return Fresh


def bench(folder: Path, **more: Any) -> list[dict[str, Any]]:
    given = {"plans": ["balanced"], "against": ["diffusers:fbcache", "cache-dit:dbcache", "fewer-steps@steps=5"]}
    prompts = folder / "prompts.txt"
    prompts.write_text("one\ntwo\nthree\nfour\n")
    return run_bench(BenchSettings(**(given | {"prompts": str(prompts), "out": folder / "bench.jsonl"} | more)))


def by_label(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["arm"]["label"].partition(",")[0]: row for row in rows}


# --- order ----------------------------------------------------------------------------------------------------------
def test_arms_take_turns_and_the_order_reverses_every_other_prompt(workers: type[Scripted], tmp_path: Path) -> None:
    bench(tmp_path, memory=False)
    runs = [label for what, label, _ in workers.log if what == "run"]
    rounds = [runs[i : i + 5] for i in range(0, len(runs), 5)]
    assert len(rounds) == 4
    assert rounds[0][0] == "plain"
    assert rounds[1] == rounds[0][::-1]
    assert rounds[2] == rounds[0]
    assert all(sorted(r) == sorted(rounds[0]) for r in rounds)


def test_every_arm_runs_untimed_in_its_process_first_and_packages_do_not_share_one(
    workers: type[Scripted], tmp_path: Path
) -> None:
    bench(tmp_path, memory=False)
    homes: dict[str, set[int]] = {}
    for _, label, number in workers.log:
        homes.setdefault(label.partition(",")[0], set()).add(number)
    assert all(len(found) == 1 for found in homes.values()), "one process per arm for the whole bench"
    assert homes["plain"] == homes["balanced"] == homes["fewer steps"]
    assert len(set.union(*homes.values())) == 3
    first = {label: what for what, label, _ in reversed(workers.log)}
    assert set(first.values()) == {"count"}
    assert workers.alive == set(), "all processes are ended"


def test_memory_is_measured_in_a_process_of_its_own(workers: type[Scripted], tmp_path: Path) -> None:
    rows = bench(tmp_path, limit=1)
    fresh = [number for what, _, number in workers.log if what == "memory"]
    assert len(set(fresh)) == len(fresh) == len(rows)
    assert {row["peak_memory"]["bytes"] for row in rows} == {5 * GIB}
    assert workers.alive == set()


# --- rows -----------------------------------------------------------------------------------------------------------
def test_rows_say_what_was_measured(workers: type[Scripted], tmp_path: Path) -> None:
    rows = by_label(bench(tmp_path))
    assert list(rows) == ["plain", "balanced", "diffusers FirstBlockCache", "cache-dit DBCache", "fewer steps"]
    plan = rows["balanced"]
    assert plan["speedup"] == {"median": 2.0, "q1": 2.0, "q3": 2.0}, "a ratio per prompt, not of medians"
    assert plan["seconds"]["median"] == 2.5
    assert plan["cpu_seconds"]["median"] == 5.0
    assert rows["plain"]["speedup"]["median"] == 1.0
    assert rows["plain"]["fidelity"] == {"psnr": None, "ssim": plan_like(1.0), "mae": plan_like(0.0), "identical": 4}
    assert plan["fidelity"]["identical"] == 0
    psnr = plan["fidelity"]["psnr"]
    assert psnr["min"] < psnr["low"] <= psnr["mean"] <= psnr["high"] < psnr["max"]
    assert rows["fewer steps"]["flops"] == 0.5
    assert (plan["steps"], rows["fewer steps"]["steps"]) == (10, 5)
    assert plan["call"] == {"guidance_scale": 2.0}
    assert plan["prompts"] == 4
    assert rows["cache-dit DBCache"]["environment"].keys() >= {"cache-dit", "processor", "torch"}
    assert len({row["run"] for row in rows.values()}) == 1


def plan_like(value: float) -> dict[str, float]:
    return dict.fromkeys(("mean", "low", "high", "min", "max"), value)


def test_a_peer_that_does_nothing_is_marked_and_plain_is_not(workers: type[Scripted], tmp_path: Path) -> None:
    rows = by_label(bench(tmp_path))
    assert {name for name, row in rows.items() if row["noop"]} == {"diffusers FirstBlockCache"}


def test_rows_are_appended_and_hold_a_picture(workers: type[Scripted], tmp_path: Path) -> None:
    import base64

    out = tmp_path / "bench.jsonl"
    out.write_text('{"benchmark": "other"}')
    rows = bench(tmp_path)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[0] == {"benchmark": "other"}
    assert lines[1:] == rows
    assert base64.b64decode(rows[1]["samples"]["sheet"]).startswith(b"RIFF")
    assert max(len(row["samples"]["sheet"]) for row in rows) <= 32_000
    assert not work_folder(BenchSettings(out=out)).exists(), "nothing is left once all is measured"


def test_a_sweep_keeps_the_pictures_that_people_compare(workers: type[Scripted], tmp_path: Path) -> None:
    rows = bench(tmp_path, limit=1, sweep=True, memory=False, against=["diffusers:pab", "fewer-steps"])
    shown = Counter(row["arm"]["name"] for row in rows if row["samples"])
    assert shown == {"plain": 1, "balanced": 1, "diffusers:pab": 1, "fewer-steps": 6}
    assert [row["arm"]["label"] for row in rows if row["arm"]["name"] == "balanced" and row["samples"]] == ["balanced"]


# --- failures -------------------------------------------------------------------------------------------------------
def test_a_failing_peer_reports_its_own_error_and_the_others_go_on(workers: type[Scripted], tmp_path: Path) -> None:
    workers.fail = {("count", "cache-dit"): WorkerError("apply", "ValueError", "not officially supported")}
    rows = by_label(bench(tmp_path))
    failed = rows["cache-dit DBCache"]
    assert failed["status"] == "failed"
    assert failed["error"] == {"phase": "apply", "type": "ValueError", "message": "not officially supported"}
    assert failed["speedup"] is failed["fidelity"] is failed["peak_memory"] is failed["samples"] is None
    assert [row["status"] for row in rows.values()].count("ok") == 4
    assert Counter(label.partition(",")[0] for what, label, _ in workers.log if what == "run")["cache-dit DBCache"] == 0


def test_where_the_first_point_of_a_sweep_fails_the_others_are_not_tried(
    workers: type[Scripted], tmp_path: Path
) -> None:
    workers.fail = {
        ("count", "DeepCache"): WorkerError("apply", "AttributeError", "no attribute 'unet'"),
        ("count", "cache-dit DBCache, warm-up 4, threshold 0.12"): WorkerError("run", "RuntimeError", "only here"),
    }
    rows = bench(tmp_path, against=["deepcache", "cache-dit:dbcache"], sweep=True, limit=2)
    deep = [row for row in rows if row["arm"]["name"] == "deepcache"]
    assert [row["status"] for row in deep] == ["failed"]
    assert deep[0]["details"]["not_tried"] == [f"DeepCache, interval {n}" for n in (3, 5, 7, 10)]
    others = [row["status"] for row in rows if row["arm"]["name"] == "cache-dit:dbcache"]
    assert others == ["ok", "failed", "ok", "ok", "ok", "ok"]


def test_what_is_not_installed_says_what_to_install(workers: type[Scripted], tmp_path: Path) -> None:
    from diffeff.eval.bench import peers

    if peers.installed("torchao") is not None:
        pytest.skip("torchao is installed")
    row = by_label(bench(tmp_path, against=["torchao:int8wo"]))["torchao int8 weights"]
    assert (row["status"], row["error"]["phase"], row["error"]["type"]) == ("failed", "import", "MissingExtra")
    assert "pip install torchao" in row["error"]["message"]
    assert row["environment"]["torchao"] == "not installed"
    assert workers.started == 3, "one for the bench, and one per working arm for its memory"


def test_a_refused_plan_says_why(workers: type[Scripted], tmp_path: Path) -> None:
    workers.fail = {("count", "balanced"): WorkerError("apply", "MethodInapplicable", "nothing to act on", True)}
    row = by_label(bench(tmp_path))["balanced"]
    assert (row["status"], row["error"]["message"]) == ("refused", "nothing to act on")


def test_an_arm_that_fails_midway_has_no_numbers_and_its_process_is_started_anew(
    workers: type[Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Counter[str]()

    class Midway(workers):  # type: ignore[misc, valid-type]
        def _run(self, message: Mapping[str, Any]) -> dict[str, Any]:
            calls[message["arm"]["label"]] += 1
            if message["arm"]["label"].startswith("cache-dit DBCache,") and calls[message["arm"]["label"]] == 2:
                raise WorkerDied("run", "WorkerDied", "the process ended with code -9")
            return dict(super()._run(message))

    monkeypatch.setattr(pool, "Child", Midway)
    rows = by_label(bench(tmp_path, against=["cache-dit:dbcache", "cache-dit:dbcache-taylor"]))
    assert rows["cache-dit DBCache"]["error"]["type"] == "WorkerDied"
    assert rows["cache-dit DBCache"]["speedup"] is None
    assert rows["cache-dit DBCache with TaylorSeer"]["status"] == "ok"
    label = next(found for _, found, _ in workers.log if "with TaylorSeer" in found)
    homes = [(what, number) for what, found, number in workers.log if found == label and what != "memory"]
    assert [what for what, _ in homes].count("count") == 2, "the new process is warmed up before it is timed"
    assert len({number for _, number in homes}) == 2


def test_a_plain_that_fails_ends_the_bench(workers: type[Scripted], tmp_path: Path) -> None:
    workers.fail = {("count", "plain"): WorkerError("run", "ValueError", "height must be divisible by 16")}
    with pytest.raises(DiffEffError, match=r"nothing to compare with.*divisible by 16"):
        bench(tmp_path)
    assert not (tmp_path / "bench.jsonl").exists()


def test_memory_that_cannot_be_measured_costs_only_that_number(workers: type[Scripted], tmp_path: Path) -> None:
    workers.fail = {("memory", "balanced"): WorkerDied("memory", "WorkerDied", "killed")}
    rows = by_label(bench(tmp_path, limit=1))
    assert rows["balanced"]["peak_memory"] is None
    assert rows["balanced"]["speedup"] is not None


def test_an_output_that_cannot_be_written_is_said_before_any_work(workers: type[Scripted], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "bench.jsonl"):
        with pytest.raises(OutputError):
            bench(tmp_path, out=out)
    assert workers.started == 0


# --- resuming -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kill_at", [3, 9, 14, 23])
def test_a_killed_bench_goes_on_with_whole_rounds_and_gives_the_same_numbers(
    workers: type[Scripted], tmp_path: Path, kill_at: int
) -> None:
    (tmp_path / "whole").mkdir()
    whole = bench(tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    workers.log.clear()
    workers.kill_at = kill_at
    with pytest.raises(Interrupted):
        bench(tmp_path / "killed")
    assert workers.alive == set()
    assert not (tmp_path / "killed" / "bench.jsonl").exists()
    before = [label for what, label, _ in workers.log if what == "run"]
    workers.log.clear()
    workers.kill_at = None
    rows = bench(tmp_path / "killed")
    after = [label for what, label, _ in workers.log if what == "run"]
    kept = len(before) // 5 if len(before) % 5 else max(len(before) - 1, 0) // 5
    assert len(after) == 5 * (4 - kept), "a round without all its turns is run again from its start"
    drop = ("run", "when", "command")
    clean = [[{k: v for k, v in row.items() if k not in drop} for row in found] for found in (whole, rows)]
    assert clean[0] == clean[1]


def test_more_prompts_later_keep_the_finished_ones_only_while_unfinished(
    workers: type[Scripted], tmp_path: Path
) -> None:
    bench(tmp_path, limit=1, memory=False)
    workers.log.clear()
    bench(tmp_path, limit=1, memory=False)
    assert len([1 for what, *_ in workers.log if what == "run"]) == 5, "a finished bench is measured anew"


def test_nothing_is_taken_from_another_model_or_another_set_of_arms(workers: type[Scripted], tmp_path: Path) -> None:
    workers.kill_at = 16
    with pytest.raises(Interrupted):
        bench(tmp_path)
    workers.kill_at = None
    for change in ({"facts": FACTS | {"fingerprint": "00" * 8}}, {}):
        workers.log.clear()
        workers.facts = change.get("facts", FACTS)
        bench(tmp_path, memory=False, **({} if change else {"against": ["fewer-steps@steps=5"]}))
        arms = 5 if change else 3
        assert len([1 for what, *_ in workers.log if what == "run"]) == 4 * arms


# --- large models ---------------------------------------------------------------------------------------------------
def test_large_models_take_one_process_at_a_time_each_package_beside_plain(
    workers: type[Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0

    class Counted(workers):  # type: ignore[misc, valid-type]
        def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
            nonlocal most
            most = max(most, len(self.alive))
            return dict(super().ask(message))

    monkeypatch.setattr(pool, "Child", Counted)
    workers.facts = FACTS | {"held_bytes": 40 * GIB, "available_bytes": 60 * GIB}
    rows = by_label(bench(tmp_path, limit=2))
    assert most == 1
    assert {row["alternation"] for row in rows.values()} == {"each package beside plain"}
    plain_runs = [number for what, label, number in workers.log if what == "run" and label == "plain"]
    assert Counter(plain_runs).most_common() == [(number, 2) for number in dict.fromkeys(plain_runs)]
    assert len(set(plain_runs)) == 3
    assert rows["cache-dit DBCache"]["speedup"]["median"] == 4.0


def test_when_memory_calls_for_turns() -> None:
    assert not needs_turns(GIB, 20 * GIB, 5)
    assert needs_turns(10 * GIB, 20 * GIB, 2), "larger than a quarter"
    assert needs_turns(2 * GIB, 10 * GIB, 5), "small, but five of it are not"
    assert not needs_turns(10 * GIB, 20 * GIB, 1)
    assert not needs_turns(None, None, 5)


# --- prompts --------------------------------------------------------------------------------------------------------
def test_classes_of_a_class_conditional_model(workers: type[Scripted], tmp_path: Path) -> None:
    workers.facts = FACTS | {"classes": 3}
    rows = bench(tmp_path, prompts=None, limit=5, against=[])
    assert (rows[0]["prompt_set"], rows[0]["prompts"]) == ("classes", 5)
    assert "--prompts classes" in rows[1]["command"]


def test_adherence_is_counted_where_the_world_is_known(workers: type[Scripted], tmp_path: Path) -> None:
    rows = bench(tmp_path, prompts="sprites", limit=3, model="sprites-wan")
    assert {"colour", "shape", "motion", "camera", "all"} == set(rows[1]["adherence"])
    assert rows[1]["adherence"]["all"]["trials"] == 3
    assert rows[1]["prompt_set"] == "sprites"
    other = bench(tmp_path, prompts="sprites", limit=3, model="some/other")
    assert other[1]["adherence"] is None


# --- the real channel -----------------------------------------------------------------------------------------------
def test_a_model_that_cannot_be_loaded_is_one_clear_error(tmp_path: Path) -> None:
    assert run.Pool is pool.Pool
    with pytest.raises(DiffEffError, match="no_such_folder"):
        run_bench(BenchSettings(model="./no_such_folder", plans=["balanced"], out=tmp_path / "bench.jsonl"))


def test_a_worker_that_hangs_or_dies_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffeff.eval.bench import channel

    (tmp_path / "quitter.py").write_text("import sys; sys.stderr.write('out of luck'); sys.exit(3)")
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(channel, "_MODULE", "quitter")
    with pytest.raises(WorkerDied, match=r"ended with code 3\. out of luck") as died:
        Child({}, tmp_path / "a.log", 20)
    assert died.value.to_dict()["phase"] == "load"
    monkeypatch.setattr(channel, "_MODULE", "sleeper")
    with pytest.raises(WorkerDied, match="no answer within 1 s"):
        Child({}, tmp_path / "b.log", 1)


def test_unused_options_are_refused_in_words(workers: type[Scripted], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="limit"):
        bench(tmp_path, limit=0)
    assert OURS == "diffeff"


def test_what_a_killed_process_left_is_cleared_and_a_running_ones_is_not(tmp_path: Path) -> None:
    import os

    dead, own = tmp_path / "scratch-999999999-x", tmp_path / f"scratch-{os.getpid()}-y"
    for folder in (dead, own):
        folder.mkdir()
        (folder / "frames.npy").touch()
    with scratch_folder(tmp_path) as made:
        assert made.is_dir()
        assert not dead.exists()
    assert list(tmp_path.iterdir()) == [own]
