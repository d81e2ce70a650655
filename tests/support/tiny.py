"""The tiny pipelines of `diffeff.zoo.tiny`, under the short name that tests use."""

from diffeff.zoo.tiny import FAMILIES, SMALL, TEXT, call_kwargs, entries, make, run

__all__ = ["FAMILIES", "SMALL", "TEXT", "call_kwargs", "entries", "make", "run"]
