"""What every test runs under."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("DIFFEFF_KERNEL_CACHE", "off")  # no timing of one run decides another's kernel
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell that starts pytest in the background leaves interrupts ignored; tests interrupt runs, and must find them on.
signal.signal(signal.SIGINT, signal.default_int_handler)
