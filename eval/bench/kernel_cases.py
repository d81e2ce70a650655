"""What `diffeff bench kernels` runs: for each kernel a shape that models use, and the ways to compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffeff.kernels.group_norm import group_norm_two_pass
from diffeff.kernels.int8_attention import int8_attention_qk
from diffeff.kernels.int8_linear import int8_linear, kernels_on, quantise_weight
from diffeff.kernels.predict import predict
from diffeff.kernels.sliced_attention import sliced_attention
from diffeff.kernels.temporal_attention import temporal_attention
from diffeff.kernels.token_match import match_argmax, merge_scatter, token_groups

__all__ = ["CASES", "OURS", "Case", "Place"]

OURS = "diffeff"
Arm = Callable[[], Tensor]
_BACKENDS = {
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
    "cuda": (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ),
}


@dataclass(frozen=True)
class Place:
    """Where and in what precision a case runs; `full` says whether at the sizes of real models."""

    device: torch.device
    dtype: torch.dtype
    full: bool

    def noise(self, *shape: int) -> Tensor:
        """Gaussian numbers that leave the global random state alone."""
        generator = torch.Generator(self.device).manual_seed(sum(shape))
        return torch.randn(*shape, generator=generator, device=self.device).to(self.dtype)


@dataclass(frozen=True)
class Case:
    """One shape of one kernel. `bytes`: what must be read and written at least; `flop`: what must be computed at
    least. `arms`: our kernel and the others by name, `baseline` the one that ratios refer to."""

    kernel: str
    shape: str
    bytes: int
    flop: int
    arms: Mapping[str, Arm]
    baseline: str
    exact: bool = True
    """Whether all arms compute the same up to rounding (int8 does not)."""


def _sdpa_arms(place: Place, attend: Callable[[], Tensor]) -> dict[str, Arm]:
    """`attend`, which calls scaled_dot_product_attention, once per backend; the first is torch's choice."""
    arms: dict[str, Arm] = {"sdpa": attend}
    for backend in _BACKENDS.get(place.device.type, ()):
        arms[f"sdpa {backend.name.removesuffix('_ATTENTION').lower()}"] = partial(_pinned, backend, attend)
    return arms


def _pinned(backend: SDPBackend, attend: Arm) -> Tensor:
    with sdpa_kernel(backend):
        return attend()


