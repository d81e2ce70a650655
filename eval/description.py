"""What a report says about what was compared, and with which packages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from diffeff.eval.entries import Entry, content
from diffeff.eval.settings import PLAIN, EvalSettings
from diffeff.eval.summary import Sides
from diffeff.plan import Plan

__all__ = ["of_model", "samples_of", "versions"]

_SAMPLES = 8


def versions() -> dict[str, str]:
    """Further packages that decide a number: pixels, optical flow, texts."""
    packages = {
        "transformers": "transformers",
        "numpy": "numpy",
        "opencv": "opencv-python-headless",
        "pillow": "Pillow",
    }
    found = {}
    for name, package in packages.items():
        with suppress(PackageNotFoundError):
            found[name] = version(package)
    return found


def of_model(
    settings: EvalSettings, known: Mapping[str, Any], plan: Plan | None, entries: Sequence[Entry]
) -> dict[str, Any]:
    """A side that was generated, for a report."""
    chosen = {"plan": None if plan is None else plan.to_dict(), "plan_digest": None if plan is None else plan.digest}
    return {
        "kind": "model" if plan is not None or settings.plan is None else PLAIN,
        "model": settings.subject,
        **known,
        **chosen,
        "seed": settings.seed,
        "batch": settings.batch,
        "pixels": "8-bit, lossless PNG",
        **content(entries),
    }


def samples_of(sides: Sides) -> list[dict[str, Any]]:
    """The first items, for the eye."""
    partners = sides.partners or (None,) * len(sides.subject)
    return [
        {
            "name": entry.name,
            "prompt": entry.prompt,
            "subject": str(entry.path),
            "reference": None if partner is None else str(partner.path),
        }
        for entry, partner in list(zip(sides.subject, partners, strict=True))[:_SAMPLES]
    ]
