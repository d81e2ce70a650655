"""The stores of an evaluation: append-only, keyed by content, whole after any interruption."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from diffeff.errors import ConfigError, OutputError
from diffeff.eval.append_log import AppendLog, code_digest, digest
from diffeff.eval.store import FeatureStore, ScalarStore, WorkFolder

SOURCE = {"spec": "toy", "label": "toy", "sha256": "ab", "size": 64}


def rows(seed: int, count: int = 3, dim: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def filled(folder: Path, *seeds: int) -> FeatureStore:
    store = FeatureStore(folder, 4, SOURCE)
    for seed in seeds:
        store.add(str(seed), rows(seed))
    return store


# --- features -------------------------------------------------------------------------------------------------------
def test_rows_come_back_bit_for_bit_after_reopening(tmp_path: Path) -> None:
    filled(tmp_path, 1, 2)
    store = FeatureStore(tmp_path, 4, SOURCE)
    assert "1" in store
    assert "3" not in store
    assert len(store) == 2
    np.testing.assert_array_equal(store.get("2"), rows(2))
    assert json.loads((tmp_path / "source.json").read_text())["sha256"] == "ab"


def test_a_key_keeps_its_first_rows_and_identical_files_share_them(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    store.add("1", rows(9))
    np.testing.assert_array_equal(store.gather(["1", "1"]), np.concatenate([rows(1), rows(1)]))
    assert (tmp_path / "rows.f32").stat().st_size == 3 * 4 * 4


def test_gathering_follows_the_keys_not_the_order_of_computing(tmp_path: Path) -> None:
    wanted = np.concatenate([rows(1), rows(2), rows(3)])
    for number, order in enumerate([(1, 2, 3), (3, 1, 2), (2, 3, 1)]):
        gathered = filled(tmp_path / str(number), *order).gather(["1", "2", "3"])
        assert isinstance(gathered, np.memmap)  # whatever the order: no copy in memory
        np.testing.assert_array_equal(gathered, wanted)


def test_an_array_stays_valid_when_rows_are_added(tmp_path: Path) -> None:
    store = filled(tmp_path, 2, 1)
    gathered = store.gather(["1", "2"])
    store.add("3", rows(3))
    np.testing.assert_array_equal(gathered, np.concatenate([rows(1), rows(2)]))


def test_gathering_nothing_is_an_empty_array(tmp_path: Path) -> None:
    assert filled(tmp_path).gather([]).shape == (0, 4)


@pytest.mark.parametrize("cut", [1, 5, 30, 50])
def test_a_cut_index_loses_its_last_item_only(tmp_path: Path, cut: int) -> None:
    filled(tmp_path, 1, 2)
    index = tmp_path / "index.jsonl"
    index.write_bytes(index.read_bytes()[:-cut])
    store = FeatureStore(tmp_path, 4, SOURCE)
    assert "1" in store
    assert "2" not in store
    store.add("2", rows(2))
    np.testing.assert_array_equal(store.gather(["1", "2"]), np.concatenate([rows(1), rows(2)]))


@pytest.mark.parametrize("cut", [1, 4, 17, 48])
def test_cut_rows_lose_their_item_only(tmp_path: Path, cut: int) -> None:
    filled(tmp_path, 1, 2)
    os.truncate(tmp_path / "rows.f32", 2 * 48 - cut)
    store = FeatureStore(tmp_path, 4, SOURCE)
    assert "1" in store
    assert "2" not in store


def test_rows_without_an_index_line_are_cut_off(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    with (tmp_path / "rows.f32").open("ab") as file:
        file.write(b"x" * 30)
    store = FeatureStore(tmp_path, 4, SOURCE)
    assert (tmp_path / "rows.f32").stat().st_size == 48
    store.add("2", rows(2))
    np.testing.assert_array_equal(store.get("2"), rows(2))


def test_damaged_rows_are_not_believed(tmp_path: Path) -> None:
    filled(tmp_path, 1, 2)
    with (tmp_path / "rows.f32").open("r+b") as file:
        file.write(b"\0\0\0\0")
    store = FeatureStore(tmp_path, 4, SOURCE)
    assert "1" not in store
    assert "2" in store
    store.add("1", rows(1))
    np.testing.assert_array_equal(store.gather(["1", "2"]), np.concatenate([rows(1), rows(2)]))


@pytest.mark.parametrize("bad", [np.zeros(4, np.float32), np.zeros((2, 5), np.float32), np.full((1, 4), np.nan, "f4")])
def test_rows_that_would_spoil_the_store_are_refused(tmp_path: Path, bad: np.ndarray) -> None:
    store = filled(tmp_path, 1)
    with pytest.raises(ConfigError, match="feature source"):
        store.add("2", bad)
    assert "2" not in store
    store.add("3", rows(3))
    np.testing.assert_array_equal(store.get("3"), rows(3))


# --- numbers and lines ----------------------------------------------------------------------------------------------
def test_numbers_come_back_exactly_infinite_ones_too(tmp_path: Path) -> None:
    values = {"value": 0.1 + 0.2, "top": math.inf, "none": math.nan}
    store = ScalarStore(tmp_path / "psnr.jsonl")
    store.add("a", values)
    store.add("a", {"value": 5.0})
    again = ScalarStore(tmp_path / "psnr.jsonl")
    assert again["a"]["value"] == 0.1 + 0.2
    assert again["a"]["top"] == math.inf
    assert math.isnan(again["a"]["none"])
    assert "b" not in again


def test_a_damaged_line_in_the_middle_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n\xff{broken\n[1]\n{"n": 2}\n{"n": ')
    log = AppendLog(path)
    assert log.records == [{"n": 1}, {"n": 2}]
    log.append({"n": 3})
    assert AppendLog(path).records[-1] == {"n": 3}


# --- the folder -----------------------------------------------------------------------------------------------------
def test_sources_do_not_share_vectors_but_spellings_do(tmp_path: Path) -> None:
    with WorkFolder(tmp_path) as work:
        store = work.features(SOURCE, "frames16", 4)
        assert work.features({**SOURCE, "spec": "./toy"}, "frames16", 4) is store
        assert work.features({**SOURCE, "size": 299}, "frames16", 4) is not store
        assert work.features({**SOURCE, "sha256": "cd"}, "frames16", 4) is not store
        assert work.features(SOURCE, "clips", 4) is not store


def test_two_evaluations_do_not_share_a_folder_at_once(tmp_path: Path) -> None:
    with WorkFolder(tmp_path), pytest.raises(OutputError, match="in use by another evaluation"), WorkFolder(tmp_path):
        pass
    with WorkFolder(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"), WorkFolder(tmp_path / "file" / "work"):
        pass


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_code_is_known_by_its_sources() -> None:
    one, other = code_digest("diffeff.eval.metrics.fidelity"), code_digest("diffeff.eval.metrics")
    assert len({one, other, code_digest("diffeff.core")}) == 3
    assert code_digest("diffeff.eval.metrics.fidelity") == one
