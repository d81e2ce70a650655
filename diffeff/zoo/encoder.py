"""The network behind the `sprites` features: frames, clips and captions of the bundled world as short vectors.

It was trained on that world only (`python -m diffeff.zoo.train sprites-encoder`) and knows nothing of any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffeff.errors import ModelLoadError

__all__ = ["FOLDER", "SIZE", "EncoderConfig", "SpritesEncoder", "load_card", "load_encoder", "word_ids"]

#: Frames are looked at in this size.
SIZE = 64
FOLDER = Path(__file__).parent / "models" / "sprites-encoder"
#: Words of a text that are read; captions of the world have at most 10, with the comma.
MAX_WORDS = 31
_END, _UNKNOWN = 0, 1
_CELLS = 8  # the trunk ends in 8x8 cells
_HIDDEN = 256
_GRAIN = 16  # filters for fine detail
_COARSE = (1, 4, 16)  # how far frames of 32x32 are averaged before their change is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """Sizes and vocabulary of the network: `frame_dim` and `clip_dim` of the features, `embed_dim` of the space that
    pictures share with texts, `width` of the convolutions, `words` that are known."""

    words: tuple[str, ...]
    frame_dim: int = 32
    clip_dim: int = 40
    embed_dim: int = 64
    width: int = 64

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"words": list(self.words)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EncoderConfig:
        """The inverse of `to_dict`."""
        return cls(**(data | {"words": tuple(data["words"])}))


class _Block(nn.Module):
    """x + conv(act(conv(act(x)))) with kernels of any shape; the second starts at zero."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        nn.init.zeros_(self.second.get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape out."""
        out: Tensor = x + self.second(F.silu(self.first(F.silu(x))))
        return out


class _Trunk(nn.Module):
    """Frames [N, 3, 64, 64] to maps [N, width, 8, 8]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.stem = nn.Conv2d(3, half, 8, stride=4, padding=2)
        self.fine = _Block(nn.Conv2d(half, half, 3, padding=1), nn.Conv2d(half, half, 1))
        self.down = nn.Conv2d(half, width, 3, stride=2, padding=1)
        self.coarse = _Block(nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, frames: Tensor) -> Tensor:
        """Pixels in [-1, 1]."""
        x = self.fine(self.stem(frames))
        out: Tensor = self.coarse(self.down(F.silu(x)))
        return out


class _Pool(nn.Module):
    """Maps [N, width, 8, 8] to one vector: what is there on average, how much it varies, and where."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.where = nn.Conv2d(width, 8, 1)
        self.mix = nn.Linear(2 * width + 8 * _CELLS**2 + _GRAIN, out)

    def forward(self, maps: Tensor, grain: Tensor) -> Tensor:
        """[N, out]; `grain` [N, 16] of the same pictures joins in."""
        x = F.silu(maps)
        spread = (x.var((2, 3), correction=0) + 1e-4).sqrt()
        out: Tensor = self.mix(torch.cat((x.mean((2, 3)), spread, self.where(x).flatten(1), grain), 1))
        return out


class _Grain(nn.Module):
    """Frames [N, 3, 64, 64] to the strength of their fine detail [N, 16]: what noise raises and blur takes away."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv2d(3, _GRAIN, 5, stride=2, bias=False)
        with torch.no_grad():  # they start blind to even areas
            self.filters.weight.sub_(self.filters.weight.mean((2, 3), keepdim=True))

    def forward(self, frames: Tensor) -> Tensor:
        """Pixels in [-1, 1]; the logarithm of each filter's energy, so in proportion to log sigma of a noise."""
        return _strength(self.filters(frames).square().mean((2, 3)))


def _strength(energy: Tensor) -> Tensor:
    return (energy + 1e-4).log() + 5.0  # around zero for ordinary pictures


class _Motion(nn.Module):
    """Maps of all frames [N, F, width, 8, 8] and the frames themselves to one vector [N, hidden]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.change = nn.Conv3d(3, half, (3, 6, 6), stride=(1, 4, 4), padding=(0, 1, 1))
        self.join = nn.Conv2d(width + half, width, 1)
        self.steps = nn.ModuleList(
            _Block(_Temporal(width), nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1))) for _ in range(2)
        )
        self.pool = _Pool(width, 128)
        self.mix = nn.Linear(5 * (128 + _GRAIN + len(_COARSE)), _HIDDEN)

    def forward(self, maps: Tensor, grain: Tensor, clips: Tensor) -> Tensor:
        """`grain` [N, F, 16] and `clips` [N, F, 3, 64, 64] in [-1, 1]."""
        batch, frames = clips.shape[:2]
        small = F.avg_pool2d(clips.flatten(0, 1), 2).unflatten(0, (batch, frames)).transpose(1, 2)
        change = self.change(_hold_ends(small)).transpose(1, 2)
        x = self.join(torch.cat((maps, change), 2).flatten(0, 1))
        x = x.unflatten(0, (batch, frames)).transpose(1, 2)
        for step in self.steps:
            x = step(x)
        x = self.pool(x.transpose(1, 2).flatten(0, 1), grain.flatten(0, 1)).unflatten(0, (batch, frames))
        out: Tensor = self.mix(_over_time(torch.cat((x, grain, _step_sizes(small)), 2)))
        return out


def _step_sizes(small: Tensor) -> Tensor:
    """How much each frame differs from the one before, fine to coarse: [N, F, 3] of clips [N, 3, F, 32, 32]."""
    before = torch.cat((small[:, :, :1], small[:, :, :-1]), 2)
    change = small - before
    sizes = [F.avg_pool3d(change, (1, n, n)).square().mean((1, 3, 4)) for n in _COARSE]
    steps = _strength(torch.stack(sizes, 2))
    # The first frame has no step of its own and takes the second's; in a still there is none.
    return torch.cat((steps[:, 1:2], steps[:, 1:]), 1) if small.shape[2] > 1 else steps


class _Temporal(nn.Conv3d):
    """A convolution over three neighbouring frames; beyond its ends a clip stands still."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, (3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape out."""
        return super().forward(_hold_ends(x))


