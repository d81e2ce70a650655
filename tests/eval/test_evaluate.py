"""An evaluation of folders, from files to report: the numbers, what is computed how often, and every bad input."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import eval_features
import numpy as np
import pytest
import torch
from evalkit import PIXELS, WORDS, captions, clips, fill, outcome, run

from diffeff import media
from diffeff.errors import ConfigError, DiffEffError, ModelLoadError, OutputError, UnknownName
from diffeff.eval import probing
from diffeff.eval.engine import LocalEngine
from diffeff.eval.metrics.fidelity import psnr
from diffeff.eval.metrics.frechet import frechet

COUNT, FRAMES = 6, 3
SETS = ("fid", "kid", "psnr", "ssim", "flicker", "adherence")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    eval_features.CALLS.clear()
    eval_features.STOP_AT.clear()
    yield
    eval_features.STOP_AT.clear()


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    return fill(tmp_path / "fake", clips(COUNT, noise=40), captions(COUNT))


@pytest.fixture
def real(tmp_path: Path) -> Path:
    return fill(tmp_path / "real", clips(COUNT))


# --- the numbers ----------------------------------------------------------------------------------------------------
def test_numbers_are_those_of_the_metrics_on_the_files(fake: Path, real: Path, tmp_path: Path) -> None:
    result = run(fake, tmp_path / "out", reference=str(real), metrics=("psnr", "fid", "clip"), features=(WORDS,))
    pairs = list(zip(clips(COUNT), clips(COUNT, noise=40), strict=True))
    by_name = {found.metric: found for found in result.results}
    values = [psnr(a, b) for a, b in pairs]
    assert by_name["psnr"].value == pytest.approx(np.mean(values), abs=1e-9)
    assert by_name["psnr"].details["min"] == min(values)
    assert by_name["psnr"].details["worst_item"] == f"{int(np.argmin(values)):02d}"
    vectors = [
        torch.cat([eval_features.pixels(torch.from_numpy(pair[side]).permute(0, 3, 1, 2)) for pair in pairs]).numpy()
        for side in (0, 1)
    ]
    owners = (np.repeat(np.arange(COUNT), FRAMES),) * 2
    alone = frechet(*vectors, owners=owners)
    assert (by_name["fid"].value, by_name["fid"].interval) == (alone.value, alone.interval)
    assert by_name["fid"].label == "FID-eval_features.words"
    assert by_name["fid"].n == COUNT
    assert by_name["fid"].details["n_subject"] == FRAMES * COUNT
    assert any("its partner in the reference" in note for note in by_name["fid"].notes)  # the same scenes on both sides
    text = eval_features._texts(captions(1))
    frames = torch.from_numpy(pairs[0][1]).permute(0, 3, 1, 2)
    cosine = torch.cosine_similarity(eval_features.pixels(frames), text).clamp(min=0)
    rows = (tmp_path / "out" / "report.items.csv").read_text().splitlines()
    assert rows[0] == "item,psnr,clip"
    assert float(rows[1].split(",")[2]) == pytest.approx(100 * float(cosine.mean()), rel=1e-5)


def test_items_that_belong_together_do_not_push_kid_below_zero(real: Path, tmp_path: Path) -> None:
    nearly = fill(tmp_path / "nearly", clips(COUNT, noise=2))
    result = run(nearly, tmp_path / "out", reference=str(real), metrics=("kid",))
    (found,) = result.results
    assert found.details["paired"] is True
    assert found.interval is not None
    assert found.interval.low < 0 < found.interval.high
    others = fill(tmp_path / "others", clips(COUNT + 1, noise=2, seed=3))
    assert "paired" not in run(nearly, tmp_path / "out", reference=str(others), metrics=("kid",)).results[0].details


def test_identical_folders_are_said_to_be(real: Path, tmp_path: Path) -> None:
    result = run(real, tmp_path / "out", reference=str(real), metrics=("psnr", "ssim", "mae"), fail_if=("psnr<30",))
    assert [found.value for found in result.results] == [float("inf"), 1.0, 0.0]
    assert not result.failed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["results"][0]["value"] is None
    assert report["results"][0]["infinite"] is True
    assert "psnr,PSNR,inf,dB" in (tmp_path / "out" / "report.csv").read_text()
    assert "| PSNR | identical |" in (tmp_path / "out" / "report.md").read_text()


def test_the_reference_stands_beside_what_each_item_has_alone(fake: Path, real: Path, tmp_path: Path) -> None:
    result = run(
        fake, tmp_path / "out", reference=str(real), metrics=("flicker", "adherence", "clip"), features=(WORDS,)
    )
    by_label = {found.label: found for found in result.results}
    flicker = by_label["flicker"].details
    assert by_label["flicker"].value > flicker["reference"]["value"]  # noise flickers
    assert flicker["difference"]["low"] > 0
    assert by_label["adherence: colour"].details["reference"]["value"] == 1.0
    assert flicker["difference"]["value"] == pytest.approx(by_label["flicker"].value - flicker["reference"]["value"])


def test_the_usual_metrics_are_those_that_can_be_computed(fake: Path, real: Path, tmp_path: Path) -> None:
    def names(**settings: Any) -> list[str]:
        return list(dict.fromkeys(r.metric for r in run(fake, tmp_path / "out", **settings).results))

    assert names(reference=str(real), features=(PIXELS,)) == ["fid", "kid", "psnr", "ssim", "adherence"]
    assert names(reference=str(real), features=(WORDS,)) == ["fid", "kid", "clip", "psnr", "ssim", "adherence"]
    assert names() == ["adherence"]
    bare = fill(tmp_path / "bare", clips(2))
    with pytest.raises(ConfigError, match=r"nothing to compute.*--reference.*--prompts"):
        run(bare, tmp_path / "out", features=None)


def test_the_report_says_what_is_needed_to_read_it(fake: Path, real: Path, tmp_path: Path) -> None:
    result = run(fake, tmp_path / "out", reference=str(real), metrics=SETS, fail_if=("psnr<90", "fid<0"))
    assert result.failed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["diffeff_eval"] == 1
    assert [gate["failed"] for gate in report["gates"]] == [True, False]
    assert report["subject"]["items"] == COUNT
    assert report["environment"]["torch"] == torch.__version__
    (fid,) = (found for found in report["results"] if found["metric"] == "fid")
    assert len(fid["features"]["sha256"]) == 64
    assert fid["interval"]["low"] < fid["value"] < fid["interval"]["high"]
    assert [sample["name"] for sample in report["samples"]] == [f"{i:02d}" for i in range(COUNT)]
    assert all(Path(sample[side]).is_file() for sample in report["samples"] for side in ("subject", "reference"))
    assert set(result.files) == {"json", "markdown", "csv", "items"}


def test_all_frames_are_not_taken_when_fewer_are_asked_for(fake: Path, real: Path, tmp_path: Path) -> None:
    run(fake, tmp_path / "out", reference=str(real), metrics=("fid",), frames_per_clip=1)
    assert len(eval_features.CALLS) == 2 * COUNT
    assert probing.spread(9, 4) == [0, 3, 5, 8]
    assert probing.spread(9, 1) == [4]
    assert probing.spread(3, 16) == [0, 1, 2]


# --- once, in any order, in little memory ---------------------------------------------------------------------------
def test_identical_files_are_looked_at_once_and_counted_each_time(tmp_path: Path) -> None:
    made = clips(3)
    doubled = fill(tmp_path / "doubled", [*made, *made])
    result = run(doubled, tmp_path / "out", reference=str(doubled), metrics=("fid", "flicker"))
    assert len(eval_features.CALLS) == 3 * FRAMES
    assert [found.n for found in result.results] == [6, 6]


def test_a_second_run_computes_nothing(fake: Path, real: Path, tmp_path: Path) -> None:
    run(fake, tmp_path / "out", reference=str(real), metrics=SETS)
    first, calls = outcome(tmp_path / "out"), len(eval_features.CALLS)
    run(fake, tmp_path / "out", reference=str(real), metrics=SETS)
    assert outcome(tmp_path / "out") == first
    assert len(eval_features.CALLS) == calls == 2 * COUNT * FRAMES


def test_more_items_or_metrics_build_on_what_is_there(fake: Path, real: Path, tmp_path: Path) -> None:
    run(fake, tmp_path / "out", reference=str(real), metrics=("fid",), limit=2)
    assert len(eval_features.CALLS) == (2 + COUNT) * FRAMES
    run(fake, tmp_path / "out", reference=str(real), metrics=SETS)
    assert len(eval_features.CALLS) == 2 * COUNT * FRAMES


@pytest.mark.parametrize("stop", [1, 5, 18, 36])
def test_an_interrupted_run_continues_to_the_same_bytes(fake: Path, real: Path, tmp_path: Path, stop: int) -> None:
    run(fake, tmp_path / "whole", reference=str(real), metrics=SETS)
    eval_features.CALLS.clear()
    eval_features.STOP_AT.append(stop)
    with pytest.raises(KeyboardInterrupt):
        run(fake, tmp_path / "cut", reference=str(real), metrics=SETS)
    assert not (tmp_path / "cut" / "report.json").exists()
    eval_features.STOP_AT.clear()
    run(fake, tmp_path / "cut", reference=str(real), metrics=SETS)
    again = len(eval_features.CALLS) - 2 * COUNT * FRAMES
    assert 1 <= again <= FRAMES  # of the item it was at, and of no other
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


class _Backwards(LocalEngine):
    """Hands results back in the opposite order, as a busy cluster might."""

    def map(self, function: Any, items: Any, *, setup: Any) -> Iterator[tuple[int, Any]]:
        found = [(i, function(self._state(setup), item)) for i, item in enumerate(items)]
        yield from reversed(found)


def test_the_order_of_computing_does_not_show(
    fake: Path, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(fake, tmp_path / "forwards", reference=str(real), metrics=SETS)
    monkeypatch.setattr("diffeff.eval.evaluate.open_engine", lambda *_, **__: _Backwards())
    run(fake, tmp_path / "backwards", reference=str(real), metrics=SETS)
    assert outcome(tmp_path / "backwards") == outcome(tmp_path / "forwards")


@pytest.mark.slow
def test_two_workers_of_ray_give_the_numbers_of_one_process(fake: Path, real: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    source = f"module:{eval_features.__file__}:pixels"  # by its path: workers do not share this process's
    common: dict[str, Any] = {"reference": str(real), "metrics": SETS, "features": (source,), "threads": 1}
    run(fake, tmp_path / "one", **common)
    run(fake, tmp_path / "two", **common, engine="ray", workers=2)
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one")
    assert json.loads((tmp_path / "two" / "report.json").read_text())["environment"]["workers"] == 2


def test_two_clips_at_most_are_in_memory(
    fake: Path, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    most: list[int] = []
    read = probing.read_item

    def watched(item: Any) -> media.Clip:
        clip = np.array(read(item))
        alive.append(weakref.ref(clip))
        most.append(sum(ref() is not None for ref in alive))
        return clip

    monkeypatch.setattr(probing, "read_item", watched)
    run(fake, tmp_path / "out", reference=str(real), metrics=SETS)
    assert len(alive) >= 2 * COUNT
    assert max(most) <= 2


_VICTIM = """
import os, signal, sys
from pathlib import Path
from evalkit import run
import torch
torch.set_num_threads(1)
fake, real, out, moments = sys.argv[1], sys.argv[2], Path(sys.argv[3]), [float(m) for m in sys.argv[4:]]
for moment in moments:  # each run is a process of its own, killed so many seconds after its start
    child = os.fork()
    if not child:
        signal.setitimer(signal.ITIMER_REAL, 0)
        run(fake, out, reference=real, metrics=("fid", "kid", "psnr", "ssim", "flicker", "adherence"))
        os._exit(0)
    import time
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_kill_9_at_random_moments_changes_no_byte(fake: Path, real: Path, tmp_path: Path) -> None:
    start = time.perf_counter()
    run(fake, tmp_path / "whole", reference=str(real), metrics=SETS)
    took = time.perf_counter() - start
    moments = [str(random.uniform(0, 2 * took)) for _ in range(4)]
    support = str(Path(__file__).parents[1] / "support")
    words = [sys.executable, "-P", "-c", _VICTIM, str(fake), str(real), str(tmp_path / "cut"), *moments]
    subprocess.run(words, check=True, env={**os.environ, "PYTHONPATH": support}, timeout=120)
    run(fake, tmp_path / "cut", reference=str(real), metrics=SETS)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole"), moments


