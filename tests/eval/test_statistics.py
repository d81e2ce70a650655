"""Reference statistics: kept, reused without the set, and refused when anything that decides a number differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_features import CALLS
from evalkit import PIXELS, WORDS, clips, fill, run
from safetensors.numpy import load_file, save_file

from diffeff.errors import ArtefactError, ConfigError, OutputError
from diffeff.eval.statistics import load, save

SOURCE = {"spec": "toy", "label": "toy", "sha256": "ab", "size": [64, 64], "device": "cpu"}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    rows = {"frames16": np.arange(12, dtype=np.float32).reshape(6, 2), "clips": np.ones((3, 5), np.float32)}
    counts = {"frames16": [1, 2, 3], "clips": [1, 1, 1]}
    content = {"items": 3, "sha256": "cd"}
    return save(tmp_path / "real.safetensors", rows, dict.fromkeys(rows, SOURCE), counts, content, "real/")


# --- the file -------------------------------------------------------------------------------------------------------
def test_rows_come_back_as_memory_maps(kept: Path) -> None:
    found = load(kept)
    rows = found.of("frames16", SOURCE)
    assert isinstance(rows, np.memmap)
    np.testing.assert_array_equal(rows, np.arange(12).reshape(6, 2))
    assert found.counts["frames16"] == [1, 2, 3]
    assert (found.items, found.content, found.origin) == (3, "cd", "real/")
    assert found.describe()["items"] == 3


def test_the_file_is_safetensors_for_everyone(kept: Path) -> None:
    arrays = load_file(kept)
    assert {name: array.shape for name, array in arrays.items()} == {"frames16": (6, 2), "clips": (3, 5)}


def test_spelling_label_and_device_may_differ(kept: Path) -> None:
    assert len(load(kept).of("clips", {**SOURCE, "spec": "/other/path", "label": "x", "device": "cuda"})) == 3


@pytest.mark.parametrize("change", [{"sha256": "ef"}, {"size": [32, 32]}, {"crop": "centre"}])
def test_another_source_or_preparation_is_refused_by_name(kept: Path, change: dict[str, Any]) -> None:
    (key,) = change
    with pytest.raises(ConfigError, match=rf"other features.*{key} is .* there.*--features"):
        load(kept).of("clips", {**SOURCE, **change})


def test_features_that_are_not_in_the_file_are_named(kept: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds features of frames16, clips, not the embeds16"):
        load(kept).of("embeds16", SOURCE)


def test_a_damaged_file_is_said(kept: Path) -> None:
    kept.write_bytes(kept.read_bytes()[:-3])
    with pytest.raises(ArtefactError, match=r"no reference statistics.*truncated"):
        load(kept)


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    np.savez(tmp_path / "fid.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ArtefactError, match="does not say which network"):
        load(tmp_path / "fid.npz")
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtefactError, match="not written by `diffeff eval --stats`"):
        load(tmp_path / "model.safetensors")
    with pytest.raises(OutputError, match=r"\.safetensors"):
        save(tmp_path / "a.npz", {}, {}, {}, {}, "")


# --- in an evaluation -----------------------------------------------------------------------------------------------
@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return fill(tmp_path / "fake", clips(3, noise=30)), fill(tmp_path / "real", clips(4, seed=1))


def test_kept_statistics_stand_in_for_the_set(folders: tuple[Path, Path], tmp_path: Path) -> None:
    fake, real = folders
    stats = tmp_path / "real.safetensors"
    first = run(fake, tmp_path / "a", reference=str(real), metrics=("fid", "kid"), stats=stats)
    CALLS.clear()
    alone = run(fake, tmp_path / "b", reference=str(stats), metrics=("fid", "kid"), work=tmp_path / "fresh")
    assert len(CALLS) == 3 * 3  # the frames of the subject's items only
    for one, other in zip(first.results, alone.results, strict=True):
        assert (one.value, one.interval) == (other.value, other.interval)
    assert alone.report["reference"]["kind"] == "statistics"
    assert alone.report["reference"]["items"] == 4
    by_flag = run(fake, tmp_path / "c", metrics=("fid", "kid"), stats=stats)
    assert [r.value for r in by_flag.results] == [r.value for r in first.results]


def test_statistics_of_other_features_are_refused_before_anything_is_computed(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    fake, real = folders
    stats = tmp_path / "real.safetensors"
    run(fake, tmp_path / "a", reference=str(real), metrics=("fid",), stats=stats)
    CALLS.clear()
    with pytest.raises(ConfigError, match="made with other features"):
        run(fake, tmp_path / "b", reference=str(stats), metrics=("fid",), features=("module:eval_features:others",))
    with pytest.raises(ConfigError, match="holds features of frames16, not the clips"):
        run(fake, tmp_path / "b", reference=str(stats), metrics=("fvd",), features=(WORDS,))
    assert not CALLS


def test_a_reference_that_changed_since_is_noticed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    fake, real = folders
    stats = tmp_path / "real.safetensors"
    settings: dict[str, Any] = {"reference": str(real), "metrics": ("fid",), "stats": stats}
    run(fake, tmp_path / "a", **settings)
    before = stats.read_bytes()
    run(fake, tmp_path / "a", **settings)
    fill(real, clips(5, seed=2))
    with pytest.raises(ConfigError, match=r"made from other items \(4 of .*real\).*Delete it"):
        run(fake, tmp_path / "a", **settings)
    assert stats.read_bytes() == before


def test_statistics_have_no_pairs_and_need_a_set_metric(folders: tuple[Path, Path], tmp_path: Path) -> None:
    fake, real = folders
    stats = tmp_path / "real.safetensors"
    with pytest.raises(ConfigError, match="ask for a set metric"):
        run(fake, tmp_path / "a", reference=str(fake), metrics=("psnr",), stats=stats)
    run(fake, tmp_path / "a", reference=str(real), metrics=("fid",), stats=stats)
    with pytest.raises(ConfigError, match="psnr needs a reference item for every item"):
        run(fake, tmp_path / "a", reference=str(stats), metrics=("psnr",))
    assert PIXELS in json.loads((tmp_path / "a" / "report.json").read_text())["settings"]["features"]
