"""Prompt sets: the built-in ones, every file format, limits, and errors that name the line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from diffeff.errors import ConfigError, UnknownName
from diffeff.eval.prompts import BUILT_IN, Prompt, load_prompts
from diffeff.eval.records import RecordError
from diffeff.zoo.world import HELD_OUT, TRAIN, Scene


def given(tmp_path: Path, name: str, text: str | bytes) -> str:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_sprites_are_the_held_out_captions() -> None:
    prompts = load_prompts("sprites")
    assert prompts.scenes == list(HELD_OUT)
    assert prompts.texts == [scene.caption for scene in HELD_OUT]
    assert not set(prompts.scenes) & set(TRAIN)
    assert [prompt.seed_offset for prompt in prompts] == list(range(200))
    assert prompts.describe() == {"name": "sprites", "sha256": prompts.sha256, "n": 200}


def test_sprites_stills_say_what_one_frame_shows() -> None:
    prompts = load_prompts("sprites-stills", 5)
    assert prompts.texts == [scene.still_caption for scene in HELD_OUT[:5]]
    assert prompts[0].scene == Scene(HELD_OUT[0].colour, HELD_OUT[0].shape)


def test_general_has_ten_categories_of_twenty_different_prompts() -> None:
    prompts = load_prompts("general")
    assert len(prompts) == len({text.casefold() for text in prompts.texts}) == 200
    assert set(Counter(prompt.category for prompt in prompts).values()) == {20}
    assert len({prompt.category for prompt in prompts}) == 10
    assert prompts.scenes is None
    assert all(text == " ".join(text.split()) and text.isascii() for text in prompts.texts)
    assert max(len(text.split()) for text in prompts.texts) <= 45  # fits CLIP's 77 tokens


def test_every_built_in_set_loads_and_a_limit_takes_the_first() -> None:
    for name in BUILT_IN:
        assert load_prompts(name, 3).texts == load_prompts(name).texts[:3]
        assert load_prompts(name, 10_000).sha256 == load_prompts(name).sha256
        assert load_prompts(name, 3).sha256 != load_prompts(name).sha256


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(ConfigError, match=f"limit={limit}"):
        load_prompts("general", limit)


TEXTS = ["a red circle", 'a sign that says "go, now"', "größer als ein Haus"]

FILES = {
    "a.txt": "# first\n" + "\n\n".join(TEXTS) + "\n",
    "bom.txt": b"\xef\xbb\xbf" + "\r\n".join(TEXTS).encode(),
    "a.csv": 'id,Prompt\n1,a red circle\n2,"a sign that says ""go, now"""\n\n3,größer als ein Haus\n',
    "parti.tsv": 'Prompt\tCategory\na red circle\tx\n"a sign that says ""go, now"""\ty\ngrößer als ein Haus\tz\n',
    "drawbench.csv": 'Prompts,Category\na red circle,x\n"a sign that says ""go, now""",y\ngrößer als ein Haus,z\n',
    "a.jsonl": "\n".join(json.dumps({"caption": text, "other": 1}) for text in TEXTS),
    "bare.jsonl": "\n".join(json.dumps(text) for text in TEXTS),
    "list.json": json.dumps(TEXTS),
    "objects.json": json.dumps([{"text": text} for text in TEXTS]),
    "coco.json": json.dumps(
        {
            "images": [{"id": 9}, {"id": 4}, {"id": 7}],
            "annotations": [
                {"id": 1, "image_id": 9, "caption": TEXTS[0]},
                {"id": 2, "image_id": 4, "caption": TEXTS[1] + " "},
                {"id": 3, "image_id": 9, "caption": "another caption of the first image"},
                {"id": 4, "image_id": 7, "caption": TEXTS[2]},
            ],
        }
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_prompts_from_every_format(tmp_path: Path, name: str) -> None:
    prompts = load_prompts(given(tmp_path, name, FILES[name]))
    assert prompts.texts == TEXTS
    assert prompts.name == name
    assert prompts.sha256 == load_prompts(given(tmp_path, "other.txt", "\n".join(TEXTS))).sha256
    assert prompts[0].scene == Scene("red", "circle")
    assert prompts[1].scene is None


def test_a_file_of_sprites_captions_is_measurable(tmp_path: Path) -> None:
    prompts = load_prompts(given(tmp_path, "a.txt", "\n".join(scene.caption for scene in HELD_OUT)))
    assert prompts.scenes == list(HELD_OUT)
    assert prompts.sha256 == load_prompts("sprites").sha256


def test_categories_and_seeds_of_a_file(tmp_path: Path) -> None:
    headed = load_prompts(given(tmp_path, "a.txt", "none\n# one\nx\n#hashtag\n# two\ny\n"))
    assert [(p.text, p.category) for p in headed] == [("none", None), ("x", "one"), ("#hashtag", "one"), ("y", "two")]
    seeded = load_prompts(given(tmp_path, "a.csv", "prompt,seed,category\nx,7,c\ny,,\n"))
    assert list(seeded) == [Prompt("x", None, 7, "c"), Prompt("y", None, 1, None)]
    assert seeded.sha256 != load_prompts(given(tmp_path, "b.csv", "prompt\nx\ny\n")).sha256


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n# only a category\n\n", "holds no prompt"),
        ("a.txt", b"good\nb\xe4d\n", "line 2: not UTF-8"),
        ("a.csv", "", "holds no prompt"),
        ("a.csv", "prompt\n", "holds no prompt"),
        ("a.csv", "words\nx\n", "line 2: no column 'prompt' or 'caption' or 'text'. Found: words"),
        ("a.csv", "prompt,seed\nx,1\na, b,2\n", "line 3: 3 columns where the header has 2"),
        ("a.csv", 'prompt,seed\nx,1\n"open,2\n', "line 3: not a table"),
        ("a.csv", "prompt,seed\nx,one\n", "line 2: seed is 'one', not a whole number"),
        ("a.csv", "prompt,seed\nx,1\n ,2\n", "line 3: prompt is empty"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": "y"', "line 2: not JSON"),
        ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": null}\n', "line 3: prompt is empty"),
        ("a.jsonl", '{"prompt": ["x"]}\n', 'line 1: prompt is ["x"], not a text'),
        ("a.jsonl", "7\n", "line 1: expected an object or a text, found int"),
        ("a.json", "{", "not JSON"),
        ("a.json", '{"prompts": 3}', "expected a list of prompts, or COCO captions"),
        ("a.json", '["x", 4]', "entry 2: expected a text or an object, found int"),
        ("a.json", '["x", ""]', "entry 2: prompt is empty"),
        ("a.json", '{"annotations": [{"image_id": 1, "bbox": []}]}', "annotation 1: expected 'image_id' and 'caption'"),
        ("a.json", '{"annotations": []}', "holds no prompt"),
        ("a.xlsx", "x", ".xlsx is not known"),
        ("prompts", "x", "no suffix is not known"),
    ],
)
def test_a_file_that_cannot_be_read_as_prompts_says_where_and_why(
    tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    source = given(tmp_path, name, text)
    with pytest.raises(RecordError) as error:
        load_prompts(source)
    assert message in str(error.value)
    assert str(error.value).startswith(source)


def test_what_is_neither_a_name_nor_a_file_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'general'"):
        load_prompts("genral")
    with pytest.raises(UnknownName, match=r"no file of prompts.*\.jsonl"):
        load_prompts(str(tmp_path / "missing.csv"))
    with pytest.raises(UnknownName):
        load_prompts(str(tmp_path))  # a folder
