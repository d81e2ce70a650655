"""Accuracies with honest intervals, and the model card they end up in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffeff.zoo.measure import adherence, measure
from diffeff.zoo.world import ATTRIBUTES, Scene


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion (95 % by default): honest at 0, at 1 and for small `trials`.

    Raises:
        ValueError: not 0 <= successes <= trials, or no trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"wilson needs 0 <= successes <= trials and trials >= 1, got {successes}/{trials}")
    p, zz = successes / trials, z * z
    centre = (p + zz / (2 * trials)) / (1 + zz / trials)
    half = z * math.sqrt(p * (1 - p) / trials + zz / (4 * trials * trials)) / (1 + zz / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`right` of `trials`, with its 95 % Wilson interval."""

    right: int
    trials: int

    @property
    def accuracy(self) -> float:
        """The proportion."""
        return self.right / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval."""
        return wilson(self.right, self.trials)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.3f} [{low:.3f}, {high:.3f}] ({self.right}/{self.trials})"


@dataclass(frozen=True, slots=True)
class Scores:
    """Accuracy per attribute, of all attributes together, and every confusion (wanted, seen) -> count."""

    attributes: dict[str, Accuracy]
    everything: Accuracy
    confusions: dict[str, dict[str, int]]

    def to_json(self) -> dict[str, Any]:
        """JSON scalars only, for a card."""
        named = {**self.attributes, "all": self.everything}
        return {
            "accuracy": {
                name: {**asdict(a), "accuracy": round(a.accuracy, 4), "interval95": [round(x, 4) for x in a.interval]}
                for name, a in named.items()
            },
            "confusions": self.confusions,
        }


def score_clips(scenes: Sequence[Scene], clips: Tensor | Sequence[Tensor]) -> Scores:
    """Measure each clip [F, 3, H, W] (or image [3, H, W]) in [0, 1] against the scene it should show.

    Raises:
        ValueError: the numbers of scenes and clips differ, or there are none.
    """
    if len(scenes) != len(clips) or not scenes:
        raise ValueError(f"score_clips needs one clip per scene, got {len(scenes)} scenes, {len(clips)} clips")
    right: dict[str, int] = {}
    confusions: dict[str, dict[str, int]] = {}
    complete = 0
    for scene, clip in zip(scenes, clips, strict=True):
        seen = measure(clip)
        result = adherence(scene, seen)
        complete += all(result.values())
        for name, ok in result.items():
            right[name] = right.get(name, 0) + ok
            if not ok:
                pair = f"{getattr(scene, name)} -> {getattr(seen, name)}"
                confusions.setdefault(name, {})[pair] = confusions.get(name, {}).get(pair, 0) + 1
    trials = len(scenes)
    attributes = {name: Accuracy(right[name], trials) for name in ATTRIBUTES if name in right}
    return Scores(attributes, Accuracy(complete, trials), confusions)


def write_card(folder: Path, card: Mapping[str, Any], readme: str) -> None:
    """Write `card.json` (facts for programs) and `README.md` (the same for people) into a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "card.json").write_text(json.dumps(dict(card), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme.rstrip() + "\n", encoding="utf-8")


def score_table(scores: Scores) -> str:
    """A Markdown table of the accuracies."""
    rows = ["| attribute | accuracy | 95 % interval | right / trials |", "|---|---|---|---|"]
    for name, a in {**scores.attributes, "all together": scores.everything}.items():
        low, high = a.interval
        rows.append(f"| {name} | {a.accuracy:.3f} | {low:.3f} to {high:.3f} | {a.right} / {a.trials} |")
    return "\n".join(rows)
