"""Which metrics an evaluation computes, from which features: settled before anything is generated or measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffeff.errors import ConfigError
from diffeff.eval.metrics.table import METRICS, Metric, resolve
from diffeff.eval.probing import Ability, Features
from diffeff.eval.summary import Chosen

__all__ = ["Given", "choose", "metrics_for"]

_USUAL = ("fid", "kid", "clip", "psnr", "ssim", "adherence")
_KINDS = {"fvd": "clips", "clip": "match", "clip_consistency": "embeds", "cmmd": "embeds"}


@dataclass(frozen=True)
class Given:
    """What there is to compute from."""

    items: int
    reference: bool
    pairs: bool
    latents: bool
    prompts: bool
    scenes: bool
    abilities: tuple[Ability, ...] = ()

    def lacks(self, metric: Metric) -> str | None:
        """What a metric needs and is not there, with what to do; None when it can be computed."""
        needs = metric.needs
        wanted = (
            (metric.kind == "set" and not self.reference, "a reference set: give --reference"),
            (metric.kind == "set" and self.items < 2, f"at least 2 items, and there is {self.items}"),
            (metric.kind == "paired" and not self.pairs, _PAIRS),
            ("latents" in needs and not self.latents, _LATENTS),
            ("prompts" in needs and not self.prompts, "a prompt for every item: give --prompts, or a manifest"),
            (metric.kind == "world" and not self.scenes, _SCENES),
            ("features" in needs and not self.abilities, _FEATURES),
            ("features" in needs and not any(_serves(metric, a) for a in self.abilities), self._unfit(metric)),
        )
        return next((what for missing, what in wanted if missing), None)

    def _unfit(self, metric: Metric) -> str:
        specs = ", ".join(ability.spec for ability in self.abilities)
        what = " and ".join(text for need, text in _NEEDS.items() if need in metric.needs)
        return f"features that {what}; {specs} cannot. Add one that can to --features"


_NEEDS = {"text": "read texts (sprites, clip:...)", "clips": "see whole clips (sprites)", "maps": "give feature maps"}
_PAIRS = "a reference item for every item: name the reference files alike, or generate with a plan"
_LATENTS = "the latents of both sides, which only generation with a plan keeps"
_SCENES = "captions of the bundled world, such as 'a red circle moving left, camera static'"
_FEATURES = (
    "a feature source: give --features inception:PATH, clip:DIR_OR_ID or module:PACKAGE:FUNCTION; `sprites` knows the "
    "bundled world only"
)


def metrics_for(asked: Sequence[str] | None, given: Given) -> list[Metric]:
    """The metrics that were asked for, or the usual ones that can be computed.

    Raises ConfigError for one that was asked for and cannot be computed, and when there is none.
    """
    if asked is None:
        usual = [METRICS[name] for name in _USUAL if given.lacks(METRICS[name]) is None]
        if usual:
            return usual
        reasons = "; ".join(f"{name} needs {given.lacks(METRICS[name])}" for name in ("psnr", "fid", "clip"))
        raise ConfigError(f"there is nothing to compute: {reasons}")
    metrics = resolve(asked)
    for metric in metrics:
        lack = given.lacks(metric)
        if lack is not None:
            raise ConfigError(f"{metric.name} needs {lack}")
    return metrics


def choose(metrics: Iterable[Metric], abilities: Sequence[Ability], frames: int, device: str) -> list[Chosen]:
    """Each metric with the first source that can serve it, after `metrics_for`."""
    return [
        Chosen(metric, _features(metric, abilities, frames, device) if "features" in metric.needs else None)
        for metric in metrics
    ]


def _features(metric: Metric, abilities: Sequence[Ability], frames: int, device: str) -> Features:
    number = next(i for i, ability in enumerate(abilities) if _serves(metric, ability))
    kind = _KINDS.get(metric.name, "frames")
    if kind == "embeds" and abilities[number].embed_dim is None:
        kind = "frames"
    return Features(kind, number, abilities[number], frames, device)


def _serves(metric: Metric, ability: Ability) -> bool:
    return (
        ("text" not in metric.needs or ability.embed_dim is not None)
        and ("clips" not in metric.needs or ability.clip_dim is not None)
        and ("maps" not in metric.needs or ability.maps)
    )
