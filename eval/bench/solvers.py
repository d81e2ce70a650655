"""Solvers for fewer steps: what a user gets without any acceleration tool by choosing another sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffeff.errors import ConfigError

__all__ = ["SOLVERS", "Solver", "family_of", "make_solver", "solvers_of"]

Family = Literal["flow", "diffusion"]


@dataclass(frozen=True)
class Solver:
    """A sampler of diffusers: its scheduler class, options laid over the model's own, and denoiser calls per step."""

    title: str
    scheduler: str
    families: tuple[Family, ...]
    options: Mapping[str, Any]
    calls: int = 1


SOLVERS: Mapping[str, Solver] = {
    "dpm++": Solver(
        "DPM-Solver++ 2M",
        "DPMSolverMultistepScheduler",
        ("diffusion",),
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
    "unipc": Solver("UniPC order 2", "UniPCMultistepScheduler", ("flow", "diffusion"), {"solver_order": 2}),
    "unipc3": Solver("UniPC order 3", "UniPCMultistepScheduler", ("flow", "diffusion"), {"solver_order": 3}),
    "heun": Solver("Heun", "FlowMatchHeunDiscreteScheduler", ("flow",), {}, calls=2),
    "euler": Solver("Euler", "FlowMatchEulerDiscreteScheduler", ("flow",), {}),
}


def family_of(scheduler: Mapping[str, Any]) -> Family | None:
    """Whether a scheduler (`{"class": name, "config": {...}}`) integrates a flow or a diffusion; None for others."""
    name, config = str(scheduler["class"]), scheduler["config"]
    if name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction":
        return "flow"
    return "diffusion" if "beta_schedule" in config else None


def solvers_of(scheduler: Mapping[str, Any]) -> list[str]:
    """The solvers of the scheduler's family that differ from what it is already."""
    family, own = family_of(scheduler), (scheduler["class"], scheduler["config"].get("solver_order"))
    return [
        name
        for name, solver in SOLVERS.items()
        if family in solver.families and (solver.scheduler, solver.options.get("solver_order")) != own
    ]


def make_solver(name: str, own: Any) -> Any:
    """The scheduler of this name with the settings of the model's `own`. Raises ConfigError for another family."""
    import diffusers

    solver, config = SOLVERS[name], dict(own.config)
    family = family_of({"class": type(own).__name__, "config": config})
    if family not in solver.families:
        kinds = " and ".join(solver.families)
        raise ConfigError(f"{solver.title} is for {kinds} models, which {type(own).__name__} does not integrate")
    made = getattr(diffusers, solver.scheduler)
    return made.from_config(config, **solver.options, **_translated(solver, family, config))


def _translated(solver: Solver, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The shift of a flow's time, which the two kinds of flow schedulers name differently."""
    if family != "flow":
        return {}
    shift = config.get("shift", config.get("flow_shift", 1.0))
    if solver.scheduler.startswith("FlowMatch"):
        return {"shift": shift}
    return {"flow_shift": shift, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
