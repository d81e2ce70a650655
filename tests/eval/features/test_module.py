"""Features by a function of the user's: found, tried, checked, and named when it breaks the contract."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from diffeff.errors import ConfigError, ModelLoadError, UnknownName
from diffeff.eval.features.module import module_features
from diffeff.eval.features.source import ClipSource, FeatureSource, TextImageSource
from diffeff.eval.metrics.perceptual import MapSource

GOOD = """
import torch

def features(frames):
    return frames.float().mean((2, 3)) / 255
"""

FULL = """
import torch

class Network(torch.nn.Module):
    label = "colours"
    sha256 = "0" * 64
    preparation = {"size": 8, "resize": "none", "mean": (0, 0, 0)}
    text_scale = 2.5

    def forward(self, frames):
        return frames.float().mean((2, 3))

    def clips(self, clips):
        return clips.float().std((1, 3, 4))

    def embed_texts(self, texts):
        return torch.tensor([[float(len(text)), 1, 2] for text in texts])

    def maps(self, frames):
        return [frames.float(), frames[:, :1].float()]

network = Network().eval()
"""


def write(tmp_path: Path, text: str, name: str = "mine.py") -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


def frames(count: int = 3) -> torch.Tensor:
    return torch.arange(count * 3 * 4 * 5).reshape(count, 3, 4, 5).to(torch.uint8)


def test_a_function_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    source = module_features(f"{path}:features")
    assert isinstance(source, FeatureSource)
    assert not isinstance(source, ClipSource | TextImageSource | MapSource)
    assert torch.allclose(source.images(frames()), frames().float().mean((2, 3)) / 255)
    assert source.images(frames()[:0]).shape == (0, 3)
    assert source.describe() == {
        "spec": f"module:{path}:features",
        "label": "mine.features",
        "sha256": source.sha256,
        "dim": 3,
        "size": None,
        "resize": "not told by the function",
        "crop": None,
        "mean": None,
        "std": None,
    }


def test_a_function_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD, "features_of_a_test.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert module_features("features_of_a_test:features").label == "features_of_a_test.features"
    sys.modules.pop("features_of_a_test")


def test_a_module_with_everything(tmp_path: Path) -> None:
    source = module_features(f"{write(tmp_path, FULL)}:network")
    assert isinstance(source, FeatureSource)
    assert isinstance(source, ClipSource)
    assert isinstance(source, TextImageSource)
    assert isinstance(source, MapSource)
    assert (source.label, source.text_scale, source.embed_dim, source.clip_dim) == ("colours", 2.5, 3, 3)
    assert source.describe()["mean"] == [0, 0, 0]
    assert source.embed_texts(["ab"]).tolist() == [[2, 1, 2]]
    assert torch.equal(source.embed_images(frames()), source.images(frames()))
    assert source.clips(frames(4).reshape(2, 2, 3, 4, 5)).shape == (2, 3)
    assert [list(found.shape) for found in source.maps(frames())] == [[3, 3, 4, 5], [3, 1, 4, 5]]
    with pytest.raises(ConfigError, match="need uint8 clips"):
        source.clips(frames())


def test_the_checksum_covers_source_weights_and_preparation(tmp_path: Path) -> None:
    def sha(text: str) -> str:
        return module_features(f"{write(tmp_path, text)}:network").sha256

    found = [sha(FULL), sha(FULL + "# edited"), sha(FULL.replace('"0"', '"1"')), sha(FULL.replace("8,", "9,"))]
    assert len(set(found)) == 4
    assert sha(FULL) == found[0]


def test_runs_without_gradients(tmp_path: Path) -> None:
    text = "import torch\nw = torch.ones(3, requires_grad=True)\ndef f(x):\n    return x.float().mean((2, 3)) * w\n"
    assert not module_features(f"{write(tmp_path, text)}:f").images(frames()).requires_grad


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return frames", r"must be a tensor \[N, D\], got \[2, 3, 224, 224\]"),
        ("return frames.float().mean((1, 2, 3))", r"must be a tensor \[N, D\]"),
        ("return frames.float().mean((0, 2, 3))[None]", r"got \[1, 3\] for N = 2"),
        ("return frames.amax((2, 3))", "floating point tensor, got torch.uint8"),
        ("return frames.numpy().mean((2, 3))", "got ndarray"),
        ("return frames.float().mean((2, 3)) * float('nan')", "NaN"),
        ("return frames.float().mean((2, 3)) - frames.float().mean((0, 2, 3))", "change with its batch"),
        ("import torch; return torch.randn(len(frames), 4)", "change with its batch"),
        ("raise ValueError('no weights')", r"failed on \[2, 3, 224, 224\]: ValueError: no weights"),
    ],
)
def test_a_function_that_breaks_the_contract_is_refused_at_once(tmp_path: Path, body: str, message: str) -> None:
    path = write(tmp_path, f"def features(frames):\n    {body}\n")
    with pytest.raises(ConfigError, match=message):
        module_features(f"{path}:features")


def test_a_function_that_breaks_later_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "def f(x):\n    return x.float().mean((2, 3)) / (x.shape[2] - 4)\n")
    with pytest.raises(ConfigError, match="NaN or infinity"):
        module_features(f"{path}:f").images(frames())


def test_attributes_that_break_the_contract_are_refused(tmp_path: Path) -> None:
    base = "import torch\ndef f(x):\n    return x.float().mean((2, 3))\n"
    wrong = {
        "f.clips = 3": r"clips' is int, not a function",
        "f.clips = lambda x: x": r"clips' must be a tensor \[N, D\]",
        "f.embed_texts = lambda texts: torch.zeros(len(texts), 7)": r"must be \[1, 3\], got \[1, 7\]",
        "f.preparation = {1, 2}": "JSON values",
        "f.preparation = [1]": "must be a dictionary",
        "f.text_scale = 'big'; f.embed_texts = lambda texts: torch.zeros(len(texts), 3)": "text_scale",
    }
    for line, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            module_features(f"{write(tmp_path, base + line)}:f")


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "\nnumber = 3\n")
    with pytest.raises(UnknownName, match=r"no function 'feature'\. Did you mean 'features'"):
        module_features(f"{path}:feature")
    with pytest.raises(ConfigError, match="not a function"):
        module_features(f"{path}:number")
    with pytest.raises(ModelLoadError, match="no file"):
        module_features(f"{tmp_path}/absent.py:features")
    with pytest.raises(ModelLoadError, match=r"cannot import no_such_package.part: .*module:part\.py:FUNCTION"):
        module_features("no_such_package.part:features")
    with pytest.raises(ModelLoadError, match="SyntaxError"):
        module_features(f"{write(tmp_path, 'def', 'broken.py')}:features")
    for spec in ("features", ":features", "package:"):
        with pytest.raises(ConfigError, match="name no function"):
            module_features(spec)


def test_describe_is_json(tmp_path: Path) -> None:
    facts = module_features(f"{write(tmp_path, FULL)}:network").describe()
    assert json.loads(json.dumps(facts)) == facts


def test_the_example_of_the_docs_holds(tmp_path: Path) -> None:
    page = Path(__file__).parents[3] / "docs" / "features.md"
    code = page.read_text("utf-8").partition("```python\n")[2].partition("```")[0]
    source = module_features(f"{write(tmp_path, code, 'my_features.py')}:colours")
    assert isinstance(source, ClipSource)
    assert isinstance(source, TextImageSource)
    assert isinstance(source, MapSource)
    assert source.describe()["label"] == "mean colour"
