"""Makes a plain checkout importable: there, four sub-packages are folders beside `diffeff/`, not inside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

__all__ = ["CheckoutFinder", "install"]

_ROOT = Path(__file__).resolve().parent.parent
_FOLDERS = {f"diffeff.{name}": _ROOT / name for name in ("kernels", "pipelines", "apps", "eval")}


class CheckoutFinder:
    """Finds `diffeff.kernels`, `.pipelines`, `.apps` and `.eval`, and nothing else, beside `diffeff/`."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        folder = _FOLDERS.get(name)
        if folder is None:
            return None
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def install() -> None:
    """Append the finder: an installed copy or an editable install, where there is one, is asked first."""
    # In site-packages a folder `kernels` beside `diffeff` is somebody else's.
    if (_ROOT / "pyproject.toml").is_file() and CheckoutFinder not in sys.meta_path:
        sys.meta_path.append(CheckoutFinder)
