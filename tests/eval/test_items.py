"""Folders of images and videos: names, order, manifests, and one clear error for everything that can be wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import broken_media as broken
import numpy as np
import pytest

from diffeff import media
from diffeff.eval.items import Item, ItemError, check_sizes, item_sha, open_folder, read_item
from diffeff.eval.records import RecordError


def touch(folder: Path, *names: str) -> Path:
    """Files that are only looked at by name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def test_items_come_in_natural_order_with_their_folders(tmp_path: Path) -> None:
    items = open_folder(touch(tmp_path, "img10.png", "img2.png", "b/clip.mp4", "img01.JPG", "v1.5.webm", "img1.png"))
    assert [item.name for item in items] == ["b/clip", "img01", "img1", "img2", "img10", "v1.5"]
    assert items[0] == Item("b/clip", tmp_path / "b" / "clip.mp4")
    assert items.by_name["v1.5"].path.name == "v1.5.webm"
    assert [item.name for item in items[1:3]] == ["img01", "img1"]
    assert items[1:3].folder == tmp_path


def test_hidden_files_are_left_out_and_others_counted(tmp_path: Path) -> None:
    names = (".a-tmp.png", ".cache/b.png", "a.png", "notes.txt", "latents/a.safetensors", "c.TXT", "LICENSE")
    items = open_folder(touch(tmp_path, *names))
    assert [item.name for item in items] == ["a"]
    assert items.ignored == {".safetensors": 1, ".txt": 2, "no suffix": 1}
    assert items.describe() == {
        "folder": str(tmp_path),
        "n": 1,
        "manifest": None,
        "prompts": 0,
        "ignored": {".safetensors": 1, ".txt": 2, "no suffix": 1},
    }


def test_a_folder_that_is_missing_empty_or_of_other_things_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ItemError, match="does not exist"):
        open_folder(tmp_path / "missing")
    with pytest.raises(ItemError, match="is empty"):
        open_folder(broken.empty_folder(tmp_path / "empty"))
    with pytest.raises(ItemError, match=r"no image and no video, only 2 \.txt"):
        open_folder(touch(tmp_path / "texts", "a.txt", "b.txt"))
    with pytest.raises(ItemError, match="is a file, not a folder"):
        open_folder(touch(tmp_path, "a.png") / "a.png")


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.png", "secret/b.png")
    scandir = os.scandir

    def denied(path: str) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ItemError, match=r"cannot look into .*secret: Permission denied"):
        open_folder(tmp_path)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ItemError, match=r"a\.jpg and .*a\.png would both be item 'a'"):
        open_folder(touch(tmp_path, "a.png", "a.jpg"))


def test_our_manifest_gives_prompts_and_seeds_and_may_end_in_a_cut_off_line(tmp_path: Path) -> None:
    rows = [{"name": "1", "prompt": "one", "seed": 11}, {"file": "2.png", "prompt": " two ", "seed": None}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "manifest.jsonl").write_text(lines + '{"name": "3", "pro')
    items = open_folder(touch(tmp_path, "1.png", "2.png", "3.png"))
    assert [(item.prompt, item.seed) for item in items] == [("one", 11), ("two", None), (None, None)]
    assert items.manifest == "manifest.jsonl"
    assert items.describe()["prompts"] == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "hello, you"}\n\n{"file_name": "d/b.png", "text": "b"}\n'),
        ("metadata.csv", 'file_name,text\na.png,"hello, you"\nd/b.png,b\n'),
        ("prompts.csv", 'Prompt,File\r\n"hello, you",a\r\nb,d/b\r\n'),
    ],
)
def test_layouts_of_other_tools_are_understood(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert [item.prompt for item in open_folder(touch(tmp_path, "a.png", "d/b.png"))] == ["hello, you", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file_name": "a.png"\n{"file_name": "b.png"}\n', "line 1: not JSON"),
        ('{"file_name": "z.png", "text": "z"}\n', "line 1: 'z.png' is not in the folder"),
        ('\n{"text": "z"}\n', "line 2: no column 'file_name' or 'file' or 'filename'. Found: text"),
        ('{"file_name": "a.png", "text": 5}\n', "line 1: text is 5, not a text"),
        ('{"file_name": "a.png", "seed": "x"}\n', "line 1: seed is 'x', not a whole number"),
        ('{"file_name": "a.png", "seed": 1.5}\n', "line 1: seed is 1.5"),
        ("[1]\n", "line 1: expected an object or a text, found list"),
    ],
)
def test_a_broken_manifest_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises((ItemError, RecordError), match=message.replace(".", r"\.")):
        open_folder(touch(tmp_path, "a.png", "b.png"))


def test_prompts_in_order_of_names_and_fewer_than_items(tmp_path: Path) -> None:
    items = open_folder(touch(tmp_path, "2.png", "10.png"))
    assert [(item.name, item.prompt) for item in items.with_prompts(["a", "b", "c"])] == [("2", "a"), ("10", "b")]
    with pytest.raises(ItemError, match="holds 2 items but there are only 1 prompts"):
        items.with_prompts(["a"])


def test_pixels_are_read_one_item_at_a_time(tmp_path: Path) -> None:
    items = open_folder(broken.folder_of_clips(tmp_path, count=3, frames=4))
    assert np.array_equal(read_item(items[2]), broken.noise(4, seed=2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (broken.empty_png, "it is no image or the file is damaged"),
        (broken.html_named_png, "it is no image or the file is damaged"),
        (broken.bad_checksum_png, "it is no image or the file is damaged"),
        (broken.truncated_png, "truncated"),
        (broken.corrupt_png, "broken data stream"),
        (broken.truncated_apng, "truncated"),
        (broken.truncated_mp4, "Invalid data"),
        (broken.truncated_streaming_mp4, "cut off after"),
    ],
)
def test_an_item_that_cannot_be_read_names_its_file(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    path = make(tmp_path / ("a.mp4" if "mp4" in make.__name__ else "a.png"))
    with pytest.raises(ItemError, match=words) as error:
        read_item(open_folder(tmp_path)[0])
    assert str(error.value).startswith(f"cannot read {path}: ")
    assert str(error.value).count(str(path)) == 1
    assert "Errno" not in str(error.value)


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    for name in ("a.png", "a.mp4"):
        with pytest.raises(ItemError, match=r"is gone"):
            read_item(Item("a", tmp_path / name))
    with pytest.raises(ItemError, match=r"cannot read .*a\.png"):
        item_sha(tmp_path / "a.png")


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    one = media.write_lossless(tmp_path / "one.png", broken.noise())
    other = media.write_lossless(tmp_path / "other.png", broken.noise())
    assert item_sha(one) == item_sha(other)
    media.write_lossless(other, broken.noise(seed=1))
    assert item_sha(one) != item_sha(other)


def test_one_size_is_given_and_several_are_refused(tmp_path: Path) -> None:
    assert check_sizes(open_folder(broken.folder_of_clips(tmp_path / "same", 2, size=(32, 48)))) == (32, 48)
    mixed = open_folder(broken.mixed_sizes_folder(tmp_path / "mixed"))
    with pytest.raises(ItemError, match=r"32x32 \(2 files, 000\.png\), 64x48 \(1 files, 002\.png\)\. Bring them"):
        check_sizes(mixed)
    with pytest.raises(ItemError, match="no items"):
        check_sizes([])


def test_sizes_name_a_file_with_a_broken_header(tmp_path: Path) -> None:
    broken.truncated_mp4(tmp_path / "a.mp4")
    with pytest.raises(ItemError, match=r"cannot read .*a\.mp4"):
        check_sizes(open_folder(tmp_path))
