"""FID's Inception: the network, the resize, and every file that can be wrong.

GOLDEN was made once with torch-fidelity 0.4.0's FeatureExtractorInceptionV3 on the weights of `weights()`; in float64
our network gives the very same numbers as theirs.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffeff.errors import ConfigError, ModelLoadError
from diffeff.eval.features import inception
from diffeff.eval.features.inception import PUBLISHED, InceptionFeatures
from diffeff.eval.features.inception_network import FidInception, _Branched
from diffeff.eval.features.preprocess import resize_like_tensorflow1
from diffeff.eval.features.source import ClipSource, FeatureSource, TextImageSource
from diffeff.eval.metrics.perceptual import MapSource, perceptual

GOLDEN = [1.80772, 0.44443, 4.11032, 2.35910, 3.32313]


def weights() -> dict[str, Tensor]:
    """Random weights that keep a signal alive through 94 layers; they depend on nothing but torch's generator."""
    random = torch.Generator().manual_seed(0)
    found = FidInception().state_dict()
    for name in sorted(found):
        value = found[name]
        if name.endswith("conv.weight"):
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=random)
        elif name.endswith(("bn.weight", "running_var")):
            value.uniform_(0.5, 1.5, generator=random)
        elif not name.endswith("num_batches_tracked"):
            value.normal_(0, 0.2, generator=random)
    return found


