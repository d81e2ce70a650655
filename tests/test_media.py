"""Clips on disk: formats, odd sizes, whole files, errors; and the pictures made of several clips."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from broken_media import corrupt_png, noise, truncated_apng, truncated_mp4, truncated_png, truncated_streaming_mp4
from PIL import Image

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


@pytest.mark.parametrize("shape", [(1, 5, 7), (2, 1, 1), (6, 33, 18)])
def test_lossless_gives_every_frame_back(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    made = noise(*shape)
    assert np.array_equal(media.read(media.write_lossless(tmp_path / "a.png", made, fps=24)), made)


def test_lossless_keeps_frames_that_equal_the_one_before(tmp_path: Path) -> None:
    still = np.repeat(noise(1, 16, 16), 5, axis=0)
    path = media.write_lossless(tmp_path / "a.png", still, fps=4)
    assert np.array_equal(media.read(path), still)
    with Image.open(path) as image:
        image.seek(1)
        assert image.info["duration"] == 250


def test_lossless_is_png_only_and_needs_a_place(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"ends in \.png"):
        media.write_lossless(tmp_path / "a.gif", clip())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        media.write_lossless(tmp_path / "file" / "a.png", clip())


@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".jpg", {"quality": 95}), (".JPEG", {"quality": 95}), (".webp", {"lossless": True}), (".bmp", {})],
)
def test_stills_of_every_format_are_read(tmp_path: Path, suffix: str, options: dict[str, object]) -> None:
    made = clip(1)
    Image.fromarray(made[0]).save(tmp_path / f"a{suffix}", **options)
    back = media.read(tmp_path / f"a{suffix}")
    assert back.shape == made.shape
    assert back.dtype == np.uint8
    assert np.median(np.abs(back.astype(int) - made)) <= (2 if suffix.lower().startswith(".jp") else 0)
    assert media.size_of(tmp_path / f"a{suffix}") == (48, 64)


def test_animated_webp_is_read_frame_by_frame(tmp_path: Path) -> None:
    made = clip(4)
    first, *rest = [Image.fromarray(image) for image in made]
    first.save(tmp_path / "a.webp", save_all=True, append_images=rest, lossless=True)
    assert np.array_equal(media.read(tmp_path / "a.webp"), made)


VIDEO_FORMATS = [
    (".mov", "mov", "libx264"),
    (".avi", "avi", "mpeg4"),
    (".mkv", "matroska", "libx264"),
    (".webm", "webm", "libvpx"),
    (".m4v", "mp4", "libx264"),
]


def video(path: Path, made: media.Clip, container: str, codec: str) -> Path:
    import av

    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = made.shape[1], made.shape[2], "yuv420p"
        for image in made:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("suffix", "container", "codec"), VIDEO_FORMATS)
def test_videos_of_every_format_are_read_and_cut_off_ones_are_not(
    tmp_path: Path, suffix: str, container: str, codec: str
) -> None:
    path = video(tmp_path / f"a{suffix}", clip(7), container, codec)
    assert media.read(path).shape == (7, 48, 64, 3)
    assert media.size_of(path) == (48, 64)
    whole = path.read_bytes()
    for kept in (0.5, 0.8, 0.95):
        path.write_bytes(whole[: int(kept * len(whole))])
        with pytest.raises((OSError, ValueError, EOFError)):
            media.read(path)


def test_an_mp4_that_ends_between_two_frames_is_not_a_shorter_clip(tmp_path: Path) -> None:
    import av

    path = truncated_streaming_mp4(tmp_path / "a.mp4", frames=6, keep=1.0)
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    whole = path.read_bytes()
    assert len(media.read(path)) == len(ends) == 6
    for end in ends[:-1]:
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="cut off after"):
            media.read(path)


@pytest.mark.parametrize("make", [truncated_png, corrupt_png, truncated_apng])
def test_damaged_images_are_errors(tmp_path: Path, make: object) -> None:
    assert callable(make)
    with pytest.raises((OSError, SyntaxError, EOFError)):
        media.read(make(tmp_path / "a.png"))


@pytest.mark.parametrize("make", [truncated_mp4, truncated_streaming_mp4])
def test_damaged_videos_are_errors(tmp_path: Path, make: object) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=r"cut off|Invalid data"):
        media.read(make(tmp_path / "a.mp4"))


def test_sixteen_bits_are_scaled_and_unknown_ranges_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert media.read(tmp_path / "deep.png")[0, 0].tolist() == [[0, 0, 0], [1, 1, 1], [255, 255, 255]]
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="32-bit"):
        media.read(tmp_path / "float.tiff")


def test_grey_palette_and_alpha_become_rgb(tmp_path: Path) -> None:
    colours = Image.fromarray(clip(1)[0])
    for name, image in {
        "grey": colours.convert("L"),
        "palette": colours.convert("P"),
        "alpha": colours.convert("RGBA"),
    }.items():
        image.save(tmp_path / f"{name}.png")
        assert media.read(tmp_path / f"{name}.png").shape == (1, 48, 64, 3)
    assert np.array_equal(media.read(tmp_path / "alpha.png"), clip(1))


def test_further_views_of_a_photo_are_no_frames(tmp_path: Path) -> None:
    first, second = (Image.fromarray(image) for image in clip(2))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert media.read(tmp_path / "a.jpg").shape == (1, 48, 64, 3)


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
