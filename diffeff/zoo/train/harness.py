"""What every trainer shares: a wall-clock schedule, EMA, Muon, logs, checkpoints that survive a crash.

Schedules follow the clock and not a step count, so "40 minutes" means 40 minutes on any machine.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

log = logging.getLogger("diffeff")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """How to run a trainer.

    `minutes` of wall clock in all, `out` the folder that receives the finished diffusers pipeline, `work`
    the folder of checkpoints and `train.log`, `resume` whether to continue from a checkpoint found there.
    """

    name: str
    out: Path
    work: Path
    minutes: float
    device: torch.device
    seed: int = 0
    resume: bool = True

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise ValueError(f"minutes={self.minutes} must be > 0")


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


class Clock:
    """Elapsed training minutes, carried across resumed runs by `elapsed`."""

    def __init__(self, minutes: float, elapsed: float = 0.0) -> None:
        self.minutes = minutes
        self._begin = time.monotonic() - 60.0 * elapsed

    @property
    def elapsed(self) -> float:
        """Minutes used so far, including those of earlier runs."""
        return (time.monotonic() - self._begin) / 60.0

    @property
    def fraction(self) -> float:
        """Share of the budget used, in [0, 1]."""
        return min(1.0, self.elapsed / self.minutes)

    @property
    def done(self) -> bool:
        """Whether the budget is used up."""
        return self.elapsed >= self.minutes


def cosine(fraction: float, warmup: float = 0.02, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up over the first `warmup` of the budget, then a cosine to `floor`."""
    if fraction < warmup:
        return max(0.05, fraction / warmup)
    along = min(1.0, (fraction - warmup) / max(1e-9, 1.0 - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * along))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's ``base_lr`` (recorded on first use) by `factor`."""
    for group in optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
        group["lr"] = group["base_lr"] * factor


class EMA:
    """Exponential moving average of the float tensors of one or more modules.

    The decay grows as (1 + n) / (10 + n) up to `decay`, so that an early average is not its random start.
    """

    def __init__(self, *modules: nn.Module, decay: float = 0.998) -> None:
        self.modules = modules
        self.decay = decay
        self.updates = 0
        self.shadow = [p.detach().clone() for p in self._parameters()]

    def _parameters(self) -> list[Tensor]:
        return [p for module in self.modules for p in module.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self._parameters()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run a block with the averaged weights in the modules, then put the live ones back."""
        live = [p.detach().clone() for p in self._parameters()]
        self.copy_to()
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self._parameters(), live, strict=True):
                    p.copy_(value)

    @torch.no_grad()
    def copy_to(self) -> None:
        """Write the averaged weights into the modules for good."""
        for p, value in zip(self._parameters(), self.shadow, strict=True):
            p.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        for mine, saved in zip(self.shadow, state["shadow"], strict=True):
            mine.copy_(saved)
        self.updates = int(state["updates"])


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz iterations, for the weights inside a network (Jordan 2024).

    Convolution kernels count as matrices [out, everything else]. Weights of one shape are orthogonalised
    together. Use AdamW for everything else.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; `closure` is not supported."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for same in by_shape.values():
                self._step_same(same, group)

    def _step_same(self, params: list[Tensor], group: dict[str, Any]) -> None:
        updates: list[Tensor] = []
        for p in params:
            state = self.state[p]
            buffer = state.setdefault("momentum", torch.zeros_like(p))
            gradient = cast("Tensor", p.grad)
            buffer.lerp_(gradient, 1 - group["momentum"])
            updates.append(gradient.lerp(buffer, group["momentum"]))
        directions = newton_schulz(torch.stack(updates).flatten(2))
        rows, columns = directions.shape[1:]
        # The update then has the same root-mean-square whatever the aspect ratio.
        scale = group["lr"] * max(1.0, rows / columns) ** 0.5
        for p, direction in zip(params, directions, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction.view_as(p), alpha=-scale)


def newton_schulz(matrices: Tensor, steps: int = 4) -> Tensor:
    """Nearest semi-orthogonal matrices [N, R, C], approximately, by a quintic iteration."""
    x: Tensor = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    flip = x.shape[1] > x.shape[2]
    x = x.mT if flip else x
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if flip else x


class JsonLog:
    """Append-only JSON lines: one record per call, flushed at once."""

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)

    def write(self, **record: Any) -> None:
        """Floats are rounded to five significant digits."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_rounded(record)) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write next to `path`, then rename: an interrupted save never leaves half a checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".tmp")
    torch.save(state, partial)
    partial.replace(path)


def state_of(
    model: nn.Module, ema: EMA, optimizers: list[torch.optim.Optimizer], steps: int, elapsed: float
) -> dict[str, Any]:
    """Everything a run needs to continue, for `save_checkpoint`."""
    return {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "steps": steps,
        "elapsed": elapsed,
    }


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint on the CPU, or None where there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def publish(built: Path, out: Path) -> None:
    """Swap the finished folder `built` into place at `out`; readers see the old or the new one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    retired = out.with_name(f".{out.name}.retired-{os.getpid()}")
    if out.exists():
        out.rename(retired)
    built.rename(out)
    shutil.rmtree(retired, ignore_errors=True)
    log.info("published %s", out)


@contextmanager
def progress_bar(name: str, clock: Clock) -> Iterator[Any]:
    """A rich bar over the clock; call the yielded function with a short text after each step."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, refresh_per_second=1) as bar:
        task = bar.add_task(name, total=clock.minutes, completed=int(clock.elapsed), note="")

        def tick(note: str) -> None:
            bar.update(task, completed=min(clock.minutes, clock.elapsed), note=note)

        yield tick


def split_parameters(blocks: Iterable[nn.Module], model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """(matrices inside `blocks` for Muon, every other parameter of `model` for AdamW)."""
    matrices: list[Tensor] = [p for block in blocks for p in block.parameters() if p.ndim == 2 and min(p.shape) > 8]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in chosen]
