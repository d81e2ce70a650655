"""Clips on disk: formats, odd sizes, whole files, errors; and the pictures made of several clips."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from diffeff import media, panels
from diffeff.errors import OutputError


def clip(frames: int = 5, height: int = 48, width: int = 64) -> media.Clip:
    """A bright square that moves right over a dark gradient."""
    made = np.zeros((frames, height, width, 3), dtype=np.uint8)
    made[..., 2] = np.linspace(0, 90, width, dtype=np.uint8)
    for i in range(frames):
        made[i, 16:32, 4 + 6 * i : 20 + 6 * i] = (220, 40, 40)
    return made


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63), (16, 33)])
def test_mp4_comes_back_with_every_frame_and_an_even_size(tmp_path: Path, height: int, width: int) -> None:
    made = clip(7, height, width)
    back = media.read(media.write(tmp_path / "a.mp4", made))
    assert back.shape == (7, height + height % 2, width + width % 2, 3)
    # 4:2:0 halves the resolution of colour, so edges differ; most of the picture must not.
    assert np.median(np.abs(back[:, :height, :width].astype(int) - made)) <= 4


def test_png_is_lossless_and_a_clip_becomes_a_row(tmp_path: Path) -> None:
    made = clip(3)
    assert np.array_equal(media.read(media.write(tmp_path / "still.png", made[:1])), made[:1])
    assert np.array_equal(media.read(media.write(tmp_path / "row.png", made)), np.concatenate(list(made), axis=1)[None])


def test_gif_keeps_frames_and_size(tmp_path: Path) -> None:
    assert media.read(media.write(tmp_path / "a.gif", clip(4))).shape == (4, 48, 64, 3)


def test_enlarging_repeats_pixels() -> None:
    big = media.enlarge(clip(2), 3)
    assert big.shape == (2, 144, 192, 3)
    assert np.array_equal(big[:, ::3, ::3], clip(2))


def test_floats_become_bytes_and_nan_becomes_black() -> None:
    values = np.array([[[[-1.0, 0.5, 2.0], [np.nan, 1.0, 0.0]]]], dtype=np.float32)
    assert media.to_bytes(values).tolist() == [[[[0, 128, 255], [0, 255, 0]]]]


def test_frames_of_takes_videos_and_images() -> None:
    video = SimpleNamespace(frames=np.zeros((1, 3, 8, 8, 3)))
    image = SimpleNamespace(images=np.zeros((2, 8, 8, 3)))
    assert media.frames_of(video).shape == (3, 8, 8, 3)
    assert media.frames_of(image).shape == (1, 8, 8, 3)


@pytest.mark.parametrize("name", ["a.avi", "a", "a.mp4.bak"])
def test_an_unknown_suffix_names_the_known_ones(tmp_path: Path, name: str) -> None:
    for act in (media.check_target, lambda path: media.write(path, clip())):
        with pytest.raises(OutputError, match=r"\.mp4") as error:
            act(tmp_path / name)
        assert ".gif" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for act in (media.check_target, lambda path: media.write(path, clip())):
        with pytest.raises(OutputError, match="cannot write"):
            act(tmp_path / "file" / "a.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(OutputError, match="folder of that name"):
        media.check_target(tmp_path / "folder.mp4")


def test_looking_at_a_target_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "old.png").write_bytes(b"precious")
    media.check_target(tmp_path / "old.png")
    media.check_target(tmp_path / "new.png")
    assert [p.name for p in tmp_path.iterdir()] == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == b"precious"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = media.write(tmp_path / "a.gif", clip(2))
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(media, "_write_gif", fail)
    with pytest.raises(KeyboardInterrupt):
        media.write(path, clip(3))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]


def test_side_by_side_shows_each_clip_under_its_label() -> None:
    made = panels.side_by_side(
        {"plain": clip(3, 32, 32), "accelerated, a long label that has to shrink": clip(3, 32, 32)}
    )
    assert made.shape[0] == 3
    assert made.shape[1] > 256
    assert made.shape[2] == 2 * 256 + 3 * 12
    assert made[:, :30].std() > 0  # the labels
    left, right = made[:, 32:288, 12:268], made[:, 32:288, 280:536]
    assert np.array_equal(left, right)
    assert np.array_equal(left[:, ::8, ::8], clip(3, 32, 32))


def test_contact_sheet_has_a_row_per_clip_and_spreads_long_clips() -> None:
    rows = {"plain\n30 steps": clip(25), "|difference|\nPSNR 30 dB": panels.difference(clip(25), clip(25))}
    sheet = panels.contact_sheet(rows, "a prompt", smallest=96, columns=5)
    assert sheet.shape[0] == 1
    assert sheet.shape[1] == 12 + 34 + 22 + 2 * (96 + 12)
    assert sheet.shape[2] > 5 * 128
    assert len(panels.contact_sheet({"still": clip(1)})) == 1


def test_difference_is_absolute_and_amplified() -> None:
    dark, light = np.full((1, 2, 2, 3), 10, np.uint8), np.full((1, 2, 2, 3), 30, np.uint8)
    assert (panels.difference(dark, light, gain=4) == 80).all()
    assert (panels.difference(light, dark, gain=40) == 255).all()
