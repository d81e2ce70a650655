"""PAB: the same decisions as diffusers without guidance, and branches kept apart with it."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from calls import computed
from tiny import make, run

from diffeff.errors import ConfigError
from diffeff.methods.caching.published.pab import PAB
from diffeff.pipeline import DiffEffPipeline

RANGES = {"spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 3}


def theirs(pipe: Any, low: float, high: float) -> None:
    """Diffusers' hook on a pipeline."""
    windows = {f"{kind}_attention_timestep_skip_range": (low, high) for kind in ("spatial", "cross")}
    pipe.transformer.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            **RANGES, **windows, current_timestep_callback=lambda: pipe.current_timestep
        )
    )


@pytest.mark.parametrize(("low", "high", "steps"), [(100, 800, 12), (-1, 2000, 7)])
def test_the_same_attention_is_computed_as_in_diffusers_without_guidance(low: float, high: float, steps: int) -> None:
    reference, ours = make("wan"), make("wan")
    inner = {site.name: "to_q" for site in DiffEffPipeline(ours).denoisers[0].attentions}
    theirs(reference, low, high)
    expected = computed(reference.transformer, lambda: run("wan", reference, steps=steps, guidance=False), inner)
    pipe = DiffEffPipeline(ours, [PAB(spatial=2, cross=3, low=low, high=high)])
    found = computed(ours.transformer, lambda: run("wan", pipe, steps=steps, guidance=False), inner)
    assert found == expected
    assert {len(calls) for calls in found.values()} != {steps}


def attention_outputs(pipe: Any, transformer: Any) -> list[torch.Tensor]:
    """Self-attention outputs of the second block, in order of calls: conditional, unconditional, conditional, ..."""
    outputs: list[torch.Tensor] = []
    handle = transformer.blocks[1].attn1.register_forward_hook(lambda m, a, out: outputs.append(out.clone()))
    run("wan", pipe, steps=4)
    handle.remove()
    return outputs


def test_branches_are_mixed_in_diffusers_and_apart_here() -> None:
    reference = make("wan")
    theirs(reference, -1, 2000)
    outputs = attention_outputs(reference, reference.transformer)
    assert torch.equal(outputs[0], outputs[1])  # the unconditional branch is given the conditional one's attention
    ours = make("wan")
    outputs = attention_outputs(DiffEffPipeline(ours, [PAB(low=-1, high=2000)]), ours.transformer)
    cond, uncond = outputs[0::2], outputs[1::2]
    assert not torch.equal(cond[0], uncond[0])
    assert torch.equal(cond[0], cond[1])
    assert torch.equal(uncond[0], uncond[1])


def test_kinds_follow_their_own_intervals_inside_the_window_only() -> None:
    pipe = DiffEffPipeline(make("animatediff"), [PAB(spatial=2, temporal=3, cross=6, low=100, high=800)])
    run("animatediff", pipe, steps=10)
    assert pipe.report is not None
    kinds = pipe.report.methods[0].details["skipped_by_kind"]
    times = pipe.wrapped.scheduler.timesteps.tolist()
    inside = [i for i, t in enumerate(times) if 100 < t < 800]
    for kind, interval in (("self", 2), ("temporal", 3), ("cross", 6)):
        assert kinds[kind] == [i for i in inside if i % interval]


def test_intervals_of_one_are_exact() -> None:
    pipe = DiffEffPipeline(make("wan"), [PAB(spatial=1, temporal=1, cross=1)])
    assert torch.equal(run("wan", pipe, steps=5), run("wan", make("wan"), steps=5))
    assert pipe.report is not None
    assert not pipe.report.methods[0].engaged


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pab\.high"):
        PAB(low=500, high=400)
