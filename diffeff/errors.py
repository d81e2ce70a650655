"""Every error diffeff raises on purpose. Each message says what is wrong, where, and what to do instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtefactError",
    "AttachedModelError",
    "ConfigError",
    "DiffEffError",
    "DiffEffWarning",
    "ForeignPatchError",
    "KernelUnavailable",
    "MemoryBudgetError",
    "MethodInapplicable",
    "MissingExtra",
    "ModelLoadError",
    "OutputError",
    "PlanConflict",
    "PlanFormatError",
    "RunInProgress",
    "UnknownName",
    "UnsupportedModel",
    "nearest",
]


class DiffEffError(Exception):
    """Root of all errors raised by diffeff."""


class DiffEffWarning(UserWarning):
    """Root of all warnings raised by diffeff."""


class ConfigError(DiffEffError, ValueError):
    """A method option has a value outside its allowed range; names field, value and range."""


class UnknownName(DiffEffError, ValueError):
    """A model, method, preset or key that does not exist; names the nearest one that does."""


class UnsupportedModel(DiffEffError):
    """The denoiser's architecture is not known, or is known not to work."""


class MethodInapplicable(DiffEffError):
    """A method finds nothing to act on in this model or at this setting."""


class PlanConflict(DiffEffError):
    """Two methods of a plan cannot hold together; gives the reason and an alternative."""


class PlanFormatError(DiffEffError, ValueError):
    """A plan file that cannot be read: bad JSON, unknown key, unsupported version."""


class ArtefactError(DiffEffError):
    """A file that a plan refers to is missing or its checksum does not match."""


class ModelLoadError(DiffEffError):
    """A model folder that is missing, incomplete, corrupted or unsafe to load."""


class AttachedModelError(DiffEffError, TypeError):
    """An operation (deepcopy, pickle, second attach) that would tear an attached plan from its session."""


class ForeignPatchError(DiffEffError):
    """Someone else's patch sits on top of ours, so the plan cannot be removed without damaging it."""


class RunInProgress(DiffEffError):
    """A pipeline call, or a change of plan, started while another call of the same pipeline is running."""


class KernelUnavailable(DiffEffError):
    """A kernel that was asked for by name cannot run on this device."""


class MemoryBudgetError(DiffEffError):
    """A call cannot fit a memory budget, or cannot be estimated; gives the numbers, the stage and what would help."""


class MissingExtra(DiffEffError, ImportError):
    """An optional dependency is needed; names the pip extra that brings it."""


class OutputError(DiffEffError, OSError):
    """An output file or folder cannot be written."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause for an error message: the closest known name, or the whole list when none is close."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    listed = ", ".join(options)
    return f"Did you mean {close[0]!r}? Known: {listed}." if close else f"Known: {listed}."
