"""Other tools on the bundled models: they act or say why not, and come off without a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffeff.errors import MissingExtra, UnknownName
from diffeff.eval.bench.arms import Arm, expand, plain_arm, wanted_against, wanted_plans
from diffeff.eval.bench.peers import PEERS, Peer, peer
from diffeff.eval.bench.worker import Job, Worker, answer

CAPTION = "a red circle moving left, camera pans right"
STEPS = 6
SMALL = {"height": 32, "width": 32, "frames": 5}


@pytest.fixture(scope="module")
def wan() -> Worker:
    return Worker(Job("sprites-wan", "cpu", "float32", None, SMALL))


@pytest.fixture(scope="module")
def sd() -> Worker:
    return Worker(Job("sprites-sd", "cpu", "float32", None))


def arm(spec: str, steps: int = STEPS) -> Arm:
    scheduler = {"class": "UniPCMultistepScheduler", "config": {"prediction_type": "flow_prediction"}}
    wanted = wanted_plans([spec]) if spec.partition("@")[0] in ("fast", "kv_downsample") else wanted_against([spec])
    (found,) = expand(wanted, scheduler, steps, sweep=False)
    return found


def ask(worker: Worker, what: str, of: Arm, folder: Path, **more: Any) -> dict[str, Any]:
    message = {"do": what, "arm": of.to_dict(), "seed": 3, "subject": {"prompt": CAPTION}}
    return answer(worker, message | {"frames": str(folder / "frames.npy")} | more)


def frames(worker: Worker, of: Arm, folder: Path) -> Any:
    reply = ask(worker, "run", of, folder)
    assert "error" not in reply, reply
    assert reply["seconds"] > 0
    assert reply["cpu_seconds"] > 0
    return np.load(folder / "frames.npy")


ACTIVE = (
    "diffusers:fbcache@threshold=0.5",
    "diffusers:magcache@threshold=0.5",
    "diffusers:taylorseer",
    "diffusers:pab",
    "diffusers:seacache@threshold=1.0",
)


@pytest.mark.parametrize("spec", ACTIVE)
def test_a_cache_of_diffusers_saves_work_and_comes_off_bit_for_bit(wan: Worker, tmp_path: Path, spec: str) -> None:
    plain = frames(wan, plain_arm(STEPS), tmp_path)
    whole = ask(wan, "count", plain_arm(STEPS), tmp_path)["flops"]
    counted = ask(wan, "count", arm(spec), tmp_path)
    assert 0 < counted["flops"] < 0.95 * whole
    assert not np.array_equal(frames(wan, arm(spec), tmp_path), plain)
    assert np.array_equal(frames(wan, plain_arm(STEPS), tmp_path), plain)
    assert ask(wan, "count", plain_arm(STEPS), tmp_path)["flops"] == whole


def test_magcache_calibrates_once_and_takes_its_ratios_back(wan: Worker, tmp_path: Path) -> None:
    of = arm("diffusers:magcache@threshold=0.5")
    first = ask(wan, "run", of, tmp_path)
    ratios = first["notes"]["mag_ratios"]
    assert len(ratios) == STEPS
    assert ratios[0] == 1.0
    assert all(0.2 < ratio < 5 for ratio in ratios)
    calls = 0

    def seen(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = wan.pipe.transformer.register_forward_hook(seen)
    again = ask(wan, "run", of, tmp_path, notes=first["notes"])
    hook.remove()
    assert again["notes"]["mag_ratios"] == ratios
    assert calls == 2 * STEPS, "both branches of every step, and no calibration"


def test_a_peer_reports_its_own_error_and_leaves_plain_as_it_was(wan: Worker, tmp_path: Path) -> None:
    plain = frames(wan, plain_arm(STEPS), tmp_path)
    for spec, phase, kind in (
        ("diffusers:fastercache", "run", "IndexError"),
        ("deepcache", "apply", "AttributeError"),
        ("tomesd", "apply", "AttributeError"),
    ):
        error = ask(wan, "run", arm(spec), tmp_path)["error"]
        assert (error["phase"], error["type"], error["ours"]) == (phase, kind, False)
        assert np.array_equal(frames(wan, plain_arm(STEPS), tmp_path), plain)


def test_plans_and_solvers_come_off_too_and_refusals_are_ours(wan: Worker, tmp_path: Path) -> None:
    plain = frames(wan, plain_arm(STEPS), tmp_path)
    own = wan.pipe.scheduler
    for spec in ("fast", "fewer-steps:euler@steps=4", "fewer-steps:heun@steps=3"):
        assert not np.array_equal(frames(wan, arm(spec), tmp_path), plain)
    assert wan.pipe.scheduler is own
    assert np.array_equal(frames(wan, plain_arm(STEPS), tmp_path), plain)
    error = ask(wan, "count", arm("fewer-steps:dpm++@steps=4"), tmp_path)["error"]
    assert (error["phase"], error["type"], error["ours"]) == ("apply", "ConfigError", True)
    error = ask(wan, "count", arm("fast", steps=3), tmp_path)["error"]
    assert error["ours"], "too few steps for a plan that protects them all"


def test_a_plan_says_whether_it_was_engaged_and_int8_counts_its_work(wan: Worker, tmp_path: Path) -> None:
    counted = ask(wan, "count", arm("fast"), tmp_path)
    assert [entry["engaged"] for entry in counted["engaged"]] == [True]
    whole = ask(wan, "count", plain_arm(STEPS), tmp_path)["flops"]
    (int8,) = expand(wanted_plans(["int8_weights"]), {"class": "", "config": {}}, STEPS, sweep=False)
    assert ask(wan, "count", int8, tmp_path)["flops"] == whole


@pytest.mark.parametrize("spec", ["deepcache", "tomesd"])
def test_a_unet_tool_acts_and_comes_off_bit_for_bit(sd: Worker, tmp_path: Path, spec: str) -> None:
    plain = frames(sd, plain_arm(4), tmp_path)
    whole = ask(sd, "count", plain_arm(4), tmp_path)["flops"]
    assert ask(sd, "count", arm(spec, 4), tmp_path)["flops"] < whole
    changed = frames(sd, arm(spec, 4), tmp_path)
    assert changed.shape == plain.shape == (1, 64, 64, 3)
    assert not np.array_equal(changed, plain)
    assert np.array_equal(frames(sd, plain_arm(4), tmp_path), plain)


def test_facts_of_a_model(wan: Worker) -> None:
    facts = answer(wan, {"do": "describe"})
    assert facts["scheduler"]["class"] == "UniPCMultistepScheduler"
    assert (facts["call"]["width"], facts["call"]["num_frames"]) == (32, 5), "what was asked for stands over the card"
    assert facts["call"]["num_inference_steps"] > 8
    assert facts["classes"] is None
    assert facts["fingerprint"]
    assert facts["environment"]["processor"]


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(MissingExtra, match=r"pip install 'diffeff\[peers\]'"):
        Peer("no-such-package", "It", "deepcache:deep_cache", {}, ({},)).load()
    with pytest.raises(UnknownName, match="deepcache"):
        peer("deepcash")
    assert all(callable(found.load()) for found in PEERS.values() if found.package != "torchao")
