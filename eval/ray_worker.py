"""What runs in a worker process of the Ray engine, and the pickling both sides share."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffeff import __version__
from diffeff.errors import ConfigError, DiffEffError

__all__ = ["Worker", "pack"]


class Worker:
    """Keeps the state of the last `setup`, and never lets an exception out.

    `folder` is the caller's working folder: relative paths mean the same files here, where it exists.
    """

    def __init__(self, threads: int, folder: str) -> None:
        self.threads = threads
        self.setup: bytes | None = None
        self.state: Any = None
        if Path(folder).is_dir():
            os.chdir(folder)
        # Read by OpenMP and MKL when torch is first imported, which `setup` usually does.
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)

    def call(self, job: bytes, item: bytes) -> bytes:
        """The pickled (True, value), or (False, exception)."""
        try:
            function = self._prepared(job)
            return pack((True, function(self.state, pickle.loads(item))), "result")
        except Exception as error:  # it belongs to the caller, whatever it is
            return pack((False, _carried(error)), "error")

    def _prepared(self, job: bytes) -> Callable[[Any, Any], Any]:
        version, setup, function = pickle.loads(job)
        if version != __version__:
            raise ConfigError(f"this worker has diffeff {__version__}, the caller {version}: install the same version.")
        if setup != self.setup:
            self.setup = self.state = None  # the old state goes before the new one comes: two models may not fit
            self.state = pickle.loads(setup)()
            self.setup = setup
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(self.threads)
        loaded: Callable[[Any, Any], Any] = pickle.loads(function)
        return loaded


def _carried(error: Exception) -> Exception:
    """The exception as the caller will see it: itself when it survives pickling, with its traceback as a note."""
    try:
        alive = type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        alive = False
    carried = error if alive else DiffEffError(f"{type(error).__name__}: {error}")
    carried.add_note("In a Ray worker:\n" + "".join(traceback.format_exception(error)))
    return carried.with_traceback(None)


def pack(value: Any, what: str) -> bytes:
    """Pickled, with functions of `__main__` and of test modules by value. Raises ConfigError."""
    pickler: Any = importlib.import_module("ray.cloudpickle")
    try:
        packed: bytes = pickler.dumps(value)
    except Exception as error:
        raise ConfigError(f"the {what} cannot be sent between processes: {error}") from error
    return packed
