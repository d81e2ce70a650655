"""T-GATE: cross attention frozen to the mean of both branches, guidance left out after the gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import computed
from tiny import make, run

from diffeff.errors import MethodInapplicable
from diffeff.methods.caching.published.tgate import TGate
from diffeff.pipeline import DiffEffPipeline


def cross_outputs(family: str, path: str, steps: int) -> tuple[list[torch.Tensor], Any]:
    pipe = DiffEffPipeline(make(family), [TGate(gate=0.5, early_interval=1)])
    outputs: list[torch.Tensor] = []
    module = pipe.denoisers[0].module.get_submodule(path)
    module.register_forward_hook(lambda m, a, out: outputs.append(out.clone()))
    run(family, pipe, steps=steps)
    return outputs, pipe.report


def test_the_frozen_output_is_the_mean_of_both_branches_batched() -> None:
    outputs, report = cross_outputs("sd", "down_blocks.0.attentions.0.transformer_blocks.0.attn2", 6)
    uncond, cond = outputs[3].chunk(2)  # the gate is step 3 of 6
    for later in outputs[4:]:
        torch.testing.assert_close(later, (uncond + cond) / 2)
    assert [o.shape[0] for o in outputs] == [2, 2, 2, 2, 1, 1]
    assert report.steps["uncond"].computed == 4


def test_the_frozen_output_is_the_mean_of_both_branches_called_apart() -> None:
    outputs, report = cross_outputs("wan", "blocks.1.attn2", 6)
    assert len(outputs) == 2 * 4 + 2
    for later in outputs[8:]:
        torch.testing.assert_close(later, (outputs[6] + outputs[7]) / 2)
    assert report.steps["uncond"].computed == 4


def test_self_attention_follows_its_two_intervals() -> None:
    model = make("sd")
    site = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    pipe = DiffEffPipeline(model, [TGate(gate=0.5, warm_up=2, early_interval=3, late_interval=2)])
    found = computed(model.unet, lambda: run("sd", pipe, steps=12), {site: "to_q"})
    assert found[site] == [0, 1, 2, 5, 6, 8, 10]


def test_a_gate_at_the_end_leaves_only_self_attention() -> None:
    pipe = DiffEffPipeline(make("sd"), [TGate(gate=1.0, early_interval=1)])
    assert torch.equal(run("sd", pipe, steps=5), run("sd", make("sd"), steps=5))


@pytest.mark.parametrize("family", ["flux", "dit", "sd3"])
def test_models_without_cross_attention_are_refused(family: str) -> None:
    with pytest.raises(MethodInapplicable, match="tgate"):
        DiffEffPipeline(make(family), [TGate()])
