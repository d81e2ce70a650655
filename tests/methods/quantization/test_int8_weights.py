"""Int8Weights: layers chosen, undo to the bit, artefacts, adapters, dtypes, kernels and what the report says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from diffeff.anatomy.types import CFG, BlockSite, DenoiserMap
from diffeff.core.run import Run
from diffeff.errors import ArtefactError, ConfigError, KernelUnavailable, MethodInapplicable
from diffeff.kernels.int8_linear import quantise_weight, reference
from diffeff.methods.quantization.int8_weights import Int8Weights, Int8WeightsMethod
from diffeff.methods.quantization.qlinear import Original, QLinear


@pytest.fixture(autouse=True)
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFEFF_KERNEL_CACHE", "off")


def wan() -> tuple[nn.Module, dict[str, Tensor]]:
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=40, num_layers=2, rope_max_seq_len=16,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 4, 6),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
    }


def flux() -> tuple[nn.Module, dict[str, Tensor]]:
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6), guidance_embeds=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 12, 4),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.randn(12, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def sd() -> tuple[nn.Module, dict[str, Tensor]]:
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return model, {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 7, 16),
    }


def dit() -> tuple[nn.Module, dict[str, Tensor]]:
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([500]),
        "class_labels": torch.tensor([3]),
    }


def cogvideox() -> tuple[nn.Module, dict[str, Tensor]]:
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=7,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "timestep": torch.tensor([500]),
    }


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "wan": wan, "flux": flux, "sd": sd, "dit": dit, "cogvideox": cogvideox
}  # fmt: skip
STACKS = ("blocks", "transformer_blocks", "single_transformer_blocks", "down_blocks", "up_blocks")


def describe(model: nn.Module) -> DenoiserMap:
    """A description of the blocks alone: all that a rewrite of weights needs."""
    named = [(f"{s}.{i}", b) for s in STACKS for i, b in enumerate(getattr(model, s, ()))]
    if isinstance(getattr(model, "mid_block", None), nn.Module):
        named.append(("mid_block", model.mid_block))
    blocks = tuple(BlockSite(name, block, i, "", io=None) for i, (name, block) in enumerate(named))
    return DenoiserMap("denoiser", model, "test", blocks, CFG.SEPARATE, True, ())


def call(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def attach(model: nn.Module, **options: object) -> tuple[Int8WeightsMethod, Callable[[], None], DenoiserMap]:
    method, denoiser = Int8Weights(**options).build(), describe(model)
    method.bind((denoiser,))
    undo = method.rewrite(denoiser)
    return method, undo, denoiser


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, tuple[int, type]], dict[str, int]]:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modules = {k: (id(m), type(m)) for k, m in model.named_modules()}
    return state, modules, {k: id(p) for k, p in model.named_parameters()}


def assert_same(before: object, after: object) -> None:
    (state_a, *rest_a), (state_b, *rest_b) = before, after
    assert rest_a == rest_b
    assert list(state_a) == list(state_b)
    assert all(torch.equal(state_a[k], state_b[k]) and state_a[k].dtype == state_b[k].dtype for k in state_a)


def quantised(model: nn.Module) -> dict[str, QLinear]:
    return {k: m for k, m in model.named_modules() if isinstance(m, QLinear)}


@pytest.fixture(params=list(MODELS))
def model_and_inputs(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = MODELS[request.param]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # wake up layers that start at zero
    return model.eval(), inputs


def relative(y: Tensor, exact: Tensor) -> float:
    y, exact = y.detach().double(), exact.detach().double()
    return float((y - exact).norm() / exact.norm())


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_every_family_runs_close_to_float_and_comes_back_to_the_bit(model_and_inputs, keep: str) -> None:
    model, inputs = model_and_inputs
    before, exact = snapshot(model), call(model, inputs)
    _, undo, _ = attach(model, activation="dynamic", kernel="int_mm", keep_original=keep)
    assert len(quantised(model)) >= 8
    y = call(model, inputs)
    assert 0 < relative(y, exact) < 0.05
    undo()
    assert_same(before, snapshot(model))
    assert torch.equal(call(model, inputs), exact)


def test_modulation_embeddings_and_layers_outside_the_blocks_stay_float(model_and_inputs) -> None:
    model, _ = model_and_inputs
    _, undo, _ = attach(model)
    paths = quantised(model)
    stacks = (*STACKS, "mid_block")
    assert all(p.startswith(stacks) for p in paths)
    assert not any("norm" in p or "emb" in p for p in paths)
    undo()


def test_saved_weights_are_used_bit_for_bit(model_and_inputs) -> None:
    model, inputs = model_and_inputs
    method, undo, denoiser = attach(model, kernel="int_mm")
    saved = {k: v.clone() for k, v in method.artefacts().items()}
    first = call(model, inputs)
    undo()
    key = next(k for k in saved if k.endswith("qweight"))
    saved[key][0, 0] = -saved[key][0, 0] + 1  # a bit that rounding anew would not give
    again = Int8Weights(kernel="int_mm").build()
    again.load_artefacts(saved)
    undo = again.rewrite(denoiser)
    now = again.artefacts()
    assert now.keys() == saved.keys()
    assert all(torch.equal(now[k], saved[k]) for k in saved)
    assert not torch.equal(call(model, inputs), first)
    undo()


def test_saved_weights_of_another_model_are_refused_and_the_model_is_untouched() -> None:
    model, _ = wan()
    before = snapshot(model)
    method, undo, denoiser = attach(model)
    saved = {k: v.clone() for k, v in method.artefacts().items()}
    undo()
    key = next(iter(saved))
    for broken in ({k: v for k, v in saved.items() if k != key}, saved | {key: torch.flip(saved[key], (0,))}):
        method = Int8Weights().build()
        method.load_artefacts(broken)
        with pytest.raises(ArtefactError, match=r"denoiser[./]blocks"):
            method.rewrite(denoiser)
        assert_same(before, snapshot(model))


def test_weights_that_are_not_finite_are_refused_and_the_model_is_untouched() -> None:
    model, _ = wan()
    with torch.no_grad():
        model.blocks[1].ffn.net[2].weight[0, 0] = float("nan")
    with pytest.raises(ArtefactError, match="NaN"):
        attach(model)
    assert not quantised(model)


def test_an_adapter_keeps_working_and_saved_weights_fit_with_and_without_it() -> None:
    from peft import LoraConfig

    model, inputs = wan()
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    before, exact = snapshot(model), call(model, inputs)
    method, undo, _ = attach(model)
    assert "blocks.0.attn1.to_q.base_layer" in quantised(model)
    assert not any("lora_" in path for path in quantised(model))
    assert all("base_layer" not in key for key in method.artefacts())
    y = call(model, inputs)
    model.disable_adapters()
    assert not torch.equal(y, call(model, inputs))
    model.enable_adapters()
    assert relative(y, exact) < 0.05
    undo()
    assert_same(before, snapshot(model))


def test_undo_finds_layers_that_an_unloaded_adapter_moved() -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    model, _ = wan()
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    _, undo, _ = attach(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    undo()
    assert not quantised(model)
    assert all(torch.equal(plain[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_half_precision_out(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, inputs = wan()
    model = model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    before, exact = snapshot(model), call(model, inputs)
    _, undo, _ = attach(model, kernel="int_mm")
    y = call(model, inputs)
    assert y.dtype == exact.dtype
    assert model.dtype == dtype
    assert relative(y, exact) < 0.06
    undo()
    assert_same(before, snapshot(model))


def test_scales_stay_float32_when_the_model_is_cast() -> None:
    model, _ = wan()
    _, undo, _ = attach(model)
    scales = {k: m.weight_scale.clone() for k, m in quantised(model).items()}
    model.to(torch.bfloat16)
    for path, module in quantised(model).items():
        assert torch.equal(module.weight_scale, scales[path])
        assert module.qweight.dtype is torch.int8
        assert module.dtype is module.weight.dtype is module.bias.dtype is torch.bfloat16
    undo()
    assert all(p.dtype is torch.bfloat16 for p in model.blocks.parameters())


def test_the_stand_in_looks_like_a_linear_layer() -> None:
    linear = nn.Linear(24, 16)
    q = stand_in(linear, ("int_mm",))
    assert (q.in_features, q.out_features) == (24, 16)
    assert q.weight.shape == linear.weight.shape
    assert q.weight.dtype is linear.weight.dtype
    assert relative(q.weight, linear.weight) < 0.01
    assert torch.equal(q.bias, linear.bias)
    assert q.bias is not linear.bias
    assert set(q.state_dict()) == {"qweight", "weight_scale", "bias"}
    assert "in_features=24" in repr(q)


def stand_in(linear: nn.Linear, among: tuple[str, ...]) -> QLinear:
    return QLinear(Original(linear, None, "x"), *quantise_weight(linear.weight), among)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 24), (2, 5, 24), (0, 24)])
@pytest.mark.parametrize("kernel", ["int_mm", "aten_dynamic", "dequantise", "float"])
def test_any_leading_shape(shape: tuple[int, ...], kernel: str) -> None:
    linear = nn.Linear(24, 17)
    q, x = stand_in(linear, (kernel,)), torch.randn(shape)
    with torch.no_grad():
        assert q(x).shape == linear(x).shape
        if x.numel():
            assert relative(q(x), linear(x)) < (1e-6 if kernel == "float" else 0.04)


def test_gradients_reach_the_input_and_not_the_weight() -> None:
    linear = nn.Linear(24, 16)
    q, x = stand_in(linear, ("int_mm",)), torch.randn(3, 24, requires_grad=True)
    q(x).sum().backward()
    assert torch.allclose(x.grad, q.weight.sum(0).expand(3, 24), atol=1e-6)
    assert linear.weight.grad is None
    assert q.bias.grad is None


def test_float_kernel_is_the_original_layer_to_the_bit() -> None:
    linear, x = nn.Linear(24, 16), torch.randn(3, 24)
    with torch.no_grad():
        assert torch.equal(stand_in(linear, ("float",))(x), linear(x))


def test_float_layers_that_measure_fastest_run_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = {"float": 1.0, "int_mm": 2.0, "dequantise": 3.0}
    monkeypatch.setattr(
        "diffeff.kernels.int8_linear.dispatch.timings", lambda op, key, device, c: {n: speed[n] for n in c}
    )
    monkeypatch.setattr("diffeff.methods.quantization.int8_weights.measure", lambda *a: speed)
    model, inputs = wan()
    exact, run = call(model, inputs), Run("test", True)
    method, undo, _ = attach(model, keep_slow="float")
    assert torch.equal(call(model, inputs), exact)
    assert method.engaged(run)[0] is False
    assert "keep_slow" in method.engaged(run)[1]
    undo()
    method, undo, _ = attach(model, keep_slow="int8")
    assert not torch.equal(call(model, inputs), exact)
    assert method.engaged(run)[0] is True
    rows = method.details(run)["denoiser"]["kernels"].values()
    assert {row["kernel"] for row in rows} == {"int_mm"}
    assert all(row["microseconds"]["float"] == 1e6 for row in rows)
    undo()


def test_report_figures() -> None:
    model, inputs = wan()
    method, undo, _ = attach(model)
    call(model, inputs)
    run = Run("test", True)
    figures = json.loads(json.dumps(method.details(run)))["denoiser"]
    weights = [m.original for m in quantised(model).values()]
    assert figures["layers"] == len(weights) == 20
    assert figures["bytes_before"] == figures["bytes_kept_in_memory"] == sum(w.nbytes for w in weights)
    assert 3 * figures["bytes_after"] < figures["bytes_before"]
    assert figures["bytes_kept_on_disk"] == 0
    assert 0.002 < figures["weight_error_mean"] <= figures["weight_error_worst"][1] < 0.02
    assert sum(row["layers"] for row in figures["kernels"].values()) == 20
    assert "20 of 20" in method.engaged(run)[1]
    undo()


def test_on_disk_the_float_weights_leave_memory_and_the_files_go_with_the_plan() -> None:
    model, _ = wan()
    method, undo, _ = attach(model, keep_original="disk")
    originals = [m.original for m in quantised(model).values()]
    assert all(o.module.weight.numel() == 0 and o.file.exists() for o in originals)
    figures = method.details(Run("test", True))["denoiser"]
    assert figures["bytes_kept_in_memory"] == 0
    assert figures["bytes_kept_on_disk"] == figures["bytes_before"]
    folder = originals[0].file.parent
    undo()
    assert not folder.exists()


def test_a_failing_disk_leaves_the_model_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def failing(tensors: dict[str, Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 4:
            raise OSError("no space left on device")
        save(tensors, path)

    from diffeff.methods.quantization import qlinear

    save = qlinear.save_file
    monkeypatch.setattr(qlinear, "save_file", failing)
    model, _ = wan()
    before = snapshot(model)
    with pytest.raises(OSError, match="no space"):
        attach(model, keep_original="disk")
    assert_same(before, snapshot(model))


def test_layers_that_must_not_be_touched_are_left_with_a_reason() -> None:
    model, _ = wan()
    block = model.blocks[0]
    block.attn1.to_k.weight = block.attn1.to_q.weight
    block.attn1.to_v.register_forward_hook(lambda *a: None)
    block.attn1.to_out[0]._hf_hook = object()
    block.attn2.to_q = nn.Linear(24, 24, device="meta")
    method, undo, _ = attach(model, skip=("*.attn2.to_k",))
    reasons = "; ".join(method.details(Run("test", True))["denoiser"]["left_in_float"])
    for part in ("share their weight", "forward hook", "hook of another tool", "offloaded", "'*.attn2.to_k'"):
        assert part in reasons
    undo()


def test_nothing_to_do_is_an_error_with_reasons() -> None:
    model, _ = wan()
    with pytest.raises(MethodInapplicable, match="min_features=1000"):
        attach(model, min_features=1000)
    assert "20 linear layers" in Int8Weights().build().inspect(describe(model))


def test_a_kernel_that_cannot_run_here_is_named_before_anything_is_touched() -> None:
    model, _ = wan()
    with pytest.raises(KernelUnavailable, match="int_mm"):
        attach(model, kernel="triton")
    assert not quantised(model)


@pytest.mark.parametrize(
    "options", [{"kernel": "dequantise", "activation": "dynamic"}, {"kernel": "int_mm", "activation": "none"}]
)
def test_contradictions_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="activation"):
        Int8Weights(**options)
    with pytest.raises(ConfigError, match="skip"):
        Int8Weights(skip=(1,))


def test_a_layer_matches_the_reference() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(63, 65), torch.randn(7, 63)
    q = stand_in(linear, ("int_mm",))
    with torch.no_grad():
        exact = reference(x, q.qweight, q.weight_scale, q.bias)
        assert torch.allclose(q(x), exact, rtol=0, atol=1e-5)


def test_the_global_random_state_is_not_used() -> None:
    model, inputs = wan()
    state = torch.get_rng_state()
    _, undo, _ = attach(model)
    call(model, inputs)
    undo()
    assert torch.equal(torch.get_rng_state(), state)


# --- whole pipelines ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["wan", "wan-2expert", "flux", "sd", "dit", "cogvideox"])
def test_pipelines(family: str) -> None:
    from tiny import make, run

    from diffeff import DiffEffPipeline

    pipe = DiffEffPipeline(make(family))
    plain = run(family, pipe, steps=2)
    pipe.apply([Int8Weights(kernel="int_mm")])
    first = run(family, pipe, steps=2)
    outcome = pipe.report.methods[0]
    assert outcome.engaged, outcome.reason
    assert set(outcome.details) == {d.name for d in pipe.denoisers}
    assert 0 < (first - plain).norm() / plain.norm() < 0.1
    assert torch.equal(run(family, pipe, steps=2), first)
    json.dumps(pipe.report.to_dict())
    pipe.remove()
    assert torch.equal(run(family, pipe, steps=2), plain)


def test_a_saved_pipeline_comes_back_with_the_same_int8_weights(tmp_path: Path) -> None:
    from tiny import make, run

    from diffeff import DiffEffPipeline

    pipe = DiffEffPipeline(make("dit")).apply([Int8Weights(kernel="int_mm")])
    first = run("dit", pipe, steps=2)
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffEffPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run("dit", again, steps=2), first)
    assert again.plan.methods == pipe.plan.methods
