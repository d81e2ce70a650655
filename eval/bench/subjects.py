"""What the clips of a bench show: prompts with their seeds, or the classes of a class-conditional model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffeff.eval.bench.store import digest
from diffeff.zoo import bundled

if TYPE_CHECKING:
    from diffeff.zoo.world import Scene

__all__ = ["CLASSES", "Subject", "Subjects", "subjects_of"]

CLASSES = "classes"


@dataclass(frozen=True)
class Subject:
    """One thing to show: the arguments of the call that name it, its seed, and the scene it can be checked against."""

    call: Mapping[str, Any]
    seed: int
    scene: Scene | None = None

    @property
    def key(self) -> str:
        return digest([dict(self.call), self.seed])

    def request(self) -> dict[str, Any]:
        """As a worker wants it."""
        return {"subject": dict(self.call), "seed": self.seed}

    def seen(self, frames: NDArray[np.float32]) -> dict[str, bool] | None:
        """Per attribute of the caption whether the frames [F, H, W, 3] show it; None without a scene."""
        if self.scene is None:
            return None
        import torch

        from diffeff.zoo.measure import adherence, measure

        clip = torch.from_numpy(np.asarray(frames)).permute(0, 3, 1, 2)
        return adherence(self.scene, measure(clip[0] if len(clip) == 1 else clip))


@dataclass(frozen=True)
class Subjects:
    """The subjects of a bench, with the name and sha256 of the set they come from."""

    name: str
    sha256: str
    items: Sequence[Subject]


def subjects_of(model: str, facts: Mapping[str, Any], source: str | None, limit: int, seed: int) -> Subjects:
    """The first `limit` of `source`; without one, of the set that suits the model."""
    if facts["classes"] is not None and source in (None, CLASSES):
        items = [Subject({"class_labels": [i % facts["classes"]]}, seed + i) for i in range(limit)]
        return Subjects(CLASSES, digest([dict(item.call) for item in items]), items)
    from diffeff.eval.prompts import load_prompts

    found = load_prompts(source or _suitable(model), limit)
    checkable = model in bundled.NAMES
    return Subjects(
        found.name,
        found.sha256,
        [Subject({"prompt": p.text}, seed + p.seed_offset, p.scene if checkable else None) for p in found],
    )


def _suitable(model: str) -> str:
    if not model.startswith("sprites-"):
        return "general"
    return "sprites" if bundled.recommended(model).frames else "sprites-stills"
