"""What every test runs under."""

from __future__ import annotations

import os

os.environ.setdefault("DIFFEFF_KERNEL_CACHE", "off")  # no timing of one run decides another's kernel
os.environ.setdefault("HF_HUB_OFFLINE", "1")
