"""Tiny UNets: Stable Diffusion and ControlNet, SDXL, AnimateDiff, Stable Video Diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffeff.zoo.tiny.parts import clip, image_vae, library, text_free
from diffeff.zoo.tiny.request import WIDTH, Request, Tiny

__all__ = ["UNETS"]

_UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32),
    "norm_num_groups": 8,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
    "layers_per_block": 2,
}
_CROSS_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
_CROSS_LAST = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
_ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
}
_CLIP = (4, 8, 12)


def _unet() -> Any:
    return library.UNet2DConditionModel(**_UNET, **_CROSS_FIRST)


def _ddim() -> Any:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return library.DDIMScheduler(**betas, clip_sample=False, steps_offset=1)


def _sd_parts() -> dict[str, Any]:
    return {
        **text_free("safety_checker", "feature_extractor"),
        "vae": None,
        "unet": _unet(),
        "scheduler": _ddim(),
        "requires_safety_checker": False,
    }


def _controlnet() -> Any:
    net = library.ControlNetModel.from_unet(_unet(), conditioning_embedding_out_channels=(4, 4, 8, 8))
    return library.StableDiffusionControlNetPipeline(**_sd_parts(), controlnet=net)


def _sdxl() -> Any:
    unet = library.UNet2DConditionModel(
        **_UNET, **_CROSS_LAST, **_ADDED, transformer_layers_per_block=(1, 1, 2), use_linear_projection=True
    )
    scheduler = library.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    return library.StableDiffusionXLPipeline(
        **text_free("text_encoder_2", "tokenizer_2"), vae=None, unet=unet, scheduler=scheduler, add_watermarker=False
    )


def _motion(blocks: Mapping[str, tuple[str, ...]], **more: Any) -> Any:
    types = {key: tuple(name.replace("2D", "Motion") for name in names) for key, names in blocks.items()}
    base = {key: value for key, value in _UNET.items() if key != "attention_head_dim"}
    return library.UNetMotionModel(
        **{**base, "layers_per_block": 1, **types, **more}, num_attention_heads=2, motion_num_attention_heads=2
    )


def _motion_parts() -> dict[str, Any]:
    return {
        **text_free("feature_extractor"),
        "vae": None,
        "motion_adapter": None,
        "unet": _motion(_CROSS_FIRST),
        "scheduler": library.DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1),
    }


def _animatediff_sdxl() -> Any:
    return library.AnimateDiffSDXLPipeline(
        **text_free("text_encoder_2", "tokenizer_2"),
        vae=image_vae(),
        motion_adapter=None,
        unet=_motion(_CROSS_LAST, **_ADDED, use_motion_mid_block=False, transformer_layers_per_block=(1, 1, 2)),
        scheduler=_ddim(),
    )


def _svd() -> Any:
    encoder, processor = clip(projection=True)
    unet = library.UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        down_block_types=(*("CrossAttnDownBlockSpatioTemporal",) * 2, "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", *("CrossAttnUpBlockSpatioTemporal",) * 2),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        num_attention_heads=(2, 2, 2),
        num_frames=4,
    )
    vae = library.AutoencoderKLTemporalDecoder(
        block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1
    )
    scheduler = library.EulerDiscreteScheduler(
        prediction_type="v_prediction", use_karras_sigmas=True, timestep_type="continuous", sigma_max=700.0
    )
    return library.StableVideoDiffusionPipeline(
        vae=vae, image_encoder=encoder, unet=unet, scheduler=scheduler, feature_extractor=processor
    )


def _image_to_image(r: Request) -> dict[str, Any]:
    return {**r.text(), "image": r.noise(r.batch, 4, *r.size[1:], key=5), "strength": 0.7}


def _video_to_video(r: Request) -> dict[str, Any]:
    return {**r.text(), **r.pixels(), "latents": r.noise(r.batch, 4, *r.size, key=5), "strength": 0.7}


def _frames(r: Request) -> dict[str, Any]:
    return {**r.text(), **r.pixels(), "num_frames": r.size[0]}


def _svd_call(r: Request) -> dict[str, Any]:
    scales = {"min_guidance_scale": 1.0, "max_guidance_scale": 3.0 if r.guidance else 1.0, "guidance_scale": ...}
    return {"image": r.images(), **r.pixels(), "num_frames": r.size[0], **scales}


UNETS: dict[str, Tiny] = {
    "sd": Tiny(lambda: library.StableDiffusionPipeline(**_sd_parts()), lambda r: {**r.text(), **r.pixels()}),
    "sd-img2img": Tiny(lambda: library.StableDiffusionImg2ImgPipeline(**_sd_parts()), _image_to_image),
    "sd-controlnet": Tiny(_controlnet, lambda r: {**r.text(), "image": r.images(), **r.pixels()}),
    "sdxl": Tiny(_sdxl, lambda r: {**r.text(), **r.pooled(), **r.pixels()}),
    "animatediff": Tiny(lambda: library.AnimateDiffPipeline(**_motion_parts()), _frames, _CLIP),
    "animatediff-sdxl": Tiny(_animatediff_sdxl, lambda r: {**_frames(r), **r.pooled()}, _CLIP),
    "animatediff-v2v": Tiny(lambda: library.AnimateDiffVideoToVideoPipeline(**_motion_parts()), _video_to_video, _CLIP),
    "svd": Tiny(_svd, _svd_call, _CLIP, max_batch=8),
}
