"""What a bench is asked for, and the command that asks for one of its rows again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffeff.errors import ConfigError
from diffeff.eval.bench.arms import Arm
from diffeff.eval.settings import CallSettings

__all__ = ["BenchSettings", "command"]


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """`plans` and `against` are specs (see `arms`). `prompts`: a built-in set or a file; None takes the one that suits
    the model, `limit` of them. `call` lies over the model's recommended settings. `out` is the JSON-lines file that
    gets the rows, `work` where unfinished results wait (beside `out` by default). `patience`: seconds that one run may
    take. `turns` keeps one worker alive at a time; None decides by the memory."""

    model: str = "sprites-wan"
    plans: Sequence[str] = ()
    against: Sequence[str] = ()
    sweep: bool = False
    prompts: str | None = None
    limit: int = 20
    seed: int = 0
    call: CallSettings = field(default_factory=CallSettings)
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    memory: bool = True
    out: Path | None = None
    work: Path | None = None
    patience: float = 3600.0
    turns: bool | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "threads", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"bench {name}={value}: must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"bench seed={self.seed}: must be at least 0")


def command(settings: BenchSettings, arm: Arm, prompts: int, prompt_set: str) -> str:
    """The command line that makes the row of `arm` again (with plain beside it, as always)."""
    words = ["diffeff", "bench", settings.model, *_arm_words(settings, arm)]
    words += ["--prompts", prompt_set, "--limit", str(prompts), "--seed", str(settings.seed)]
    for name in ("steps", "guidance", "frames"):
        if (value := getattr(settings.call, name)) is not None:
            words += [f"--{name}", str(value)]
    if settings.call.width is not None:
        words += ["--size", f"{settings.call.width}x{settings.call.height}"]
    words += ["--device", settings.device, "--dtype", settings.dtype]
    if settings.threads is not None:
        words += ["--threads", str(settings.threads)]
    return shlex.join(words)


def _arm_words(settings: BenchSettings, arm: Arm) -> list[str]:
    if arm.kind == "plan":
        return ["--plans", arm.spec]
    if arm.kind == "plain":
        return ["--plans", "lossless"]
    return ["--against", arm.spec]
