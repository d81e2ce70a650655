"""diffeff makes Hugging Face diffusers pipelines faster, smaller and more controllable without retraining.

Everything is imported when it is first used: `import diffeff` alone loads neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from diffeff import _checkout

if TYPE_CHECKING:
    from diffeff.errors import (
        ArtefactError,
        AttachedModelError,
        ConfigError,
        DiffEffError,
        DiffEffWarning,
        ForeignPatchError,
        KernelUnavailable,
        MemoryBudgetError,
        MethodInapplicable,
        MissingExtra,
        ModelLoadError,
        OutputError,
        PlanConflict,
        PlanFormatError,
        RunInProgress,
        UnknownName,
        UnsupportedModel,
    )
    from diffeff.pipeline import DiffEffPipeline
    from diffeff.plan import Plan

__version__ = "0.1.0"

__all__ = [
    "ArtefactError",
    "AttachedModelError",
    "ConfigError",
    "DiffEffError",
    "DiffEffPipeline",
    "DiffEffWarning",
    "ForeignPatchError",
    "KernelUnavailable",
    "MemoryBudgetError",
    "MethodInapplicable",
    "MissingExtra",
    "ModelLoadError",
    "OutputError",
    "Plan",
    "PlanConflict",
    "PlanFormatError",
    "RunInProgress",
    "UnknownName",
    "UnsupportedModel",
    "__version__",
]

# All other public names are errors.
_HOMES = {"DiffEffPipeline": "diffeff.pipeline", "Plan": "diffeff.plan"}

_checkout.install()


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES.get(name, "diffeff.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names, imported already or not."""
    return sorted({*globals(), *__all__})
