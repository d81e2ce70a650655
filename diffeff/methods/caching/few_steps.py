"""Few-step models: what is refused there, and what still helps."""

from __future__ import annotations

from diffeff.core.run import Run
from diffeff.errors import MethodInapplicable

__all__ = ["FEW", "STILL_HELPS", "caution", "refuse_protected"]

FEW = 8
"""Up to so many steps there is next to nothing to skip."""

STILL_HELPS = (
    "neighbouring steps of few-step models differ too much to predict one from another. What still helps there is "
    "making each step cheaper: int8_weights, kv_downsample, and guidance_skip where guidance is on; measure them with "
    "`diffeff generate --compare`."
)


def caution(run: Run) -> None:
    """Put into the report of a run of few steps what helps more than a cache."""
    if run.clock.length <= FEW:
        run.warn(f"a cache in a run of {run.clock.length} steps: {STILL_HELPS}")


def refuse_protected(name: str, length: int, first: int, last: int) -> None:
    """Raise MethodInapplicable where the protected steps are the whole run: nothing would be skipped."""
    if length > first + last:
        return
    raise MethodInapplicable(
        f"{name}: {length} steps are too few for a cache, because the first {first} and the last {last} are always "
        f"computed. Run at least {first + last + 2} steps, lower these numbers, or leave the cache out: {STILL_HELPS}"
    )