# --- bad input ------------------------------------------------------------------------------------------------------
def _empty(folder: Path) -> None:
    folder.mkdir()


def _texts_only(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("nothing to see")


def _mixed(folder: Path) -> None:
    fill(folder, [*clips(2), *clips(1, size=48)])


def _corrupt(folder: Path) -> None:
    fill(folder, clips(3))
    (folder / "01.png").write_bytes((folder / "01.png").read_bytes()[:400])


def _corrupt_video(folder: Path) -> None:
    fill(folder, clips(2))
    media.write(folder / "02.mp4", clips(1)[0])
    (folder / "02.mp4").write_bytes((folder / "02.mp4").read_bytes()[:300])


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (lambda folder: None, "neither a folder"),
        (_empty, "is empty"),
        (_texts_only, r"holds no image and no video, only 1 \.txt"),
        (_mixed, r"different sizes: 32x32 \(2 files.*48x48.*--mixed-sizes"),
        (_corrupt, r"01\.png"),
        (_corrupt_video, r"02\.mp4"),
    ],
)
def test_a_bad_folder_is_one_clear_error(
    prepare: Callable[[Path], None], text: str, real: Path, tmp_path: Path
) -> None:
    prepare(tmp_path / "bad")
    with pytest.raises(DiffEffError, match=text):
        run(tmp_path / "bad", tmp_path / "out", reference=str(real), metrics=("fid",))
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_corrupt_item_loses_nothing_of_the_others(fake: Path, real: Path, tmp_path: Path) -> None:
    run(fake, tmp_path / "whole", reference=str(real), metrics=SETS)
    good = (fake / "04.png").read_bytes()
    (fake / "04.png").write_bytes(good[: len(good) // 2])
    with pytest.raises(DiffEffError, match=r"04\.png.*Make the file anew or remove it"):
        run(fake, tmp_path / "out", reference=str(real), metrics=SETS)
    assert len(list((tmp_path / "out" / "diffeff-eval" / "features").iterdir())) == 1
    eval_features.CALLS.clear()
    (fake / "04.png").write_bytes(good)
    run(fake, tmp_path / "out", reference=str(real), metrics=SETS)
    assert len(eval_features.CALLS) == (2 * COUNT - 4) * FRAMES
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"metrics": ()}, ConfigError, "no metric is asked for"),
        ({"metrics": ("psrn",)}, UnknownName, "Did you mean 'psnr'"),
        ({"metrics": ("latent_l2",)}, ConfigError, "latents of both sides"),
        ({"metrics": ("clip",)}, ConfigError, "features that read texts"),
        ({"metrics": ("lpips",)}, ConfigError, "features that give feature maps"),
        ({"metrics": ("fid",), "features": None, "prompts": "THREE"}, ConfigError, "--features inception:PATH"),
        ({"metrics": ("fid",), "features": ("inceptoin:/x",)}, UnknownName, "inception"),
        ({"metrics": ("fid",), "features": ("inception:/nowhere/x.pth",)}, ModelLoadError, "/nowhere/x.pth"),
        ({"metrics": ("clip",), "features": ("clip:/nowhere/clip",)}, ModelLoadError, "/nowhere/clip"),
        ({"metrics": ("fid",), "features": ()}, ConfigError, "features are empty"),
        ({"metrics": ("fid",), "limit": 1}, ConfigError, "at least 2 items, and there is 1"),
        ({"metrics": ("fid",), "reference": None}, ConfigError, "fid needs a reference set"),
        ({"metrics": ("fid",), "reference": "nowhere"}, ConfigError, "there is no reference 'nowhere'"),
        ({"metrics": ("psnr",), "reference": "plain"}, ConfigError, "needs a model with a plan"),
        ({"prompts": "TWO"}, DiffEffError, "6 items but there are only 2 prompts"),
        ({"prompts": "nowhere.txt"}, UnknownName, "nowhere.txt"),
        ({"metrics": ("adherence",), "prompts": "CATS"}, ConfigError, "captions of the bundled world"),
        ({"fail_if": ("psnr=30",)}, ConfigError, "cannot be read"),
        ({"fail_if": ("fdi<3",)}, UnknownName, "Did you mean 'fid'"),
        ({"limit": 0}, ConfigError, "limit is 0"),
        ({"seed": -1}, ConfigError, "seed is -1"),
        ({"workers": 2}, ConfigError, "ray"),
        ({"engine": "spark"}, UnknownName, "spark"),
    ],
)
def test_bad_settings_are_one_clear_error_before_anything_is_computed(
    settings: dict[str, Any], error: type[Exception], text: str, fake: Path, real: Path, tmp_path: Path
) -> None:
    lists = {"TWO": captions(2), "THREE": ["a cat"] * COUNT, "CATS": ["a cat on a mat"] * COUNT}
    for name, texts in lists.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(texts))
    if settings.get("prompts") in lists:
        settings = settings | {"prompts": str(tmp_path / f"{settings['prompts']}.txt")}
    with pytest.raises(error, match=text):
        run(fake, tmp_path / "out", **{"reference": str(real), "metrics": ("psnr", "fid"), **settings})
    assert not eval_features.CALLS
    assert not (tmp_path / "out" / "report.json").exists()


