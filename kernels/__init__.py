"""Kernels: every operation as plain torch (specification, fallback and test oracle) and, where it pays, Triton.

The package is `diffeff.kernels`. Its folder's name is also that of a Hugging Face package which diffusers and
transformers import, and a REPL, a notebook or `python -m` in the repository root finds this folder first. Imported
under the bare name `kernels`, it therefore gives way.
"""

from __future__ import annotations

__all__: list[str] = []


def _give_way() -> None:
    """Put Hugging Face's `kernels` in our place, searched for with the repository root left out.

    Where it is not installed an empty module without a file stays behind, as for a folder without `__init__.py`.
    transformers takes that for "not installed"; it lets a ModuleNotFoundError from here pass and fails to import.
    """
    import sys
    from importlib.machinery import ModuleSpec, PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    path = [entry for entry in sys.path if Path(entry).resolve() != root]
    spec = PathFinder.find_spec("kernels", path) or ModuleSpec("kernels", None, is_package=True)
    # The import system hands out whatever stands in sys.modules once this file has run.
    module = sys.modules["kernels"] = module_from_spec(spec)
    if spec.loader is not None:
        spec.loader.exec_module(module)


if __name__ == "kernels":
    _give_way()
