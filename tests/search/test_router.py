"""Training a router: gates and their gradients, the weights of the steps, the target, going on, refusals."""

from __future__ import annotations

import zlib
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from tiny import call_kwargs, make
from torch import Tensor

from diffeff.errors import ConfigError, MethodInapplicable, OutputError
from diffeff.methods.caching.published.harmonica import HarmoniCa
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan
from diffeff.search.router import train, train_router
from diffeff.search.router_gates import Denoising, RouterSeam, Survey
from diffeff.search.router_objective import ImageErrors, image_errors
from diffeff.search.router_state import RouterState
from diffeff.search.router_training import TrainedRouter
from diffeff.search.trace import Job, attached

STEPS = 9
PLAIN = Plan()
PROMPTS = ("a red circle", "a blue cross")


def embeddings(prompt: str) -> Tensor:
    return torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(zlib.crc32(prompt.encode())))


def prompted(family: str = "wan") -> DiffEffPipeline:
    """A tiny pipeline that makes embeddings of its prompts without a text encoder."""
    pipe = make(family)
    if family == "wan":
        pipe.transformer.blocks = pipe.transformer.blocks[:2]

    def encode(prompt: list[str], *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([embeddings(p) for p in prompt]), embeddings("").repeat(len(prompt), 1, 1)

    pipe.encode_prompt = encode
    return DiffEffPipeline(pipe)


def call(pipe: DiffEffPipeline, family: str = "wan", steps: int = STEPS) -> dict[str, Any]:
    """Arguments of the pipeline's call without prompts and noise."""
    given = call_kwargs(family, pipe.wrapped, steps=steps)
    return {k: v for k, v in given.items() if "embeds" not in k and k not in ("generator", "output_type")}


def job(pipe: DiffEffPipeline, seed: int = 0) -> Job:
    return Job(PROMPTS[:1], (seed,), call(pipe))


def columns(pipe: DiffEffPipeline) -> dict[str, int]:
    return {m.name: n for n, m in enumerate(pipe.denoisers[0].modules)}


def table(pipe: DiffEffPipeline, seed: int, share: float = 0.5) -> list[list[bool]]:
    drawn = torch.rand(STEPS, len(columns(pipe)), generator=torch.Generator().manual_seed(seed)) < share
    drawn[0] = True
    return [[bool(v) for v in row] for row in drawn.tolist()]


def config(pipe: DiffEffPipeline, rows: list[list[bool]]) -> HarmoniCa:
    seam = RouterSeam(Survey())
    with attached(pipe, seam) as play:
        play(job(pipe))
    times = seam.play.times  # type: ignore[attr-defined]
    return HarmoniCa(sites=tuple(columns(pipe)), times=times, router=tuple("".join("01"[v] for v in r) for r in rows))


def final(pipe: DiffEffPipeline, plan: Plan | HarmoniCa = PLAIN, seed: int = 0) -> Tensor:
    pipe.apply(plan)
    try:
        with torch.no_grad():
            return job(pipe, seed).run(pipe)
    finally:
        pipe.remove()


def denoise(pipe: DiffEffPipeline, logits: Tensor, weights: Tensor | None = None) -> tuple[Denoising, Tensor]:
    """One trajectory with these gates, and the latents it ends with."""
    play = Denoising(logits, columns(pipe), torch.ones(STEPS) if weights is None else weights)
    seam = RouterSeam(play)
    with attached(pipe, seam) as run:
        run(job(pipe))
    assert seam.final is not None
    return play, seam.final


# --- gates ----------------------------------------------------------------------------------------------------------
def test_open_gates_are_the_plain_run_and_closed_ones_repeat_the_first_step() -> None:
    pipe = prompted()
    shape = STEPS, len(columns(pipe))
    play, latents = denoise(pipe, torch.full(shape, 40.0, requires_grad=True))
    assert torch.allclose(latents, final(pipe), atol=1e-5)
    assert max(play.errors.values()) < 1e-10
    play, latents = denoise(pipe, torch.full(shape, -40.0, requires_grad=True))
    closed = [[entry == 0] * shape[1] for entry in range(STEPS)]
    assert torch.allclose(latents, final(pipe, config(pipe, closed)), atol=1e-5)
    assert min(play.errors.values()) > 1e-8


def test_sharp_gates_play_what_the_table_plays() -> None:
    pipe = prompted()
    rows = table(pipe, 1)
    _, latents = denoise(pipe, (torch.tensor(rows).float() * 80 - 40).requires_grad_())
    assert torch.allclose(latents, final(pipe, config(pipe, rows)), atol=1e-5)


def test_gradients_are_those_of_the_steps_own_error() -> None:
    """Central differences of one gate, and nothing reaches a row from a later step."""
    pipe = prompted()
    start = torch.randn(STEPS, len(columns(pipe)), generator=torch.Generator().manual_seed(0))
    logits, weights = start.clone().requires_grad_(), torch.zeros(STEPS)
    weights[1] = 1e4
    denoise(pipe, logits, weights)
    assert logits.grad is not None
    assert bool((logits.grad[2:] == 0).all())
    assert bool((logits.grad[0] == 0).all())
    for column in (0, 5):
        sides = []
        for nudge in (0.05, -0.05):
            moved = start.clone()
            moved[1, column] += nudge
            sides.append(denoise(pipe, moved.requires_grad_())[0].errors[1] * 1e4)
        slope = (sides[0] - sides[1]) / 0.1
        assert float(logits.grad[1, column]) == pytest.approx(slope, rel=0.05, abs=1e-6)


def test_the_survey_counts_the_arithmetic_of_every_module() -> None:
    pipe = prompted()
    seam = RouterSeam(survey := Survey())
    with attached(pipe, seam) as run:
        run(job(pipe))
    counts = survey.modules["transformer"]
    assert set(counts) == set(columns(pipe))
    tokens, width, hidden = 3 * 4 * 6, 24, 32
    assert counts["blocks.0.ffn"] == 2 * 2 * tokens * width * hidden
    attention = 4 * 2 * tokens * width * width + 2 * 2 * tokens * tokens * width
    assert counts["blocks.0.attn1"] == attention
    assert sum(counts.values()) < survey.calls["transformer"]


# --- what a step's error does to the image ----------------------------------------------------------------------------
def test_image_errors_are_differences_of_gated_runs() -> None:
    """Replayed beginnings give what whole runs give."""
    pipe = prompted()
    rows, seam = table(pipe, 2), RouterSeam(Survey())
    with attached(pipe, seam) as run:
        run(job(pipe))
        found = image_errors(seam, lambda: run(job(pipe)), rows, columns(pipe))
    assert seam.final is not None
    assert torch.allclose(seam.final, final(pipe, config(pipe, rows)), atol=1e-6)
    everything = [True] * len(rows[0])
    runs = [final(pipe, config(pipe, rows[: k + 1] + [everything] * (STEPS - k - 1))) for k in range(STEPS)]
    changes = torch.tensor([float((b - a).square().mean()) for a, b in pairwise(runs)])
    assert torch.allclose(found.image[1:], changes, rtol=1e-2, atol=1e-12)
    assert float(found.step[0]) == 0
    assert bool((found.step[1:] > 0).all())


def test_weights_are_changes_or_changes_per_error() -> None:
    errors = ImageErrors(torch.tensor([0.0, 4.0, 2.0, 0.0]), torch.tensor([0.0, 1.0, 2.0, 0.0]))
    published = errors.weights(torch.ones(4), published=True)
    assert torch.allclose(published, torch.tensor([0.0, 2.0, 1.0, 0.0]))
    normalised = errors.weights(torch.ones(4), published=False)
    # 4 and 1 were measured; the last row gated nothing and stays at the mean of what it was beside the others
    assert torch.allclose(normalised[1:] / normalised[2], torch.tensor([4.0, 1.0, 2.5]))
    assert float(normalised[1:].mean()) == pytest.approx(1.0)


def test_a_budget_is_spent_on_the_most_probable_modules() -> None:
    state = RouterState.fresh(3, 2, 0)
    state.logits = torch.tensor([[5.0, 5.0], [3.0, 1.0], [-2.0, 2.0]])
    cost = torch.tensor([[0.25, 0.75]] * 3)
    assert state.table(cost, 2.0) == [[True, True], [True, False], [False, True]]
    assert state.table(cost, 1.0) == [[True, True], [False, False], [False, False]]
    assert state.table(cost, 3.0) == [[True, True]] * 3


# --- training -----------------------------------------------------------------------------------------------------
def trained(pipe: DiffEffPipeline, **options: Any) -> TrainedRouter:
    return train(pipe, PROMPTS, **{"compute": 0.5, "call": call(pipe), "trajectories": 6, "rate": 0.5} | options)


@pytest.fixture(scope="module")
def outcome() -> tuple[DiffEffPipeline, TrainedRouter]:
    pipe = prompted()
    return pipe, trained(pipe, trajectories=16)


def test_training_reduces_its_objective_and_the_images_error(outcome: tuple[DiffEffPipeline, TrainedRouter]) -> None:
    pipe, found = outcome
    objectives = [entry["objective"] for entry in found.history]
    assert sum(objectives[-4:]) < 0.7 * sum(objectives[:4])
    plain = final(pipe)
    error = float((final(pipe, found.config) - plain).square().mean())
    drawn = [config(pipe, table(pipe, seed, 0.45)) for seed in range(5)]
    others = [float((final(pipe, other) - plain).square().mean()) for other in drawn]
    assert error < 0.5 * median(others)


def test_the_target_is_met(outcome: tuple[DiffEffPipeline, TrainedRouter]) -> None:
    _, found = outcome
    assert 0.48 < found.share <= 0.5
    assert found.finished
    assert set(found.config.router[0]) == {"1"}
    assert "16 of 16 trajectories" in found.config.note


def test_what_was_trained_is_played(outcome: tuple[DiffEffPipeline, TrainedRouter]) -> None:
    pipe, found = outcome
    pipe.apply(found.config)
    job(pipe).run(pipe)
    assert pipe.report is not None
    details = pipe.report.methods[0].details
    pipe.remove()
    assert details["computed"] / details["total"] == pytest.approx(found.config.share)


def test_a_speedup_is_one_of_arithmetic() -> None:
    found = trained(prompted(), compute=None, speedup=1.4, trajectories=1)
    assert 1.4 <= found.speedup < 1.45
    with pytest.raises(ConfigError, match="speed-ups below"):
        trained(prompted(), compute=None, speedup=20.0)


def test_equal_seeds_give_equal_routers_and_a_stopped_training_goes_on(tmp_path: Path) -> None:
    pipe, work = prompted(), tmp_path / "state.safetensors"
    whole = trained(pipe, reestimate=2, trajectories=3)

    def stop(done: float, what: str) -> None:
        if what.startswith("trajectory 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(pipe, reestimate=2, trajectories=3, work=work, observe=stop)
    heard: list[str] = []
    again = trained(pipe, reestimate=2, trajectories=3, work=work, observe=lambda done, what: heard.append(what))
    assert again.config == whole.config
    assert again.history == whole.history
    assert not any(what.startswith(("trajectory 1", "trajectory 2")) for what in heard)
    other = trained(pipe, trajectories=1, seed=1)
    assert other.config.router != whole.config.router


def test_a_time_limit_ends_it_and_it_can_go_on(tmp_path: Path) -> None:
    pipe, work = prompted(), tmp_path / "state.safetensors"
    short = trained(pipe, minutes=1e-9, trajectories=2, work=work)
    assert (short.finished, short.trajectories) == (False, 0)
    assert trained(pipe, trajectories=2, work=work).finished


def test_another_trainings_file_is_refused(tmp_path: Path) -> None:
    pipe, work = prompted(), tmp_path / "state.safetensors"
    trained(pipe, trajectories=1, work=work)
    with pytest.raises(OutputError, match="another router"):
        trained(pipe, trajectories=1, work=work, seed=1)
    work.write_bytes(b"not a state")
    with pytest.raises(OutputError, match="Choose another place"):
        trained(pipe, trajectories=1, work=work)


def test_the_pipeline_is_left_as_it_was() -> None:
    pipe = prompted()
    before = final(pipe)
    weight = next(pipe.denoisers[0].module.parameters()).requires_grad_()
    plan = config(pipe, table(pipe, 0))
    pipe.apply(plan)
    made = train_router(pipe, PROMPTS, compute=0.5, call=call(pipe), trajectories=1)
    assert weight.requires_grad
    assert weight.grad is None
    assert pipe.plan.methods == (plan,)
    assert torch.equal(final(pipe), before)
    assert made.router


def test_batched_guidance_and_two_experts_are_trained_too() -> None:
    for family in ("sd", "wan-2expert"):
        pipe = prompted(family)
        found = train(pipe, PROMPTS[:1], compute=0.6, call=call(pipe, family), trajectories=1)
        assert 0.5 < found.share <= 0.6
        pipe.apply(found.config)
        job_ = Job(PROMPTS[:1], (0,), call(pipe, family))
        assert bool(job_.run(pipe).isfinite().all())


# --- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [{"speedup": 2.0}, {"compute": 1.5}, {"batch": 0}, {"trajectories": 0}, {"minutes": 0.0}, {"objective": "best"}],
)
def test_impossible_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        trained(prompted(), **options)


def test_few_steps_are_refused() -> None:
    pipe = prompted()
    with pytest.raises(MethodInapplicable, match="next to nothing to skip"):
        train(pipe, PROMPTS, call=call(pipe, steps=4))
