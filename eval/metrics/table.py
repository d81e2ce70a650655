"""Every metric there is, in one table: what it takes, in which unit it comes out, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from diffeff.errors import ConfigError, UnknownName, nearest
from diffeff.eval.metrics.result import Better, Interval, Result, bootstrap_mean

__all__ = ["METRICS", "Kind", "Metric", "Need", "resolve"]

Kind = Literal["paired", "set", "aligned", "single", "world"]
"""`paired`: each item beside its reference. `set`: all items against all reference items. `aligned`: each item beside
its prompt. `single`: each item alone. `world`: each item beside its scene of the bundled world."""

Need = Literal["reference", "prompts", "features", "text", "clips", "maps", "latents", "video"]
"""`features`: any feature source. `text`: one that embeds texts, too. `clips`: one that sees motion. `maps`: one that
gives feature maps. `latents`: latents on both sides. `video`: items of more than one frame."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One line of the table. `label` is what a report prints; with features, their label is appended to it."""

    name: str
    label: str
    kind: Kind
    needs: frozenset[Need]
    unit: str
    better: Better
    summary: str
    source: str

    def result(
        self,
        value: float,
        n: int,
        *,
        interval: Interval | None = None,
        features: Mapping[str, Any] | None = None,
        details: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> Result:
        """A value of this metric as a Result. `features` is what the source says of itself (`describe()`)."""
        label = self.label if features is None else f"{self.label}-{features['label']}"
        return Result(
            self.name, label, value, self.unit, self.better, n, interval, features, dict(details or {}), tuple(notes)
        )

    def over_items(
        self, values: Sequence[float | None], *, features: Mapping[str, Any] | None = None, seed: int = 0
    ) -> Result:
        """The mean of a metric that has one value an item, with its bootstrap interval.

        None (nothing to measure, such as motion in a still) is left out and counted in a note. Identical items have
        an infinite PSNR: they are left out of the mean and counted, and the mean is infinite when all of them are.
        A value that is not a number stays one. Raises ConfigError when no item has a value.
        """
        measured = np.array([v for v in values if v is not None], dtype=np.float64)
        if not len(measured):
            raise ConfigError(f"{self.name}: none of the {len(values)} items has a value. {self.summary}")
        finite = measured[~np.isinf(measured)]
        notes = self._left_out(len(values), len(measured), len(measured) - len(finite))
        value = float(finite.mean()) if len(finite) else float(measured[0])
        interval = bootstrap_mean(finite, seed=seed) if len(finite) > 1 else None
        details: dict[str, Any] = {"identical": len(measured) - len(finite)} if self.name == "psnr" else {}
        details |= {"min": float(measured.min()), "max": float(finite.max())} if len(finite) else {}
        return self.result(value, len(measured), interval=interval, features=features, details=details, notes=notes)

    def _left_out(self, items: int, measured: int, infinite: int) -> list[str]:
        notes = []
        if measured < items:
            notes.append(f"{items - measured} of {items} items have no value and are left out")
        if infinite:
            what = "identical to their reference" if self.name == "psnr" else "infinite"
            notes.append(f"{infinite} of {measured} items are {what} and left out of the mean")
        if measured - infinite == 1:
            notes.append("one item: no interval")
        return notes


def _metric(
    name: str, label: str, kind: Kind, needs: tuple[Need, ...], unit: str, better: Better, summary: str, source: str
) -> Metric:
    return Metric(
        name=name,
        label=label,
        kind=kind,
        needs=frozenset(needs),
        unit=unit,
        better=better,
        summary=summary,
        source=source,
    )


_PAIRED: tuple[Need, ...] = ("reference",)
_LATENT: tuple[Need, ...] = ("reference", "latents")
_SET: tuple[Need, ...] = ("reference", "features")
# fmt: off
_ROWS = (
    _metric("psnr", "PSNR", "paired", _PAIRED, "dB", "higher",
            "Ratio of white to the pixel error against the reference; infinite when identical.",
            "mean over items of 10 log10(1 / MSE)"),
    _metric("ssim", "SSIM", "paired", _PAIRED, "", "higher",
            "Structural similarity to the reference, 1 when identical.",
            "Wang, Bovik, Sheikh, Simoncelli 2004"),
    _metric("mae", "MAE", "paired", _PAIRED, "", "lower",
            "Mean absolute pixel difference from the reference, as a share of white.",
            "mean |x - y|"),
    _metric("latent_cosine", "latent cosine", "paired", _LATENT, "", "higher",
            "Cosine of the final latents with those of the reference.",
            "x.y / |x||y|"),
    _metric("latent_l2", "latent relative L2", "paired", _LATENT, "", "lower",
            "Distance of the final latents from those of the reference, relative to their length.",
            "|x - y| / |x|"),
    _metric("flicker", "flicker", "single", ("video",), "", "lower",
            "Mean absolute change from frame to frame, motion included: compare the same scenes.",
            "1 - temporal flickering of VBench, Huang et al. 2024"),
    _metric("warping_error", "warping error", "single", ("video",), "", "lower",
            "Change from frame to frame that motion does not explain, hidden pixels left out.",
            "Lai et al. 2018; occlusions by Ruder, Dosovitskiy, Brox 2016; flow by Kroeger et al. 2016"),
    _metric("motion", "motion", "single", ("video",), "px/frame", "neither",
            "Mean length of the optical flow.",
            "flow by Kroeger, Timofte, Dai, Van Gool 2016"),
    _metric("fid", "FID", "set", _SET, "", "lower",
            "Fréchet distance of image features: how far apart the two sets are, as Gaussians.",
            "Heusel et al. 2017"),
    _metric("kid", "KID", "set", _SET, "", "lower",
            "Kernel distance of image features: unbiased, so it holds at a few hundred items.",
            "Bińkowski, Sutherland, Arbel, Gretton 2018"),
    _metric("cmmd", "CMMD", "set", _SET, "", "lower",
            "Kernel distance of normalised image embeddings, times 1000; published with CLIP's.",
            "Jayasumana et al. 2024"),
    _metric("precision", "precision", "set", _SET, "", "higher",
            "Share of the items that look like reference items.",
            "Kynkäänniemi, Karras, Laine, Lehtinen, Aila 2019"),
    _metric("recall", "recall", "set", _SET, "", "higher",
            "Share of the reference items that the set covers.",
            "Kynkäänniemi, Karras, Laine, Lehtinen, Aila 2019"),
    _metric("fvd", "FVD", "set", ("reference", "features", "clips", "video"), "", "lower",
            "Fréchet distance of features of whole clips, which see motion.",
            "Unterthiner et al. 2018"),
    _metric("clip", "CLIP", "aligned", ("prompts", "features", "text"), "", "higher",
            "How well images match their prompts; the mean over a clip's frames.",
            "Hessel, Holtzman, Forbes, Le Bras, Choi 2021"),
    _metric("clip_consistency", "CLIP-consistency", "single", ("features", "text", "video"), "", "higher",
            "Mean cosine of the image embeddings of neighbouring frames.",
            "Esser et al. 2023, frame consistency"),
    _metric("lpips", "LPIPS-style, unweighted", "paired", ("reference", "features", "maps"), "", "lower",
            "Distance of feature maps of a backbone of yours, without learned weights: not LPIPS.",
            "Zhang, Isola, Efros, Shechtman, Wang 2018, equation 1 with all weights 1"),
    _metric("adherence", "adherence", "world", ("prompts",), "", "higher",
            "Share of clips that show what their caption of the bundled world says, by attribute.",
            "diffeff.zoo.measure"),
)
# fmt: on

METRICS: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _ROWS})
"""Every metric by name."""


def resolve(names: Sequence[str]) -> list[Metric]:
    """The metrics of these names, in their order, each once.

    Raises ConfigError for no names at all, and UnknownName, with the nearest name, for one that is not in the table.
    """
    if not names:
        raise ConfigError(f"no metric is asked for: name at least one of {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            raise UnknownName(f"there is no metric {name!r}. {nearest(name, METRICS)}")
    return [METRICS[name] for name in dict.fromkeys(names)]
