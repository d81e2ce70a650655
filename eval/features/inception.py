"""`inception:PATH`: the 2,048 features that published FID and KID numbers are made of, from a file you have.

Two files are in use, and both are taken: the state dict of pytorch-fid and torch-fidelity, which runs in our own
network, and the TorchScript of stylegan2-ada-pytorch, which brings its own.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffeff.errors import ConfigError, ModelLoadError
from diffeff.eval.features.inception_network import DIM, SIDE, FidInception
from diffeff.eval.features.preprocess import (
    check_frames,
    device_of,
    exactly,
    in_batches,
    reason,
    resize_like_tensorflow1,
)
from diffeff.files import sha256

__all__ = ["PUBLISHED", "InceptionFeatures"]

PUBLISHED: Mapping[str, tuple[str, str]] = {
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": (
        "pt_inception-2015-12-05-6726825d.pth",
        "the state dict of pytorch-fid and torch-fidelity, on their GitHub release pages",
    ),
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": (
        "inception-2015-12-05.pt",
        "the TorchScript file of stylegan2-ada-pytorch, also used by clean-fid",
    ),
}
"""sha256 of the files everyone uses -> (their name, where they come from)."""

_EXPECTED = "Expected " + " or ".join(f"{name} ({origin})" for name, origin in PUBLISHED.values())


class InceptionFeatures:
    """Inception features of images [N, 3, H, W]: `FID-Inception` where the file is one of PUBLISHED.

    Any other file with the right layers is taken as well and labelled `Inception (unverified)`: its numbers are
    not those of papers. Raises ModelLoadError for a file that is missing, damaged, unsafe or of another network, and
    ConfigError for a device that is not there. A TorchScript file runs the code in it: take it from its makers only.
    """

    dim = DIM

    def __init__(self, path: str | Path, *, device: str | torch.device = "cpu") -> None:
        file = Path(path).expanduser()
        self.spec = f"inception:{path}"
        self._device = device_of(device)
        self.sha256 = _checksum(file)
        self.label = "Inception" if self.sha256 in PUBLISHED else "Inception (unverified)"
        self.form = "TorchScript" if _is_torchscript(file) else "state dict"
        load = _torchscript if self.form == "TorchScript" else _own_network
        self._network: Any = load(file, self._device)

    def images(self, frames: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] to float32 [N, 2048]. Raises ConfigError for frames of another type or shape."""
        check_frames(frames, self.spec)
        return in_batches(frames, self._see, dim=DIM, device=self._device, spec=self.spec)

    def maps(self, frames: Tensor) -> list[Tensor]:
        """uint8 [N, 3, H, W] to four feature maps [N, C, h, w], coarser and coarser, for an LPIPS-style distance.

        Raises ConfigError for a TorchScript file, which shows no layers.
        """
        if not isinstance(self._network, FidInception):
            raise ConfigError(f"features {self.spec!r} are TorchScript, which shows no layers: use the state dict")
        check_frames(frames, self.spec)
        with exactly():
            return self._network.maps(_prepared(frames, self._device))

    def describe(self) -> dict[str, Any]:
        """JSON-ready: the file, whether it is a published one, and how pixels are prepared."""
        return {
            "spec": self.spec,
            "label": self.label,
            "sha256": self.sha256,
            "dim": DIM,
            "form": self.form,
            "published": self.sha256 in PUBLISHED,
            "size": SIDE,
            "resize": "bilinear as in TensorFlow 1 (not antialiased), aspect not kept",
            "crop": None,
            "mean": [128 / 255] * 3,
            "std": [128 / 255] * 3,
        }

    def _see(self, frames: Tensor) -> Tensor:
        if isinstance(self._network, FidInception):
            own: Tensor = self._network(_prepared(frames, self._device))
            return own
        theirs: Tensor = self._network(frames.to(self._device), return_features=True)  # it resizes by itself
        return theirs


def _prepared(frames: Tensor, device: torch.device) -> Tensor:
    return (resize_like_tensorflow1(frames.to(device).float(), SIDE) - 128) / 128


def _checksum(path: Path) -> str:
    if not path.is_file():
        raise ModelLoadError(f"there is no file {path}. {_EXPECTED}.")
    try:
        return sha256(path)
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror or error}") from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())


def _own_network(path: Path, device: torch.device) -> FidInception:
    network = FidInception()
    network.load_state_dict(_checked(_state(path), network, path), strict=False)
    return network.eval().requires_grad_(False).to(device)


def _state(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelLoadError(f"{path} is damaged, or holds more than tensors and is unsafe. {_EXPECTED}.") from error
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        raise ModelLoadError(f"{path} is damaged ({reason(error)}): fetch it again. {_EXPECTED}.") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelLoadError(f"{path} holds no state dict of tensors. {_EXPECTED}.")
    return dict(found)


def _checked(found: dict[str, Tensor], network: FidInception, path: Path) -> dict[str, Tensor]:
    """The entries the network needs: not the classifier, nor the counters of batch norms."""
    if any(name.startswith("AuxLogits.") for name in found):
        raise ModelLoadError(f"{path} is torchvision's ImageNet Inception: other weights, other numbers. {_EXPECTED}.")
    wanted = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    wrong = [name for name, value in wanted.items() if name not in found or found[name].shape != value.shape]
    if wrong:
        listed = ", ".join(wrong[:3])
        raise ModelLoadError(f"{path}: {len(wrong)} of {len(wanted)} layers lack or misfit ({listed}). {_EXPECTED}.")
    if not all(found[name].isfinite().all() for name in wanted):
        raise ModelLoadError(f"{path} holds weights that are NaN or infinite. {_EXPECTED}.")
    return {name: found[name] for name in wanted}


def _torchscript(path: Path, device: torch.device) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would have us export the file anew; it is not ours
            network = torch.jit.load(path, map_location=device).eval()
        with torch.no_grad():
            probe = network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=device), return_features=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is TorchScript that does not run ({reason(error)}). {_EXPECTED}.") from error
    if not isinstance(probe, Tensor) or tuple(probe.shape) != (1, DIM):
        raise ModelLoadError(f"{path} is TorchScript that does not give [N, {DIM}] features. {_EXPECTED}.")
    return network
