"""`diffeff doctor`: what this installation can do, and the known traps in it."""

from __future__ import annotations

import platform
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.markup import escape

from diffeff import __version__
from diffeff.cli.console import emit, out, table
from diffeff.cli.group import alone
from diffeff.cli.traps import available_memory, findings, installed

__all__ = ["build", "doctor"]

_HELP = """Look at this installation: versions, devices, kernels, optional packages, known traps.

Changes nothing and needs no network. Paste its output into a bug report.

\b
[bold]Examples[/]
diffeff doctor
diffeff doctor --json"""

_CORE = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "av", "pillow")
_KERNELS = ("int8_linear",)
# What each optional package buys, and whether it needs a CUDA device to be of use.
_OPTIONAL = {
    "peft": ("LoRA adapters", False),
    "triton": ("GPU kernels, torch.compile on CUDA", True),
    "flash-attn": ("attention kernel", True),
    "sageattention": ("8-bit attention kernel", True),
    "xformers": ("attention kernel", True),
    "torchao": ("quantised weights in diffusers", False),
    "bitsandbytes": ("quantised weights in diffusers", False),
    "torchvision": ("image metrics", False),
    "torchmetrics": ("FID, CLIP score", False),
    "gradio": ("diffeff app", False),
}


def build() -> typer.Typer:
    """The command."""
    return alone(doctor, _HELP)


def doctor(json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON on stdout.")] = False) -> None:
    """The command's work."""
    found = {
        "system": f"{platform.system()} {platform.machine()}, python {platform.python_version()}",
        "versions": {"diffeff": __version__} | {name: installed(name) for name in _CORE},
        "devices": _devices(),
        "kernels": _kernels(),
        "optional": [_optional(name) for name in _OPTIONAL],
        "findings": [vars(finding) for finding in findings()],
    }
    if json:
        emit(found)
    else:
        _show(found)


def _devices() -> list[dict[str, Any]]:
    import torch

    cpu = {
        "device": "cpu",
        "name": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "free_bytes": available_memory(),
    }
    return [cpu, *_accelerators()]


def _accelerators() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        free, _ = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found.append({"device": f"cuda:{index}", "name": name, "capability": f"sm_{major}{minor}", "free_bytes": free})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU", "capability": "mps", "free_bytes": available_memory()})
    return found


def _kernels() -> list[dict[str, Any]]:
    """Each operation of diffeff.kernels on each device: the kernels that can run there."""
    import torch

    found: list[dict[str, Any]] = []
    for name in _KERNELS:
        operation = import_module(f"diffeff.kernels.{name}")
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            usable = operation.kernels_on(torch.device(device))
            missing = [kernel for kernel in operation.KERNELS if kernel not in usable]
            found.append({"kernel": name, "device": device, "usable": list(usable), "not_usable": missing})
    return found


def _optional(name: str) -> dict[str, Any]:
    import torch

    buys, needs_cuda = _OPTIONAL[name]
    found = installed(name)
    reason = "not installed" if found is None else ""
    if found is not None and needs_cuda and not torch.cuda.is_available():
        reason = "needs a CUDA device"
    return {"name": name, "version": found, "buys": buys, "usable": not reason, "reason": reason}


def _show(found: dict[str, Any]) -> None:
    console = out()
    console.print(f"[bold]{found['system']}[/]")
    console.print(", ".join(f"{name} {number or 'missing'}" for name, number in found["versions"].items()))
    _rows(found["devices"], "device", "name", "capability", "free_bytes")
    _rows(found["kernels"], "kernel", "device", "usable", "not_usable")
    _rows(found["optional"], "name", "version", "usable", "buys", "reason")
    console.print()
    for finding in found["findings"]:
        colour = "yellow" if finding["level"] == "warning" else "cyan"
        console.print(f"[{colour}]{finding['level']}:[/] {escape(finding['what'])}\n  -> {escape(finding['cure'])}")
    if not found["findings"]:
        console.print("No known trap found.")


def _rows(items: list[dict[str, Any]], *columns: str) -> None:
    shown = table(*(name.replace("free_bytes", "free memory").replace("_", " ") for name in columns))
    for item in items:
        shown.add_row(*(_cell(item.get(name)) for name in columns))
    out().print()
    out().print(shown)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value / 2**30:.1f} GiB"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "-" if value is None else escape(str(value))
