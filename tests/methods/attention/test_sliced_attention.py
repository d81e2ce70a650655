"""Sliced attention of UNets: exact, smaller, transparent to whoever intercepts attention, and undone to the letter."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from tiny import call_kwargs, make, run

from diffeff.errors import MethodInapplicable
from diffeff.methods.attention.processor import SlicedProcessor
from diffeff.methods.attention.sliced_attention import SlicedAttention
from diffeff.methods.tokens.kv_downsample import KVDownsample
from diffeff.pipeline import DiffEffPipeline


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def processors(pipe: Any) -> dict[str, Any]:
    return dict(pipe.unet.attn_processors)


@pytest.mark.parametrize("family", ["sd", "sdxl", "animatediff", "svd"])
@pytest.mark.parametrize("slice_tokens", [37, 4096])
def test_the_result_is_the_models(family: str, slice_tokens: int) -> None:
    plain = run(family, make(family), steps=1)
    pipe = DiffEffPipeline(make(family), plan=[SlicedAttention(slice_tokens=slice_tokens)])
    # SVD starts at a noise level of 700, which multiplies rounding
    assert distance(run(family, pipe, steps=1), plain) < (1e-4 if family == "svd" else 1e-5)
    details = pipe.report.methods[0].details
    assert details["calls"] > 0
    assert (details["parts"] > details["calls"]) == (slice_tokens == 37)
    assert not details["handed_on"]


def attention(**more: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(48, heads=3, dim_head=16, **more).eval()


@pytest.mark.parametrize("slice_tokens", [1, 5, 13, 40, 1000])
@pytest.mark.parametrize(
    "more", [{}, {"residual_connection": True, "rescale_output_factor": 2.0}, {"qk_norm": "layer_norm"}]
)
@torch.no_grad()
def test_every_way_to_cut(more: dict[str, Any], slice_tokens: int) -> None:
    module, x = attention(**more), torch.randn(3, 13, 48)
    plain = module(x)
    module.set_processor(SlicedProcessor(module.processor, slice_tokens))
    assert distance(module(x), plain) < 1e-6
    assert module(x[:0]).shape == (0, 13, 48)


@torch.no_grad()
def test_cross_attention_takes_the_rows_of_its_context() -> None:
    module = attention(cross_attention_dim=20)
    x, context = torch.randn(3, 13, 48), torch.randn(3, 7, 20)
    plain = module(x, context)
    module.set_processor(SlicedProcessor(module.processor, 26))
    assert distance(module(x, context), plain) < 1e-6
    assert module.processor.counts.parts == 2


@torch.no_grad()
def test_what_it_does_not_take_goes_to_the_old_processor_bit_for_bit() -> None:
    module, x = attention(), torch.randn(2, 13, 48)
    mask = torch.zeros(2, 13).index_fill_(1, torch.tensor([3]), -1e4)
    plain = module(x, attention_mask=mask)
    module.set_processor(SlicedProcessor(module.processor, 5))
    assert torch.equal(module(x, attention_mask=mask), plain)
    assert dict(module.processor.counts.handed_on) == {"it has a mask": 1}
    image = attention(norm_num_groups=4)
    image.set_processor(SlicedProcessor(image.processor, 5))
    image(torch.randn(2, 48, 3, 3))
    assert "feature map" in next(iter(image.processor.counts.handed_on))


@torch.no_grad()
def test_queries_and_outputs_never_exist_whole() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.made: dict[int, torch.Tensor] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):  # kept alive, so that no storage is counted for another
                self.made.setdefault(result.untyped_storage()._cdata, result)
            return result

    module, x = attention(), torch.randn(8, 64, 48)
    counted = []
    for processor in (module.processor, SlicedProcessor(module.processor, 32)):
        module.set_processor(processor)
        with Sizes() as sizes:
            module(x)
        storages = [tensor.untyped_storage() for tensor in sizes.made.values()]
        counted.append(sum(s.nbytes() >= x.nbytes for s in storages if s._cdata != x.untyped_storage()._cdata))
    assert counted[0] >= 4  # queries, keys, values, result
    assert counted[1] == 1  # the result


# --- those who intercept attention ----------------------------------------------------------------------------------
def unet_call(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, pipe.unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return torch.as_tensor(pipe.unet(sample, 10, text).sample)


def test_guiders_that_intercept_attention_still_perturb_it() -> None:
    """Perturbed-attention guidance listens for torch's attention with as many queries as keys: no slice has that."""
    pipe = make("sd")
    plain = unet_call(pipe)
    with AttentionScoreSkipFunctionMode():
        perturbed = unet_call(pipe)
    wrapped = DiffEffPipeline(pipe, plan=[SlicedAttention(slice_tokens=8)])
    assert distance(unet_call(pipe), plain) < 1e-5
    with AttentionScoreSkipFunctionMode():
        assert torch.equal(unet_call(pipe), perturbed)
    assert distance(perturbed, plain) > 1e-3
    wrapped.remove()


def test_perturbed_attention_pipelines_keep_their_processors() -> None:
    parts = make("sd").components
    pag = diffusers.StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers=["mid"])
    pag.set_progress_bar_config(disable=True)

    def clip(pipe: Any, scale: float) -> torch.Tensor:
        return torch.as_tensor(pipe(**call_kwargs("sd", pipe, steps=2), pag_scale=scale)[0])

    plain, weak = clip(pag, 3.0), clip(pag, 0.0)
    before = processors(pag)
    pipe = DiffEffPipeline(pag, plan=[SlicedAttention(slice_tokens=8)])
    assert distance(clip(pipe, 3.0), plain) < 1e-5 < distance(weak, plain)
    assert pipe.report.methods[0].details["calls"] > 0
    pipe.remove()
    assert processors(pag) == before


def test_methods_at_the_attention_seam_still_act() -> None:
    alone = DiffEffPipeline(make("sd"), plan=[KVDownsample(min_tokens=4)])
    both = DiffEffPipeline(make("sd"), plan=[KVDownsample(min_tokens=4), SlicedAttention(slice_tokens=8)])
    a, b = run("sd", alone, steps=2), run("sd", both, steps=2)
    assert distance(b, a) < 1e-5 < distance(a, run("sd", make("sd"), steps=2))
    outcome = next(row for row in both.report.methods if row.method == "sliced_attention")
    assert outcome.details["handed_on"] == {"another method or guider acts at its seam": outcome.details["calls"]}


# --- on and off -----------------------------------------------------------------------------------------------------
def test_undo_puts_back_the_very_processors_and_leaves_strangers() -> None:
    pipe = make("sd")
    first, *_, last = (m for m in pipe.unet.modules() if isinstance(m, Attention))
    first.set_processor(AttnProcessor())
    before = processors(pipe)
    wrapped = DiffEffPipeline(pipe, plan=[SlicedAttention()])
    assert all(isinstance(p, SlicedProcessor) for p in processors(pipe).values())
    stranger = AttnProcessor2_0()
    last.set_processor(stranger)
    wrapped.remove()
    after = processors(pipe)
    assert last.processor is stranger
    assert sum(after[name] is not before[name] for name in before) == 1


@torch.no_grad()
def test_processors_can_be_built_from_their_class_as_ip_adapters_do() -> None:
    module, x = attention(), torch.randn(1, 5, 48)
    plain = module(x)
    module.set_processor(SlicedProcessor())
    assert distance(module(x), plain) < 1e-6


def test_transformers_are_refused_with_a_way_out() -> None:
    with pytest.raises(MethodInapplicable, match="set_attention_backend"):
        DiffEffPipeline(make("wan"), plan=[SlicedAttention()])
