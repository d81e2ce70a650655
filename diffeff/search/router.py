"""`train_router`: learns, on your frozen model and without data, which module to compute at which step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffeff.errors import ConfigError
from diffeff.methods.caching.published.harmonica import HarmoniCa
from diffeff.report import environment
from diffeff.search.router_training import Objective, RouterOptions, TrainedRouter, Training
from diffeff.search.settings import Observe, checked
from diffeff.stamp import stamp_of

__all__ = ["train", "train_router"]


def train_router(pipe: Any, prompts: Sequence[Any], **options: Any) -> HarmoniCa:
    """The config of `harmonica` with a router trained on your model; options, cost and errors are those of `train`.

    `pipe.apply(train_router(pipe, prompts, speedup=1.5, call={"num_inference_steps": 30}))`
    """
    return train(pipe, prompts, **options).config


def train(
    pipe: Any,
    prompts: Sequence[Any],
    *,
    speedup: float | None = None,
    compute: float | None = None,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch: int = 1,
    trajectories: int = 40,
    minutes: float | None = None,
    rate: float = 0.15,
    reestimate: int = 16,
    objective: Objective = "normalised",
    work: str | Path | None = None,
    observe: Observe = lambda done, what: None,
) -> TrainedRouter:
    """Train a router of one row per step and one gate per attention or feed-forward module.

    `pipe` is a DiffEffPipeline; its own plan is put back afterwards, its weights are left alone. No data: every
    trajectory starts from noise, with `batch` of the `prompts` (class labels for a class-conditional model) and the
    pipeline arguments in `call`, whose number of steps, scheduler and size are those the router is for.

    One of two targets: `speedup`, of the denoiser's arithmetic (1.5 if none is given), or `compute`, the share of the
    modules' arithmetic that is left. What wall time gains is less where modules are small; measure it.

    Each trajectory is one of step-wise denoising training (see `router_gates.Denoising`), then one step of Adam at
    `rate`, falling to 0 over `trajectories`. Every `reestimate` trajectories the steps' weights are measured anew
    (`router_objective`), which takes as long as `steps` / 6 trajectories. A trajectory costs 3 to 4 plain runs of its
    prompts; 40 trajectories and 3 estimates on sprites-wan at 30 steps take about 6 minutes of one CPU core.

    `work` is a file that the state is kept in after each trajectory: the same call goes on where one was stopped, by a
    kill or by `minutes` of training, and gives what an undisturbed one gives. Equal seeds give equal routers.

    What departs from the paper, or was derived. (1) The paper steers speed by hand through beta, the price of
    computing. Here beta is set after each trajectory so that the target is met: with the error quadratic in 1 - p (an
    output mixed from p fresh and 1 - p kept), the gradient at p is -2 (1 - p) B, B being what computing the module
    saves; the loss is least at p = 1 - beta c / 2 B with c its arithmetic, which exceeds 1/2 exactly where B exceeds
    beta c. So the threshold is 1/2 (the paper has 0.1, which computes modules that save only 0.56 beta c), and beta
    is the quantile of B / c that leaves the target's share; the final table fills the target with the highest p. (2)
    c follows each module's arithmetic, not 1. (3) `objective="published"` weighs steps by the image's change; that
    number times the step's error is not an error of the image. The default weighs them by change per error. (4) Some
    pipelines call the denoiser once per guidance branch: losses of all calls of a step are added. (5) 40 trajectories
    at a high rate instead of 2000 at 0.01.

    Raises ConfigError for impossible settings, MethodInapplicable for few-step models and models without such modules,
    OutputError where `work` cannot be written.
    """
    options = RouterOptions(
        speedup=speedup, compute=compute, seed=seed, batch=batch, trajectories=trajectories, rate=rate,
        reestimate=reestimate, objective=objective,
    )  # fmt: skip
    if minutes is not None and minutes <= 0:
        raise ConfigError(f"minutes is {minutes!r}; allowed: above 0")
    settings = checked(pipe, prompts, call or {}, None, ())
    before = pipe.plan
    pipe.remove()
    try:
        stamp = {k: v for k, v in vars(stamp_of(pipe.wrapped, pipe.denoisers)).items() if v is not None}
        subject = {"stamp": stamp, "environment": environment()} | vars(options) | settings
        return Training(pipe, settings, options, subject, None if work is None else Path(work), minutes, observe).run()
    finally:
        pipe.apply(before) if before.methods else pipe.remove()