def _hold_ends(x: Tensor) -> Tensor:
    """[N, C, F, H, W] with the first and the last frame once more."""
    return torch.cat((x[:, :, :1], x, x[:, :, -1:]), 2)


def _over_time(x: Tensor) -> Tensor:
    """Summaries of a course [N, F, C] that do not depend on its length: mean, spread, trend, extremes."""
    frames = x.shape[1]
    time = torch.linspace(-1, 1, frames, device=x.device).view(1, -1, 1) if frames > 1 else x.new_zeros(1, 1, 1)
    spread = (x.var(1, correction=0) + 1e-4).sqrt()
    return torch.cat((x.mean(1), spread, (x * time).mean(1), x.amax(1), x.amin(1)), 1)


class _Texts(nn.Module):
    """Word ids [N, L], ended by 0, to vectors [N, embed_dim]."""

    def __init__(self, words: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(words + 2, 48)
        self.read = nn.GRU(48, 96, batch_first=True)
        self.out = nn.Linear(96, dim)

    def forward(self, ids: Tensor) -> Tensor:
        """The state at the first 0 is what the text says."""
        states = self.read(self.table(ids))[0]
        end = (ids == _END).int().argmax(1)
        out: Tensor = self.out(states[torch.arange(len(ids), device=ids.device), end])
        return out


class SpritesEncoder(nn.Module):
    """Frame features, clip features, and one space for frames, clips and captions. Pixels are floats in [0, 1]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk, self.grain = _Trunk(config.width), _Grain()
        self.still = _Pool(config.width, _HIDDEN)
        self.motion = _Motion(config.width)
        self.frame_features = nn.Linear(_HIDDEN, config.frame_dim)
        self.clip_features = nn.Linear(_HIDDEN, config.clip_dim)
        self.frame_embed = nn.Linear(_HIDDEN, config.embed_dim)
        self.clip_embed = nn.Linear(_HIDDEN, config.embed_dim)
        self.texts = _Texts(len(config.words), config.embed_dim)

    def encode_frames(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, 64, 64] to features [N, frame_dim] and embeddings [N, embed_dim]."""
        pixels = frames * 2 - 1
        return self._read_frames(self.trunk(pixels), self.grain(pixels))

    def encode_clips(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """[N, F, 3, 64, 64] to features [N, clip_dim] and embeddings [N, embed_dim]."""
        pixels = clips * 2 - 1
        flat = pixels.flatten(0, 1)
        return self._read_clips(self.trunk(flat), self.grain(flat), pixels)

    def encode_both(self, clips: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Of all frames [N * F, ...] and of the clips, with the trunk run once: what training needs."""
        pixels = clips * 2 - 1
        flat = pixels.flatten(0, 1)
        maps, grain = self.trunk(flat), self.grain(flat)
        return self._read_frames(maps, grain), self._read_clips(maps, grain, pixels)

    def _read_frames(self, maps: Tensor, grain: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.silu(self.still(maps, grain))
        return self.frame_features(hidden), self.frame_embed(hidden)

    def _read_clips(self, maps: Tensor, grain: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        count = pixels.shape[:2]
        hidden = F.silu(self.motion(maps.unflatten(0, count), grain.unflatten(0, count), pixels))
        return self.clip_features(hidden), self.clip_embed(hidden)

    def encode_texts(self, ids: Tensor) -> Tensor:
        """Word ids [N, L] (see `word_ids`) to embeddings [N, embed_dim]."""
        out: Tensor = self.texts(ids)
        return out


def word_ids(texts: Sequence[str], words: Sequence[str]) -> tuple[Tensor, list[int]]:
    """Ids [N, 32] of texts, and how many words of each are not known (they share one id)."""
    table = {word: index + 2 for index, word in enumerate(words)}
    ids = torch.full((len(texts), MAX_WORDS + 1), _END)
    unknown = []
    for row, text in zip(ids, texts, strict=True):
        found = [table.get(word, _UNKNOWN) for word in re.findall(r"\w+|,", text.lower())]
        row[: min(len(found), MAX_WORDS)] = torch.tensor(found[:MAX_WORDS], dtype=torch.long)
        unknown.append(found.count(_UNKNOWN))
    return ids, unknown


def load_card(folder: Path = FOLDER) -> dict[str, Any]:
    """What is known about the encoder: its network's sizes, training and measurements.

    Raises:
        ModelLoadError: this installation lacks its files.
    """
    path = folder / "card.json"
    if not path.is_file():
        raise ModelLoadError(
            f"{folder} is missing or incomplete; `python -m diffeff.zoo.train sprites-encoder` makes it"
        )
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return card


def load_encoder(folder: Path = FOLDER, device: str | torch.device = "cpu") -> SpritesEncoder:
    """The trained encoder in float32, ready to use; 0.1 s.

    Raises:
        ModelLoadError: files are missing, or they do not fit this version of the network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    encoder = SpritesEncoder(EncoderConfig.from_dict(load_card(folder)["network"]))
    path = folder / "model.safetensors"
    try:
        encoder.load_state_dict({name: t.float() for name, t in load_file(path).items()})
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(f"the weights of the sprites encoder, {path}, cannot be used: {error}") from error
    return encoder.to(device).eval().requires_grad_(False)