def _size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# --- attention ------------------------------------------------------------------------------------------------------
def _temporal(place: Place) -> Iterator[Case]:
    """Motion modules: 16 frames, 8 heads of 40 channels; the map lies [batch, frames, positions, heads, channels]."""
    for t, s in ((16, 9216), (32, 9216)) if place.full else ((16, 256),):
        q, k, v = (place.noise(2, t, s, 8, 40) for _ in range(3))

        def permuted(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            """The copies that SDPA needs: positions beside the batch on the way in, the map's layout on the way out."""
            b, t, s, h, d = q.shape
            q, k, v = (x.permute(0, 2, 3, 1, 4).reshape(b * s, h, t, d) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v)
            return out.view(b, s, h, t, d).permute(0, 3, 1, 2, 4).contiguous()

        flop = 4 * q.numel() * t
        arms: dict[str, Arm] = {OURS: partial(temporal_attention, q, k, v), **_sdpa_arms(place, permuted)}
        yield Case("temporal_attention", f"2x{t}x{s}x8x40", 4 * _size(q), flop, arms, "sdpa")


def _sliced(place: Place) -> Iterator[Case]:
    """Dense, for the rule's sake, and half of the keys gathered with their sizes, as token merging leaves them."""
    shapes = ((2, 10, 4096, 64), (32, 8, 9216, 40), (1, 12, 32760, 128)) if place.full else ((1, 4, 512, 40),)
    for b, h, n, d in shapes:
        q, k, v = (place.noise(b, n, h, d).transpose(1, 2) for _ in range(3))
        plain = partial(F.scaled_dot_product_attention, q, k, v)
        triton: dict[str, Arm] = {"triton": partial(sliced_attention, q, k, v, kernel="triton")} if place.full else {}
        arms: dict[str, Arm] = {OURS: partial(sliced_attention, q, k, v), **triton, **_sdpa_arms(place, plain)}
        yield Case("sliced_attention dense", f"{b}x{h}x{n}x{d}", 4 * _size(q), 4 * n * q.numel(), arms, "sdpa")
        index = torch.arange(0, n, 2, device=place.device, dtype=torch.int32)
        size = torch.full((len(index),), 2.0, device=place.device).log()

        def gathered(q: Tensor = q, k: Tensor = k, v: Tensor = v, index: Tensor = index, size: Tensor = size) -> Tensor:
            rows = index.long()
            return F.scaled_dot_product_attention(q, k[:, :, rows], v[:, :, rows], size.to(q.dtype).expand(1, 1, 1, -1))

        ours = partial(sliced_attention, q, k, v, key_index=index, key_logsize=size)
        arms = {OURS: ours, **_sdpa_arms(place, gathered)}
        yield Case("sliced_attention gathered", f"{b}x{h}x{n}x{d}", 3 * _size(q), 2 * n * q.numel(), arms, "sdpa")


def _int8_attention(place: Place) -> Iterator[Case]:
    for b, h, n, d in ((2, 10, 4096, 64), (1, 12, 32760, 128)) if place.full else ((1, 2, 256, 64),):
        q, k, v = (place.noise(b, h, n, d) for _ in range(3))
        ours = lambda q=q, k=k, v=v: int8_attention_qk(q, k, v)[0]  # noqa: E731
        arms: dict[str, Arm] = {OURS: ours, **_sdpa_arms(place, partial(F.scaled_dot_product_attention, q, k, v))}
        yield Case("int8_attention_qk", f"{b}x{h}x{n}x{d}", 4 * _size(q), 4 * n * q.numel(), arms, "sdpa", exact=False)


# --- tokens ---------------------------------------------------------------------------------------------------------
def _match(place: Place) -> Iterator[Case]:
    b, n, m, c = (2, 12288, 4096, 640) if place.full else (1, 384, 128, 320)
    a, other = place.noise(b, n, c), place.noise(b, m, c)

    def whole() -> Tensor:
        scores = F.normalize(a, dim=-1) @ F.normalize(other, dim=-1).transpose(1, 2)
        return scores.max(-1)[0]

    arms: dict[str, Arm] = {OURS: lambda: match_argmax(a, other)[0], "matmul and max": whole}
    yield Case("match_argmax", f"{b}x{n}x{m}x{c}", _size(a, other), 2 * b * n * m * c, arms, "matmul and max")
    group = torch.randint(0, m, (b, n), generator=torch.Generator().manual_seed(0)).to(place.device)
    groups = token_groups(group, m)

    def scattered() -> Tensor:
        out = torch.zeros(b, m, c, dtype=a.dtype, device=a.device)
        return out.scatter_reduce(1, group[..., None].expand_as(a), a, "mean", include_self=False)

    arms = {OURS: lambda: merge_scatter(a, groups), "scatter_reduce": scattered}
    yield Case("merge_scatter", f"{b}x{n}x{c}", _size(a) + _size(other), a.numel(), arms, "scatter_reduce")


# --- maps -----------------------------------------------------------------------------------------------------------
def _group_norm(place: Place) -> Iterator[Case]:
    """The group norm of a motion module: over 16 frames together, whose axis is not the map's second."""
    shape = (32, 320, 72, 128) if place.full else (16, 64, 16, 16)
    x, weight, bias = place.noise(*shape), place.noise(shape[1]), place.noise(shape[1])

    def permuted() -> Tensor:
        video = x.unflatten(0, (-1, 16)).transpose(1, 2)
        return F.silu(F.group_norm(video, 32, weight, bias)).transpose(1, 2).flatten(0, 1)

    ours = partial(group_norm_two_pass, x, 32, weight, bias, silu=True, frames=16)
    arms: dict[str, Arm] = {OURS: ours, "group_norm and silu": permuted}
    label = "x".join(map(str, shape))
    yield Case("group_norm_two_pass", f"{label} over 16", 3 * _size(x), 6 * x.numel(), arms, "group_norm and silu")


def _predict(place: Place) -> Iterator[Case]:
    snapshots = [place.noise(2, 32760, 1536) if place.full else place.noise(2, 1024, 128) for _ in range(3)]
    weights = [3.0, -3.0, 1.0]

    def summed() -> Tensor:
        total = sum(w * x.float() for w, x in zip(weights, snapshots, strict=True))
        return torch.as_tensor(total).to(place.dtype)

    first = snapshots[0]
    arms: dict[str, Arm] = {OURS: partial(predict, snapshots, weights), "float32 sum": summed}
    shape = "x".join(map(str, first.shape))
    yield Case("predict", f"3 of {shape}", 4 * _size(first), 5 * first.numel(), arms, "float32 sum")


def _int8_linear(place: Place) -> Iterator[Case]:
    m, k, n = (32760, 1536, 8960) if place.full else (256, 320, 1280)
    x, weight = place.noise(m, k), place.noise(n, k)
    packed = quantise_weight(weight)
    arms: dict[str, Arm] = {"linear": partial(F.linear, x, weight)}
    for name in kernels_on(place.device):
        arms[f"{OURS} {name}"] = partial(int8_linear, x, *packed, kernel=name)
    moved = _size(x) + n * k + m * n * x.element_size()
    yield Case("int8_linear", f"{m}x{k}x{n}", moved, 2 * m * n * k, arms, "linear", exact=False)


CASES: Mapping[str, Callable[[Place], Iterator[Any]]] = {
    "temporal_attention": _temporal,
    "sliced_attention": _sliced,
    "int8_attention_qk": _int8_attention,
    "token_match": _match,
    "group_norm_two_pass": _group_norm,
    "predict": _predict,
    "int8_linear": _int8_linear,
}
