"""Tiny transformers: CogVideoX, LTX, HunyuanVideo, FLUX, SD3, PixArt, DiT."""

from __future__ import annotations

from typing import Any

from diffeff.zoo.tiny.parts import flow, image_vae, library, text_free
from diffeff.zoo.tiny.request import TEXT, WIDTH, Request, Tiny

__all__ = ["TRANSFORMERS"]

_ROPE = {"num_attention_heads": 2, "attention_head_dim": 16}
_PLAIN = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 4}


def _pipeline(name: str, transformer: Any, scheduler: Any, *without: str) -> Any:
    """A pipeline of a transformer and a scheduler alone."""
    return getattr(library, name)(**text_free(*without), vae=None, transformer=transformer, scheduler=scheduler)


def _cogvideox() -> Any:
    transformer = library.CogVideoXTransformer3DModel(
        **_ROPE,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=WIDTH,
        num_layers=4,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )
    scheduler = library.CogVideoXDDIMScheduler(
        timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    return _pipeline("CogVideoXPipeline", transformer, scheduler)


def _ltx() -> Any:
    transformer = library.LTXVideoTransformer3DModel(
        **_PLAIN, in_channels=4, out_channels=4, cross_attention_dim=24, caption_channels=WIDTH
    )
    return _pipeline("LTXPipeline", transformer, flow(1.0, use_dynamic_shifting=True))


def _hunyuanvideo() -> Any:
    transformer = library.HunyuanVideoTransformer3DModel(
        **_ROPE,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    return _pipeline("HunyuanVideoPipeline", transformer, flow(7.0), "text_encoder_2", "tokenizer_2")


def _flux() -> Any:
    transformer = library.FluxTransformer2DModel(
        **_ROPE,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return _pipeline("FluxPipeline", transformer, flow(use_dynamic_shifting=True), "text_encoder_2", "tokenizer_2")


def _sd3() -> Any:
    transformer = library.SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    without = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    return _pipeline("StableDiffusion3Pipeline", transformer, flow(), *without)


def _pixart() -> Any:
    transformer = library.PixArtTransformer2DModel(
        **_PLAIN, cross_attention_dim=24, caption_channels=WIDTH, sample_size=128
    )
    return _pipeline("PixArtAlphaPipeline", transformer, library.DPMSolverMultistepScheduler())


def _dit() -> Any:
    transformer = library.DiTTransformer2DModel(**_PLAIN, sample_size=8, out_channels=8)
    scheduler = library.DDIMScheduler(prediction_type="epsilon", clip_sample=False)
    return library.DiTPipeline(transformer=transformer, vae=image_vae(1), scheduler=scheduler)


def _ltx_call(r: Request) -> dict[str, Any]:
    return {**r.text(), **r.masks(), **r.video(32, 8)}


def _hunyuanvideo_call(r: Request) -> dict[str, Any]:
    return {**r.distilled(), "prompt_attention_mask": r.masks()["prompt_attention_mask"], **r.video()}


def _flux_cfg_call(r: Request) -> dict[str, Any]:
    return {**r.text(), **r.pooled(), **r.pixels(), "true_cfg_scale": 4.0 if r.guidance else 1.0}


def _pixart_call(r: Request) -> dict[str, Any]:
    text: dict[str, Any] = {"negative_prompt": None, **r.text(), **r.masks()}
    return {**text, **r.pixels(), "use_resolution_binning": False}


def _dit_call(r: Request) -> dict[str, Any]:
    return {"class_labels": [(7 * r.seed + row) % 1000 for row in range(r.batch)], "output_type": "np"}


TRANSFORMERS: dict[str, Tiny] = {
    "cogvideox": Tiny(_cogvideox, lambda r: {**r.text(), **r.video()}, (3, 8, 12)),
    "ltx": Tiny(_ltx, _ltx_call, (3, 4, 6)),
    "hunyuanvideo": Tiny(_hunyuanvideo, _hunyuanvideo_call, (3, 8, 12)),
    "flux": Tiny(_flux, lambda r: {**r.distilled(), **r.pixels()}),
    "flux-cfg": Tiny(_flux, _flux_cfg_call),
    "sd3": Tiny(_sd3, lambda r: {**r.text(), **r.pooled(), **r.pixels()}),
    "pixart": Tiny(_pixart, _pixart_call),
    "dit": Tiny(_dit, _dit_call, (1, 8, 8), resizable=False),
}
