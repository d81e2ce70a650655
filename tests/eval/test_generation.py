"""Clips of a model for an evaluation: made once, plain and planned alike, resumable, lossless."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evalkit import captions, run
from safetensors.torch import load_file
from tiny import make as tiny_pipeline

from diffeff import media
from diffeff.errors import ConfigError, DiffEffError, UnknownName
from diffeff.eval.engine import LocalEngine
from diffeff.eval.generation import Arm, Generator, Made, Recipe, Shot, arm_of, describe, make
from diffeff.eval.items import open_folder
from diffeff.eval.settings import CallSettings
from diffeff.methods.tokens.kv_downsample import KVDownsample
from diffeff.plan import Plan

SMALL = CallSettings(steps=3, width=32, height=32, frames=5)
RECIPE = Recipe("sprites-wan", SMALL, "cpu", "float32")
SHOTS = [Shot.of(text, seed) for seed, text in enumerate(captions(4))]


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    with LocalEngine() as found:
        yield found


def arm(work: Path, plan: Plan | None = None, **facts: Any) -> Arm:
    return arm_of("arm", plan or Plan(), {"model": "sprites-wan", **facts}, work)


def contents(made: list[Made]) -> list[tuple[bytes, bytes]]:
    return [(one.path.read_bytes(), one.latents.read_bytes() if one.latents else b"") for one in made]


def test_clips_are_those_of_the_pipeline_as_8_bit(engine: LocalEngine, tmp_path: Path) -> None:
    (made,) = make(engine, RECIPE, arm(tmp_path), SHOTS[:1])
    generator = RECIPE()
    noise = torch.Generator().manual_seed(SHOTS[0].seed)
    output = generator.pipe(prompt=SHOTS[0].prompt, generator=noise, **generator.options)
    assert (media.read(made.path) == media.to_bytes(output.frames[0])).all()
    assert made.latents is not None
    latents = load_file(made.latents)["latents"]
    assert latents.dtype == torch.float32
    assert not made.broken


def test_plan_and_plain_have_folders_of_their_own_and_start_from_the_same_noise(
    engine: LocalEngine, tmp_path: Path
) -> None:
    plain, fast = arm(tmp_path), arm(tmp_path, Plan.preset("fast"))
    assert plain.folder != fast.folder
    first = make(engine, RECIPE, plain, SHOTS[:1])
    assert contents(make(engine, RECIPE, replace(plain, folder=tmp_path / "again"), SHOTS[:1])) == contents(first)
    settings = json.loads((fast.folder / "settings.json").read_text())
    assert settings["plan"] == Plan.preset("fast").to_dict()
    assert arm(tmp_path, seed=1).folder != plain.folder  # whatever decides a clip decides the folder


def test_an_interrupted_run_makes_only_what_is_missing(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(engine, RECIPE, replace(arm(tmp_path), folder=tmp_path / "whole"), SHOTS)
    cut = replace(arm(tmp_path), folder=tmp_path / "cut")
    run_batch, count = Generator._run, [0]

    def stopping(self: Generator, shots: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return run_batch(self, shots)

    monkeypatch.setattr(Generator, "_run", stopping)
    with pytest.raises(KeyboardInterrupt):
        make(engine, RECIPE, cut, SHOTS)
    seen: list[tuple[int, int]] = []
    made = make(engine, RECIPE, cut, SHOTS, observe=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 4), (3, 4), (4, 4)]
    assert count[0] == 5
    assert contents(made) == contents(whole)
    assert [one.name for one in made] == [shot.name for shot in SHOTS]


def test_a_file_that_was_changed_or_lost_is_made_anew(engine: LocalEngine, tmp_path: Path) -> None:
    where = arm(tmp_path)
    first = make(engine, RECIPE, where, SHOTS[:3])
    before = contents(first)
    first[0].path.write_bytes(b"broken")
    first[1].path.unlink()
    assert first[2].latents is not None
    first[2].latents.unlink()
    assert contents(make(engine, RECIPE, where, SHOTS[:3])) == before


def test_the_folder_can_be_evaluated_like_any_other(engine: LocalEngine, tmp_path: Path) -> None:
    where = arm(tmp_path)
    make(engine, RECIPE, where, SHOTS[:2])
    items = open_folder(where.folder)
    assert [item.prompt for item in items] == captions(2)
    assert [item.seed for item in items] == [0, 1]


def test_a_longer_list_finds_what_a_shorter_one_made(engine: LocalEngine, tmp_path: Path) -> None:
    make(engine, RECIPE, arm(tmp_path), SHOTS[:2])
    seen: list[int] = []
    make(engine, RECIPE, arm(tmp_path), SHOTS[:3], observe=lambda done, total: seen.append(done))
    assert seen == [2, 3]


def test_batches_are_cut_from_the_whole_list_and_repeated_whole(engine: LocalEngine, tmp_path: Path) -> None:
    where = arm(tmp_path, batch=2)
    first = make(engine, RECIPE, where, SHOTS, batch=2)
    before = contents(first)
    first[3].path.unlink()  # its neighbour in the batch is run with it, so that the same bits come out
    assert contents(make(engine, RECIPE, where, SHOTS, batch=2)) == before
    assert len({one.sha256 for one in first}) == 4


def test_facts_name_the_model_and_the_call(engine: LocalEngine) -> None:
    facts = describe(engine, RECIPE)
    assert facts["family"] == "wan"
    assert facts["call"] == {
        "num_inference_steps": 3, "guidance_scale": 2.0, "height": 32, "width": 32, "num_frames": 5,
    }  # fmt: skip
    assert describe(engine, replace(RECIPE, call=CallSettings()))["call"]["num_inference_steps"] == 30


def test_an_option_the_model_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match="StableDiffusionPipeline takes no frames"):
        Recipe("sprites-sd", CallSettings(frames=5), "cpu", "float32")()
    with pytest.raises(UnknownName, match="sprites-wan"):
        Recipe("sprites-won", CallSettings(), "cpu", "float32")()


def test_classes_are_prompts_of_a_class_conditional_model(engine: LocalEngine, tmp_path: Path) -> None:
    recipe = Recipe("digits-dit", CallSettings(steps=2), "cpu", "float32")
    (made,) = make(engine, recipe, arm(tmp_path), [Shot.of("7", 0)])
    assert made.latents is None  # DiTPipeline hands out none
    assert media.read(made.path).shape[0] == 1
    with pytest.raises(ConfigError, match="there is no class 'cat'"):
        make(engine, recipe, arm(tmp_path), [Shot.of("cat", 0)])


def test_a_refused_call_is_said_in_the_pipelines_words(engine: LocalEngine, tmp_path: Path) -> None:
    odd = replace(RECIPE, call=CallSettings(steps=2, width=33, height=32, frames=5))
    with pytest.raises(DiffEffError, match="WanPipeline refused the request"):
        make(engine, odd, arm(tmp_path), SHOTS[:1])


def test_a_local_folder_is_a_model_too(tmp_path: Path) -> None:
    tiny_pipeline("dit").save_pretrained(tmp_path / "model")
    (tmp_path / "classes.txt").write_text("3\n5\n")
    result = run(
        tmp_path / "model", tmp_path, prompts=str(tmp_path / "classes.txt"), plan=Plan.preset("balanced"),
        call=CallSettings(steps=6), metrics=("psnr", "mae"),
    )  # fmt: skip
    assert result.results[0].n == 2
    with pytest.raises(ConfigError, match="DiTPipeline does not hand out its latents"):
        run(
            tmp_path / "model", tmp_path, prompts=str(tmp_path / "classes.txt"), plan=Plan.preset("balanced"),
            call=CallSettings(steps=6), metrics=("latent_l2",),
        )  # fmt: skip
    assert result.report["subject"]["fingerprint"] == result.report["reference"]["fingerprint"]


# --- through an evaluation ------------------------------------------------------------------------------------------
EVALUATED: dict[str, Any] = {
    "plan": Plan.preset("balanced"),
    "limit": 3,
    "call": replace(SMALL, steps=6),
    "metrics": ("psnr", "ssim", "latent_cosine", "latent_l2", "flicker"),
}


def test_a_plan_is_compared_with_plain_at_the_same_seeds(tmp_path: Path) -> None:
    result = run("sprites-wan", tmp_path, **EVALUATED)
    by_name = {found.metric: found for found in result.results}
    assert 10 < by_name["psnr"].value < 60
    assert 0.5 < by_name["latent_cosine"].value < 1
    assert by_name["flicker"].details["reference"]["n"] == 3
    assert result.report["reference"]["kind"] == "plain"
    assert result.report["subject"]["plan_digest"] == Plan.preset("balanced").digest
    assert any("8-bit" in note for note in result.report["notes"])
    assert set(result.report["seconds"]) == {"generate", "measure", "summarise", "total"}


def test_a_lossless_plan_is_identical(tmp_path: Path) -> None:
    result = run(
        "sprites-wan", tmp_path, **{**EVALUATED, "plan": Plan.preset("lossless"), "metrics": ("psnr", "latent_l2")}
    )
    assert [found.value for found in result.results] == [float("inf"), 0.0]


def test_without_a_plan_there_is_nothing_to_be_like(tmp_path: Path) -> None:
    without = {**EVALUATED, "plan": None}
    with pytest.raises(ConfigError, match="psnr needs a reference item"):
        run("sprites-wan", tmp_path, **without)
    result = run("sprites-wan", tmp_path, **{**without, "metrics": ("flicker", "adherence")})
    assert result.report["reference"] is None
    with pytest.raises(ConfigError, match="`plain` is the model without its plan"):
        run("sprites-wan", tmp_path, **{**without, "reference": "plain"})


def test_a_plan_that_does_not_fit_is_refused_before_plain_is_made(tmp_path: Path) -> None:
    plan = Plan([KVDownsample(first_block=99)])
    with pytest.raises(DiffEffError, match="kv_downsample"):
        run("sprites-wan", tmp_path, **{**EVALUATED, "plan": plan})
    assert not list(tmp_path.glob("diffeff-eval/generated/*/*.png"))


def test_a_reference_folder_serves_the_sets_and_plain_the_pairs(tmp_path: Path) -> None:
    from evalkit import clips, fill

    real = fill(tmp_path / "real", clips(4, frames=5))
    result = run("sprites-wan", tmp_path, **{**EVALUATED, "metrics": ("fid", "psnr"), "reference": str(real)})
    assert result.report["reference"]["path"] == str(real)
    assert result.report["pairs"]["kind"] == "plain"
    assert [found.n for found in result.results] == [3, 3]


_VICTIM = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_generation import EVALUATED
from evalkit import run
run("sprites-wan", Path(sys.argv[1]), **EVALUATED)
"""


@pytest.mark.slow
def test_kill_9_while_generating_changes_no_byte(tmp_path: Path) -> None:
    from evalkit import outcome

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run("sprites-wan", tmp_path / "whole", **EVALUATED)
        paths = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parent)]
        victim = subprocess.Popen(
            [sys.executable, "-P", "-c", _VICTIM, str(tmp_path / "cut")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        _wait_for_clips(tmp_path / "cut", 4, victim)
        victim.kill()
        victim.wait()
        made = len(list((tmp_path / "cut").glob("diffeff-eval/generated/*/*.png")))
        run("sprites-wan", tmp_path / "cut", **EVALUATED)
        assert 4 <= made <= 6
        assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    finally:
        torch.set_num_threads(before)


def _wait_for_clips(folder: Path, count: int, victim: subprocess.Popen[bytes]) -> None:
    import time

    for _ in range(6000):
        lines = [path.read_bytes().count(b"\n") for path in folder.glob("diffeff-eval/generated/*/manifest.jsonl")]
        if sum(lines) >= count or victim.poll() is not None:
            return
        time.sleep(0.01)