def picture(height: int = 37, width: int = 53) -> Tensor:
    """uint8 [1, 3, height, width]: waves of another length for each colour."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([127.5 + 127.5 * torch.sin(x / (3 + c) + y / (5 - c)) for c in range(3)])[None].to(torch.uint8)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return weights()


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({**state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path


@pytest.fixture(scope="module")
def source(file: Path) -> InceptionFeatures:
    return InceptionFeatures(file)


def test_same_numbers_as_torch_fidelity(source: InceptionFeatures) -> None:
    row = source.images(picture())[0]
    found = torch.stack([row[0], row[777], row[2047], row.mean(), row.std()])
    assert torch.allclose(found, torch.tensor(GOLDEN), rtol=1e-4)


def test_layers_are_those_of_the_published_state_dict(state: dict[str, Tensor]) -> None:
    assert len([name for name in state if name.endswith("conv.weight")]) == 94
    assert len(state) + 2 == 566  # entries of the published file, its classifier included
    assert state["Mixed_6c.branch7x7dbl_2.conv.weight"].shape == (160, 160, 7, 1)
    assert state["Mixed_7c.branch3x3dbl_3b.bn.running_var"].shape == (384,)


def test_average_pools_leave_the_padding_out_and_the_last_pool_is_a_maximum() -> None:
    network = FidInception()
    flat = torch.ones(1, 192, 4, 4)
    pooled = network.get_submodule("Mixed_5b")._along(flat, ("avg",))
    assert torch.equal(pooled, flat)
    last = network.get_submodule("Mixed_7c")
    assert isinstance(last, _Branched)
    assert last._branches[-1][0] == "max"
    assert network.get_submodule("Mixed_7b")._branches[-1][0] == "avg"


def test_resize_takes_tensorflows_positions() -> None:
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert resize_like_tensorflow1(ramp, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert torch.equal(resize_like_tensorflow1(ramp, 4), ramp)
    assert resize_like_tensorflow1(ramp, 2)[0, 0, 0].tolist() == [0, 2]  # no antialiasing: every second pixel


def test_is_a_feature_source_that_says_what_it_is(source: InceptionFeatures, file: Path) -> None:
    assert isinstance(source, FeatureSource)
    assert isinstance(source, MapSource)
    assert not isinstance(source, ClipSource | TextImageSource)
    facts = source.describe()
    assert facts["spec"] == f"inception:{file}"
    assert facts["label"] == "Inception (unverified)"
    assert facts["published"] is False
    assert facts["form"] == "state dict"
    assert {"sha256", "dim", "size", "resize", "crop", "mean", "std"} <= facts.keys()


def test_a_published_file_gives_the_published_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "sha256", lambda path: next(iter(PUBLISHED)))
    found = InceptionFeatures(file)
    assert found.label == "Inception"
    assert found.describe()["published"] is True


def test_a_row_depends_on_its_image_only(source: InceptionFeatures) -> None:
    pair = torch.cat([picture(), 255 - picture()])
    rows = source.images(pair)
    assert rows.dtype == torch.float32
    assert torch.equal(rows[1:], source.images(pair[1:]))
    assert not torch.equal(rows[0], rows[1])
    assert source.images(pair[:0]).shape == (0, 2048)


def test_maps_serve_a_perceptual_distance(source: InceptionFeatures) -> None:
    maps = source.maps(picture())
    assert [list(found.shape[1:]) for found in maps] == [
        [192, 35, 35],
        [288, 35, 35],
        [768, 17, 17],
        [2048, 8, 8],
    ]
    assert torch.allclose(maps[-1].mean((2, 3)), source.images(picture()), atol=1e-4)
    clip = picture()[0].permute(1, 2, 0).numpy()[None]
    assert 0 < perceptual(clip, 255 - clip, source) < 4 * len(maps)


@pytest.mark.parametrize(
    "frames", [torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, 3).byte(), torch.zeros(3, 8, 8).byte()]
)
def test_other_pixels_are_refused(source: InceptionFeatures, frames: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"uint8 frames|need frames"):
        source.images(frames)


def test_a_missing_file_names_the_files_to_get(tmp_path: Path) -> None:
    with pytest.raises(
        ModelLoadError, match=r"no file.*pt_inception-2015-12-05-6726825d\.pth.*inception-2015-12-05\.pt"
    ):
        InceptionFeatures(tmp_path / "absent.pth")
    with pytest.raises(ModelLoadError, match="no file"):
        InceptionFeatures(tmp_path)


def test_a_damaged_file_is_one_clear_error(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for name, data in {
        "cut.pth": whole[: len(whole) // 2],
        "text.pth": b"not found",
        "empty.pth": b"",
        "x.safetensors": b"x",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelLoadError, match="is damaged"):
            InceptionFeatures(tmp_path / name)


def test_a_pickle_of_objects_is_not_run(tmp_path: Path) -> None:
    torch.save({"Conv2d_1a_3x3.conv.weight": Path("x")}, tmp_path / "objects.pth")
    with pytest.raises(ModelLoadError, match="unsafe"):
        InceptionFeatures(tmp_path / "objects.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"AuxLogits.conv0.conv.weight": torch.zeros(1)}, "torchvision's ImageNet Inception"),
        ({"Mixed_7c.branch1x1.conv.weight": torch.zeros(2, 2)}, "1 of 470 layers lack or misfit"),
        ({"Mixed_7c.branch1x1.bn.bias": torch.full((320,), torch.nan)}, "NaN"),
        (None, "470 of 470 layers"),
    ],
)
def test_weights_of_another_network_are_refused(
    state: dict[str, Tensor], tmp_path: Path, change: dict[str, Tensor] | None, message: str
) -> None:
    torch.save({"x": torch.zeros(1)} if change is None else {**state, **change}, tmp_path / "other.pth")
    with pytest.raises(ModelLoadError, match=message):
        InceptionFeatures(tmp_path / "other.pth")


def test_a_list_is_no_state_dict(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ModelLoadError, match="no state dict"):
        InceptionFeatures(tmp_path / "list.pth")


def test_safetensors_are_taken_too(state: dict[str, Tensor], source: InceptionFeatures, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, tmp_path / "weights.safetensors")
    assert torch.equal(InceptionFeatures(tmp_path / "weights.safetensors").images(picture()), source.images(picture()))


class _Scripted(torch.nn.Module):
    """The calling convention of stylegan2-ada-pytorch's file: uint8 of any size in, features out when asked."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        pooled = img.to(torch.float32).mean([1, 2, 3]).unsqueeze(1)
        return pooled.repeat(1, self.dim) if return_features else pooled


def _script(dim: int, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out; the files of others stay
        torch.jit.save(torch.jit.script(_Scripted(dim)), path)
    return path


def test_torchscript_runs_as_it_is(tmp_path: Path) -> None:
    found = InceptionFeatures(_script(2048, tmp_path / "inception.pt"))
    assert found.describe()["form"] == "TorchScript"
    frames = torch.stack([torch.zeros(3, 5, 7), torch.full((3, 5, 7), 200)]).to(torch.uint8)
    assert found.images(frames)[:, 9].tolist() == [0, 200]
    with pytest.raises(ConfigError, match="shows no layers"):
        found.maps(frames)


def test_torchscript_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="does not give"):
        InceptionFeatures(_script(1000, tmp_path / "other.pt"))
    whole = _script(2048, tmp_path / "plain.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Identity()), whole)
    with pytest.raises(ModelLoadError, match="does not run"):
        InceptionFeatures(whole)


def test_a_device_that_is_not_there_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="cannot run on device 'tpu9'"):
        InceptionFeatures(file, device="tpu9")
