"""Small, really trained diffusion pipelines and the procedural world they were trained on.

`world` renders captioned clips, `measure` reads the caption back from pixels, `score` turns that into
accuracies with intervals, `train` holds the one command that reproduces every bundled model.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Scene", "measure", "render"]


def __getattr__(name: str) -> Any:
    """Import lazily: `import diffeff.zoo` must not pull in torch."""
    if name in {"Scene", "render"}:
        from diffeff.zoo import world

        return getattr(world, name)
    if name == "measure":
        # The function shares its name with its module; importing the module rebinds the attribute.
        from diffeff.zoo.measure import measure

        globals()["measure"] = measure
        return measure
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
