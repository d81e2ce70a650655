"""The settings of `diffeff.zoo.tiny.settings`, under the short name that tests use; new methods get a line there."""

from diffeff.zoo.tiny import EXTRA, SMALL, entries

__all__ = ["EXTRA", "SMALL", "entries"]
