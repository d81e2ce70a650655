"""Tiny pipelines with random weights, built from diffusers' real classes: architecture and calling order are true.

No downloads: text arrives as embeddings, so there are no tokenizers or text encoders, and a VAE exists only where the
pipeline encodes or must decode. A denoiser call takes milliseconds. Weights depend on `seed` only; the global random
state is left alone. For trying a method on every family, for tests and for `diffeff bench matrix`; the pictures are
noise.

    pipe = make("wan")
    latents = run("wan", pipe, steps=4)                 # [1, 4, 3, 8, 12]
    pipe(**call_kwargs("wan", pipe, guidance=False))    # one branch only
"""

from __future__ import annotations

from diffeff.zoo.tiny.request import TEXT, WIDTH, Request, Tiny
from diffeff.zoo.tiny.settings import EXTRA, SMALL, entries
from diffeff.zoo.tiny.table import FAMILIES, call_kwargs, make, run, tiny

__all__ = [
    "EXTRA",
    "FAMILIES",
    "SMALL",
    "TEXT",
    "WIDTH",
    "Request",
    "Tiny",
    "call_kwargs",
    "entries",
    "make",
    "run",
    "tiny",
]
