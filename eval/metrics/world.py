"""Do clips show what their captions of the bundled world say? Read from pixels, so no network judges a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from diffeff.errors import ConfigError
from diffeff.eval.metrics.fidelity import Pixels, check_clip, unit_pixels
from diffeff.eval.metrics.result import Interval, Result
from diffeff.eval.metrics.table import METRICS

if TYPE_CHECKING:
    from diffeff.zoo.world import Scene

__all__ = ["ALL", "adherence", "adherence_results", "shown"]

ALL = "all"
"""The line for clips that are right in every attribute they can show."""


def adherence(scenes: Sequence[Scene], clips: Iterable[Pixels]) -> list[Result]:
    """Share of clips that are right, one Result for each attribute and one for all of them together.

    One clip [F, H, W, 3] (floating point in [0, 1] or uint8) for each scene; `clips` may be a generator, only one is
    looked at at a time. Raises ConfigError when the numbers differ or there are none.
    """
    pairs = zip_longest(scenes, clips)
    return adherence_results([shown(*_both(scene, clip, len(scenes))) for scene, clip in pairs])


def shown(scene: Scene, clip: Pixels) -> dict[str, bool]:
    """For each attribute the clip can show, whether it is the scene's; a single frame shows no motion and no camera.

    JSON-ready, for `adherence_results`. About 10 ms for 9 x 64 x 64. Pixels that are not numbers count as black.
    """
    import torch

    from diffeff.zoo.measure import adherence as compare_words
    from diffeff.zoo.measure import measure

    check_clip(clip)
    frames = np.nan_to_num(unit_pixels(clip)).astype(np.float32).transpose(0, 3, 1, 2)
    return compare_words(scene, measure(torch.from_numpy(np.ascontiguousarray(frames))))


def adherence_results(records: Sequence[Mapping[str, bool]]) -> list[Result]:
    """One Result for each attribute and one for all, from what `shown` said of each clip; Wilson intervals.

    An attribute counts the clips that can show it. Raises ConfigError for no records.
    """
    if not records:
        raise ConfigError("adherence: no clips to look at")
    names = dict.fromkeys(name for record in records for name in record)
    results = [_result(name, [record[name] for record in records if name in record]) for name in names]
    return [*results, _result(ALL, [all(record.values()) for record in records])]


def _result(attribute: str, right: Sequence[bool]) -> Result:
    from diffeff.zoo.score import Accuracy

    accuracy = Accuracy(sum(right), len(right))
    result = METRICS["adherence"].result(
        accuracy.accuracy,
        len(right),
        interval=Interval(*accuracy.interval, "Wilson"),
        details={"attribute": attribute, "right": accuracy.right, "trials": accuracy.trials},
    )
    return replace(result, label=f"{result.label}: {attribute}")


def _both(scene: Scene | None, clip: Pixels | None, scenes: int) -> tuple[Scene, Pixels]:
    if scene is None or clip is None:
        more = "fewer" if clip is None else "more"
        raise ConfigError(f"adherence needs one clip for each scene: there are {more} clips than the {scenes} scenes")
    return scene, clip
