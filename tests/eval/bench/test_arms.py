"""Arms: specs are understood or refused with a reason, sweeps draw curves, and every row's command makes it again."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffeff.errors import ConfigError, PlanFormatError, UnknownName
from diffeff.eval.bench.arms import OURS, Arm, expand, plain_arm, wanted_against, wanted_plans
from diffeff.eval.bench.peers import PEERS, installed
from diffeff.eval.bench.settings import BenchSettings, command
from diffeff.eval.bench.solvers import SOLVERS, family_of, make_solver, solvers_of
from diffeff.eval.settings import CallSettings

FLOW = {"class": "UniPCMultistepScheduler", "config": {"prediction_type": "flow_prediction", "solver_order": 2}}
DDIM = {"class": "DDIMScheduler", "config": {"prediction_type": "epsilon", "beta_schedule": "linear"}}


def arms(
    plans: str = "", against: str = "", steps: int = 20, sweep: bool = False, scheduler: dict[str, Any] = FLOW
) -> list[Arm]:
    wanted = [*wanted_plans(plans.split()), *wanted_against(against.split())]
    return expand(wanted, scheduler, steps, sweep)


def test_a_plan_by_preset_file_or_method(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"diffeff_plan": 1, "methods": [{"use": "int8_weights"}]}))
    balanced, mine, single = arms(f"balanced {path} feature_cache@interval=4")
    assert [arm.name for arm in (balanced, mine, single)] == ["balanced", "mine.json", "feature_cache"]
    assert mine.folder == str(tmp_path)
    assert single.plan is not None
    assert single.plan["methods"][0]["interval"] == 4
    assert single.label == "feature_cache, interval 4"
    assert {arm.worker for arm in (balanced, mine, single)} == {OURS}


def test_options_of_a_plan_name_their_method_where_they_must(tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    methods = [{"use": "feature_cache"}, {"use": "guidance_skip"}]
    path.write_text(json.dumps({"diffeff_plan": 1, "methods": methods}))
    (found,) = arms(f"{path}@guidance_skip.interval=3")
    assert found.plan is not None
    assert [m["interval"] for m in found.plan["methods"]] == [2, 3]
    with pytest.raises(ConfigError, match="fits 2 methods"):
        arms(f"{path}@interval=3")
    with pytest.raises(ConfigError, match="fits 0 methods"):
        arms("balanced@stride=3")


@pytest.mark.parametrize(
    ("plans", "against", "error", "text"),
    [
        ("balancd", "", UnknownName, "balanced"),
        ("missing.json", "", PlanFormatError, "missing.json"),
        ("feature_cache@interval=99", "", ConfigError, "interval"),
        ("feature_cache@interval", "", ConfigError, "NAME@option=value"),
        ("@interval=3", "", ConfigError, "names nothing"),
        ("", "diffusers:fbcash", UnknownName, "diffusers:fbcache"),
        ("", "fewer-steps:dpm", UnknownName, "dpm"),
        ("", "fewer-steps@steps=0", ConfigError, "N >= 1"),
        ("", "fewer-steps@interval=2", ConfigError, "nothing else"),
    ],
)
def test_a_spec_that_means_nothing_is_refused_before_a_model_is_loaded(
    plans: str, against: str, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        arms(plans, against)


def test_peers_run_in_a_process_per_package() -> None:
    found = arms(against="diffusers:fbcache diffusers:pab cache-dit:dbcache deepcache tomesd para-attn:fbcache")
    assert [arm.worker for arm in found] == ["diffusers", "diffusers", "cache-dit", "DeepCache", "tomesd", "para-attn"]
    assert all(arm.steps == 20 for arm in found)
    assert found[0].label == "diffusers FirstBlockCache, threshold 0.1"
    assert found[0].spec == "diffusers:fbcache"


def test_all_is_what_is_installed_and_every_solver() -> None:
    names = {arm.name for arm in arms(against="all")}
    peers = {name for name, peer in PEERS.items() if installed(peer.package)}
    assert names == peers | {"fewer-steps", "fewer-steps:unipc3", "fewer-steps:heun", "fewer-steps:euler"}


@pytest.mark.parametrize("name", list(PEERS))
def test_a_sweep_of_a_peer_is_a_curve_of_distinct_points(name: str) -> None:
    found = arms(against=name, sweep=True)
    assert len({arm.key for arm in found}) == len(found) == len(PEERS[name].sweep)
    assert len(found) in ((1,) if name.startswith("torchao") else (4, 5, 6))
    assert len({arm.label for arm in found}) == len(found)
    assert {arm.label.partition(",")[0] for arm in found} == {PEERS[name].label}


def test_given_options_are_not_swept() -> None:
    (found,) = arms(against="diffusers:fbcache@threshold=0.4", sweep=True)
    assert found.options == {"threshold": 0.4}


def test_a_sweep_of_plans_keeps_their_own_point_and_runs_no_plan_twice() -> None:
    found = arms("balanced fast", sweep=True)
    assert [arm.label for arm in found if not arm.options] == ["balanced", "fast"]
    plans = [json.dumps(arm.plan) for arm in found]
    assert len(set(plans)) == len(plans) == 6
    intervals = {arm.plan["methods"][0]["interval"] for arm in found if arm.plan}
    assert intervals == {2, 3, 4, 5, 6, 8}


def test_a_threshold_policy_is_swept_by_its_threshold(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    entry = {"use": "feature_cache", "policy": "threshold", "threshold": 0.2}
    path.write_text(json.dumps({"diffeff_plan": 1, "methods": [entry]}))
    found = arms(str(path), sweep=True)
    assert sorted(arm.plan["methods"][0]["threshold"] for arm in found if arm.plan) == [0.1, 0.15, 0.2, 0.3, 0.4, 0.6]


def test_fewer_steps_are_fewer_and_heun_counts_its_two_calls() -> None:
    counts = [arm.steps for arm in arms(against="fewer-steps", sweep=True, steps=30)]
    assert counts == sorted(counts, reverse=True)
    assert len(counts) >= 5
    assert max(counts) < 30
    heun = [arm.steps for arm in arms(against="fewer-steps:heun", sweep=True, steps=30)]
    assert max(heun) <= 15
    assert [arm.steps for arm in arms(against="fewer-steps", sweep=True, steps=2)] == [2, 1]


def test_solvers_are_those_of_the_family_without_the_models_own() -> None:
    assert solvers_of(FLOW) == ["unipc3", "heun", "euler"]
    assert solvers_of(DDIM) == ["dpm++", "unipc", "unipc3"]
    assert solvers_of({"class": "DDPMWuerstchenScheduler", "config": {}}) == []
    assert family_of({"class": "FlowMatchEulerDiscreteScheduler", "config": {"shift": 3.0}}) == "flow"


def test_every_solver_takes_the_settings_of_the_models_own() -> None:
    import diffusers

    flow = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    ddim = diffusers.DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    made = {name: make_solver(name, flow if "flow" in SOLVERS[name].families else ddim) for name in SOLVERS}
    assert made["euler"].config.shift == made["heun"].config.shift == made["unipc3"].config.flow_shift == 3.0
    assert made["unipc3"].config.solver_order == 3
    assert made["dpm++"].config.prediction_type == "v_prediction"
    assert made["dpm++"].config.timestep_spacing == "trailing"
    with pytest.raises(ConfigError, match="Heun is for flow models"):
        make_solver("heun", ddim)


def test_flow_solvers_go_through_the_same_times() -> None:
    """Euler and UniPC of one flow model start at the same sigma, with the shift applied in both."""
    import diffusers

    own = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    unipc, euler = make_solver("unipc", own), make_solver("euler", own)
    for scheduler in (unipc, euler):
        scheduler.set_timesteps(10)
    middle = [float(scheduler.sigmas[5]) for scheduler in (unipc, euler)]
    assert middle[0] == pytest.approx(middle[1], abs=0.06)
    assert 0.6 < middle[0] < 0.85, "0.5 without the shift"


def test_keys_tell_apart_what_could_measure_otherwise() -> None:
    one, other = arms(against="diffusers:fbcache@threshold=0.1 diffusers:fbcache@threshold=0.2")
    assert one.key != other.key
    assert one.key == Arm.from_dict(json.loads(json.dumps(one.to_dict()))).key
    assert replace(one, label="x", spec="y").key == one.key
    assert plain_arm(20).key != plain_arm(19).key


@pytest.mark.parametrize("sweep", [False, True])
def test_the_command_of_a_row_makes_that_row_again(sweep: bool, tmp_path: Path) -> None:
    path = tmp_path / "my plan.json"
    path.write_text(json.dumps({"diffeff_plan": 1, "methods": [{"use": "feature_cache"}, {"use": "guidance_skip"}]}))
    plans = wanted_plans(["fast", str(path), "kv_downsample@stride=3"])
    wanted = [*plans, *wanted_against(["diffusers:magcache", "deepcache", "fewer-steps", "fewer-steps:heun@steps=3"])]
    settings = BenchSettings(model="m", call=CallSettings(steps=20, width=64, height=32), threads=1)
    for arm in expand(wanted, FLOW, 20, sweep):
        words = shlex.split(command(settings, arm, 7, "sprites"))
        assert words[:3] == ["diffeff", "bench", "m"]
        options = dict(zip(words[3::2], words[4::2], strict=True))
        again = wanted_plans([options["--plans"]]) if "--plans" in options else wanted_against([options["--against"]])
        assert [a.key for a in expand(again, FLOW, 20, sweep=False)] == [arm.key], words
        assert (options["--limit"], options["--steps"], options["--size"]) == ("7", "20", "64x32")


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"limit": 0}, {"threads": 0}, {"seed": -1}, {"patience": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            BenchSettings(**wrong)  # type: ignore[arg-type]
