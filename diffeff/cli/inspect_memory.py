"""`diffeff inspect --memory`: the peak of a call by stage, plain and with the steps that lower it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape

from diffeff.cli.console import emit, out, quiet_libraries, table
from diffeff.cli.progress import Stages
from diffeff.cli.request import recommended

if TYPE_CHECKING:
    from diffeff.pipeline import DiffEffPipeline

__all__ = ["show_memory"]


def show_memory(
    model: str,
    sizes: dict[str, int | None],
    guidance: float | None,
    budget: str | None,
    plan: str | None,
    json: bool,
) -> None:
    """Load, estimate, and print. Raises MemoryBudgetError when no step fits the budget."""
    with Stages(quiet=json) as stages:
        stages.begin("load " + model)
        quiet_libraries()
        from diffeff.methods.memory.estimate_call import sized_call
        from diffeff.pipeline import DiffEffPipeline

        pipe = DiffEffPipeline.from_pretrained(model, plan=plan or "lossless")
        options = recommended(model) | ({} if guidance is None else {"guidance_scale": guidance})
        call = sized_call(pipe.wrapped, options, **sizes)  # type: ignore[arg-type]
        stages.begin("estimate")
        found = _found(pipe, call, budget)
    found = {"pipeline": type(pipe.wrapped).__name__, "call": _sizes(call)} | found
    if json:
        emit(found)
    else:
        _show(found)


def _found(pipe: DiffEffPipeline, call: dict[str, Any], budget: str | None) -> dict[str, Any]:
    """The ladder up to the first step that fits; without a budget, as asked and with feature slicing."""
    if budget is not None:
        return pipe.plan_memory(budget, **call).to_dict()
    from diffeff.errors import MethodInapplicable
    from diffeff.methods.memory.feature_slicing import FeatureSlicing
    from diffeff.plan import Plan

    plain = pipe.estimate_memory(**call).to_dict()
    try:
        sliced = pipe.apply(Plan([*pipe.plan.methods, FeatureSlicing()])).estimate_memory(**call).to_dict()
    except MethodInapplicable as refusal:
        return {"budget": None, "plain": plain, "predicted": None, "reason": str(refusal)}
    return {"budget": None, "plain": plain, "predicted": sliced}


def _sizes(call: dict[str, Any]) -> dict[str, Any]:
    names = ("height", "width", "num_frames", "video_length", "guidance_scale", "num_inference_steps")
    return {name: call[name] for name in names if name in call}


def _show(found: dict[str, Any]) -> None:
    console = out()
    console.print(f"[bold]{found['pipeline']}[/]  {', '.join(f'{k} {v}' for k, v in found['call'].items())}")
    _show_estimate("as asked", found["plain"])
    chosen = found["steps"][-1]["step"] if found.get("steps") else "feature slicing"
    if found["predicted"] is None:
        console.print(f"\nfeature slicing: {escape(found['reason'])}")
    elif chosen != "as asked":
        _show_estimate(f"with {chosen}", found["predicted"])
    if found["budget"] is not None:
        _show_steps(found)


def _show_estimate(title: str, estimate: dict[str, Any]) -> None:
    console = out()
    console.print(
        f"\n[bold]{title}[/] on {estimate['device']}: peak {_size(estimate['peak'])} in {estimate['binding']}"
    )
    rows = table("stage", "weights", "activations", "caches", "scratch", "total", "peak at")
    for name, s in estimate["stages"].items():
        bytes_of = (s["weights"], s["activations"], s["snapshots"], s["scratch"] + s["rounding"], s["total"])
        rows.add_row(name, *(_size(n) for n in bytes_of), escape(s["operator"]))
    console.print(rows)
    if estimate["process"]:
        console.print(f"the process itself (interpreter, libraries): {_size(estimate['process'])}")


def _show_steps(found: dict[str, Any]) -> None:
    console = out()
    console.print(f"\nbudget {_size(found['budget'])}; steps considered, cheapest first:")
    rows = table("step", "peak", "time", "result")
    for step in found["steps"]:
        peak = "" if step["peak"] is None else _size(step["peak"])
        ratio = "" if step["time_ratio"] is None else f"x{step['time_ratio']:.2f}"
        fits = step["peak"] is not None and step["peak"] <= found["budget"]
        result = "passed over: " + escape(step["reason"]) if step["reason"] else "fits" if fits else "too much"
        rows.add_row(step["step"], peak, ratio, result if step["exact"] else result + ", not exact")
    console.print(rows)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