def test_pairs_that_do_not_match_are_named(fake: Path, real: Path, tmp_path: Path) -> None:
    (real / "03.png").rename(real / "other.png")
    with pytest.raises(ConfigError, match="psnr needs a reference item for every item"):
        run(fake, tmp_path / "out", reference=str(real), metrics=("psnr",))
    assert run(fake, tmp_path / "out", reference=str(real), metrics=("fid",)).results[0].n == COUNT


@pytest.mark.parametrize(("change", "words"), [({"frames": 5}, "32x32 with 5 frames"), ({"size": 48}, "48x48")])
def test_pairs_of_other_shapes_are_said(change: dict[str, int], words: str, fake: Path, tmp_path: Path) -> None:
    other = fill(tmp_path / "other", clips(COUNT, **change))
    with pytest.raises(ConfigError, match=words):
        run(fake, tmp_path / "out", reference=str(other), metrics=("psnr",))


def test_more_prompts_than_items_are_noted(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("\n".join(captions(9)))
    result = run(fake, tmp_path / "out", prompts=str(tmp_path / "many.txt"), metrics=("adherence",))
    assert result.report["notes"] == [
        "many.txt has 3 more prompts than there are items: the first 6 were taken in order"
    ]


@pytest.mark.parametrize("what", ["out", "html", "stats", "work"])
def test_a_place_that_cannot_be_written_is_said_first(what: str, fake: Path, real: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    place = tmp_path / "file" / "report.json"
    out, more = (tmp_path / "file", {}) if what == "out" else (tmp_path / "out", {what: place})
    with pytest.raises(OutputError, match="cannot write"):
        run(fake, out, reference=str(real), metrics=("fid",), **more)
    assert not eval_features.CALLS


def test_the_report_must_be_json_and_not_a_folder(fake: Path, tmp_path: Path) -> None:
    from diffeff.eval.evaluate import EvalSettings, evaluate

    (tmp_path / "report.json").mkdir()
    for name, text in (("report.json", "a folder of that name"), ("report.txt", "report is JSON")):
        with pytest.raises(OutputError, match=text):
            evaluate(EvalSettings(subject=str(fake), metrics=("flicker",), out=tmp_path / name))


def test_mixed_sizes_can_be_allowed_for_sets(tmp_path: Path, real: Path) -> None:
    _mixed(tmp_path / "mixed")
    found = run(tmp_path / "mixed", tmp_path / "out", reference=str(real), metrics=("fid",), mixed_sizes=True)
    assert found.results[0].n == 3


def test_signals_are_what_they_were() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
