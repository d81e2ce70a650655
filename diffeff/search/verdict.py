"""What a tuning run found, in one or two sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from diffeff.search.points import Point, Target

__all__ = ["verdict"]


def verdict(target: Target, chosen: Point | None, best: Sequence[Point], points: Iterable[Point]) -> str:
    """The chosen plan beside fewer steps; or, where the target cannot be met, what can. `best` is the front."""
    if chosen is None:
        return _unmet(target, [p for p in best if p.candidate.kind != "plain"])
    figures = _figures(chosen)
    rival = [p for p in points if p.candidate.kind == "steps" and p.measured is not None]
    if chosen.candidate.kind == "steps":
        call = f"call it with num_inference_steps={chosen.candidate.steps}"
        return f"{target}: fewer steps alone are best. {figures}; {call}"
    words = f"{target}: {figures}"
    if rival:
        words += f". Fewer steps alone: {_figures(max(rival, key=lambda p: p.speedup))}"
    return words


def _unmet(target: Target, best: Sequence[Point]) -> str:
    if not best:
        return f"{target} cannot be reached, and nothing else made this model faster"
    nearest_ = max(best, key=lambda p: p.decibels if target.min_psnr is not None else p.speedup)
    return f"{target} cannot be reached. What can: {_figures(nearest_)}"


def _figures(point: Point) -> str:
    found = point.measured
    if found is None:
        return (
            f"{point.candidate.label}, about {point.speedup:.2f} times as fast as plain at {point.decibels:.1f} dB "
            "(on the tuning seeds)"
        )
    return (
        f"{point.candidate.label}, {found.speedup:.2f} times as fast as plain ({found.speedup_low:.2f} to "
        f"{found.speedup_high:.2f}) at {found.psnr:.1f} dB ({found.psnr_low:.1f} to {found.psnr_high:.1f}, worst "
        f"{found.psnr_worst:.1f}; {found.runs} runs on fresh seeds)"
    )
