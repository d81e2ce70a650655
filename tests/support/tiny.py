"""Tiny pipelines with random weights, built from diffusers' real classes: architecture and calling order are true.

No downloads: text arrives as embeddings, so there are no tokenizers or text encoders, and a VAE exists only where the
pipeline encodes or must decode. A denoiser call takes milliseconds. Weights depend on `seed` only; the global random
state is left alone.

    pipe = make("wan")
    latents = run("wan", pipe, steps=4)                 # [1, 4, 3, 8, 12]
    pipe(**call_kwargs("wan", pipe, guidance=False))    # one branch only
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers as d
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

__all__ = ["FAMILIES", "Request", "Tiny", "call_kwargs", "make", "run"]

TEXT = 7
"""Text tokens of a prompt (Wan image-to-video excepted: it counts 512)."""
WIDTH = 16
"""Channels of a text embedding."""


@dataclass(frozen=True)
class Request:
    """One call: `size` is (frames, height, width) of the latents; every random input comes from `seed`."""

    pipe: Any
    steps: int
    seed: int
    batch: int
    size: tuple[int, int, int]
    guidance: bool

    def noise(self, *shape: int, key: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * self.seed + key + 1))

    def text(self, tokens: int = TEXT, width: int = WIDTH) -> dict[str, Tensor]:
        """Embeddings of the prompts, and of the negative ones when guided."""
        found = {"prompt_embeds": self.noise(self.batch, tokens, width, key=1)}
        if self.guidance:
            found["negative_prompt_embeds"] = self.noise(self.batch, tokens, width, key=2)
        return found

    def pooled(self, width: int = WIDTH) -> dict[str, Tensor]:
        found = {"pooled_prompt_embeds": self.noise(self.batch, width, key=3)}
        if self.guidance:
            found["negative_pooled_prompt_embeds"] = self.noise(self.batch, width, key=4)
        return found

    def masks(self) -> dict[str, Tensor]:
        """Attention masks of the prompts: the last two tokens are padding."""
        mask = torch.ones(self.batch, TEXT, dtype=torch.long)
        mask[:, -2:] = 0
        found = {"prompt_attention_mask": mask}
        if self.guidance:
            found["negative_prompt_attention_mask"] = mask.clone()
        return found

    def pixels(self, scale: int = 8) -> dict[str, int]:
        return {"height": self.size[1] * scale, "width": self.size[2] * scale}

    def video(self, scale: int = 8, temporal: int = 4) -> dict[str, int]:
        return {**self.pixels(scale), "num_frames": (self.size[0] - 1) * temporal + 1}

    def images(self) -> list[Image.Image]:
        height, width = self.size[1] * 8, self.size[2] * 8
        rows = torch.rand(self.batch, height, width, 3, generator=torch.Generator().manual_seed(self.seed))
        return [Image.fromarray((255 * row).numpy().astype(np.uint8)) for row in rows]


@dataclass(frozen=True)
class Tiny:
    """How one tiny pipeline is built and called."""

    build: Callable[[], Any]
    call: Callable[[Request], dict[str, Any]]
    size: tuple[int, int, int] = (1, 8, 12)
    """Default (frames, height, width) of the latents."""
    scale: float = 4.0
    """guidance_scale of a guided call."""
    max_batch: int = 8
    resizable: bool = True


def make(name: str, seed: int = 0) -> Any:
    """The tiny pipeline `name`, with weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = FAMILIES[name].build()
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                _wake(component)
                component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_kwargs(
    name: str,
    pipe: Any,
    *,
    steps: int = 6,
    seed: int = 0,
    batch: int = 1,
    size: tuple[int, ...] | None = None,
    guidance: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """Arguments for `pipe(**kwargs)`, with a fresh generator. `size`: (height, width) or (frames, height, width) of
    the latents; `more` overrides."""
    tiny = FAMILIES[name]
    if batch > tiny.max_batch or (size is not None and not tiny.resizable):
        raise ValueError(f"{name} takes at most {tiny.max_batch} rows; resizable: {tiny.resizable}")
    whole = tiny.size if size is None else (tiny.size[: 3 - len(size)] + tuple(size))
    request = Request(pipe, steps, seed, batch, whole, guidance)  # type: ignore[arg-type]
    common = {
        "num_inference_steps": steps,
        "guidance_scale": tiny.scale if guidance else 1.0,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    kwargs = {**common, **tiny.call(request), **more}
    return {key: value for key, value in kwargs.items() if value is not ...}


def run(name: str, pipe: Any, **options: Any) -> Tensor:
    """The pipeline's output (latents, or pixels where it cannot return latents) as one tensor."""
    with torch.no_grad():
        found = pipe(**call_kwargs(name, pipe, **options), return_dict=False)
    output = found[0] if isinstance(found, tuple) else found
    return output if isinstance(output, Tensor) else torch.as_tensor(np.asarray(output))


def _wake(module: nn.Module) -> None:
    """Give weights that the library starts at zero (ControlNet's outputs) values, so that they take part."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)


# --- autoencoders and image encoders ------------------------------------------------------------------------------
def _image_vae(scale: int = 8) -> Any:
    levels = scale.bit_length()
    return d.AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
    )


def _wan_vae() -> Any:
    return d.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )


def _clip(projection: bool) -> tuple[Any, Any]:
    """A tiny CLIP image encoder (five tokens of WIDTH channels) and its processor."""
    import transformers as t

    config = t.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=112,
    )
    model = (t.CLIPVisionModelWithProjection if projection else t.CLIPVisionModel)(config)
    return model, t.models.clip.image_processing_pil_clip.CLIPImageProcessorPil()


def _text_free(*names: str) -> dict[str, None]:
    return dict.fromkeys((*names, "text_encoder", "tokenizer"))


# --- transformers -------------------------------------------------------------------------------------------------
_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 4,
    "rope_max_seq_len": 32,
}


def _wan() -> Any:
    return d.WanPipeline(
        **_text_free(),
        vae=None,
        transformer=d.WanTransformer3DModel(**_WAN),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _wan_2expert() -> Any:
    return d.WanPipeline(
        **_text_free(),
        vae=None,
        transformer=d.WanTransformer3DModel(**_WAN),
        transformer_2=d.WanTransformer3DModel(**_WAN),
        scheduler=d.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        boundary_ratio=0.8,
    )


def _wan_i2v() -> Any:
    encoder, processor = _clip(projection=False)
    config = {**_WAN, "in_channels": 12, "image_dim": WIDTH, "added_kv_proj_dim": 24}
    return d.WanImageToVideoPipeline(
        **_text_free(),
        vae=_wan_vae(),
        image_encoder=encoder,
        image_processor=processor,
        transformer=d.WanTransformer3DModel(**config),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _wan_v2v() -> Any:
    return d.WanVideoToVideoPipeline(
        **_text_free(),
        vae=_wan_vae(),
        transformer=d.WanTransformer3DModel(**_WAN),
        scheduler=d.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
    )


def _wan_vace() -> Any:
    return d.WanVACEPipeline(
        **_text_free(),
        vae=_wan_vae(),
        transformer=d.WanVACETransformer3DModel(**_WAN, vace_layers=[0, 2], vace_in_channels=8 + 64),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _vace_call(r: Request) -> dict[str, Any]:
    frames = r.video()["num_frames"]
    return {**r.text(), **r.video(), "video": [image for image in r.images() for _ in range(frames)]}


def _wan_v2v_call(r: Request) -> dict[str, Any]:
    frames = r.video()["num_frames"]
    clips = [[image] * frames for image in r.images()]
    return {**r.text(), **r.pixels(), "video": clips[0] if r.batch == 1 else clips, "strength": 0.7}


def _cogvideox() -> Any:
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
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
    scheduler = d.CogVideoXDDIMScheduler(
        timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    return d.CogVideoXPipeline(**_text_free(), vae=None, transformer=transformer, scheduler=scheduler)


def _ltx() -> Any:
    transformer = d.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=4,
        caption_channels=WIDTH,
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return d.LTXPipeline(**_text_free(), vae=None, transformer=transformer, scheduler=scheduler)


def _hunyuanvideo() -> Any:
    transformer = d.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    return d.HunyuanVideoPipeline(
        **_text_free("text_encoder_2", "tokenizer_2"),
        vae=None,
        transformer=transformer,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def _distilled(r: Request) -> dict[str, Any]:
    """Guidance is an input of the model: one branch, whatever its scale."""
    return {key: value for key, value in {**r.text(), **r.pooled()}.items() if "negative" not in key}


def _hunyuanvideo_call(r: Request) -> dict[str, Any]:
    return {**_distilled(r), "prompt_attention_mask": r.masks()["prompt_attention_mask"], **r.video()}


def _flux() -> Any:
    transformer = d.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return d.FluxPipeline(
        **_text_free("text_encoder_2", "tokenizer_2"),
        vae=None,
        transformer=transformer,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def _flux_cfg_call(r: Request) -> dict[str, Any]:
    return {**r.text(), **r.pooled(), **r.pixels(), "true_cfg_scale": 4.0 if r.guidance else 1.0}


def _sd3() -> Any:
    transformer = d.SD3Transformer2DModel(
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
    names = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    return d.StableDiffusion3Pipeline(
        **_text_free(*names),
        vae=None,
        transformer=transformer,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _pixart() -> Any:
    transformer = d.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=4,
        cross_attention_dim=24,
        caption_channels=WIDTH,
        sample_size=128,
    )
    scheduler = d.DPMSolverMultistepScheduler()
    return d.PixArtAlphaPipeline(**_text_free(), vae=None, transformer=transformer, scheduler=scheduler)


def _pixart_call(r: Request) -> dict[str, Any]:
    text: dict[str, Any] = {"negative_prompt": None, **r.text(), **r.masks()}
    return {**text, **r.pixels(), "use_resolution_binning": False}


def _dit() -> Any:
    transformer = d.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=4, sample_size=8, out_channels=8
    )
    scheduler = d.DDIMScheduler(prediction_type="epsilon", clip_sample=False)
    return d.DiTPipeline(transformer=transformer, vae=_image_vae(1), scheduler=scheduler)


def _dit_call(r: Request) -> dict[str, Any]:
    return {"class_labels": [(7 * r.seed + row) % 1000 for row in range(r.batch)], "output_type": "np"}


# --- UNets --------------------------------------------------------------------------------------------------------
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


def _unet() -> Any:
    return d.UNet2DConditionModel(**_UNET, **_CROSS_FIRST)


def _ddim() -> Any:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return d.DDIMScheduler(**betas, clip_sample=False, steps_offset=1)


def _sd_parts() -> dict[str, Any]:
    return {
        **_text_free("safety_checker", "feature_extractor"),
        "vae": None,
        "unet": _unet(),
        "scheduler": _ddim(),
        "requires_safety_checker": False,
    }


def _controlnet() -> Any:
    net = d.ControlNetModel.from_unet(_unet(), conditioning_embedding_out_channels=(4, 4, 8, 8))
    return d.StableDiffusionControlNetPipeline(**_sd_parts(), controlnet=net)


def _sdxl() -> Any:
    unet = d.UNet2DConditionModel(
        **_UNET, **_CROSS_LAST, **_ADDED, transformer_layers_per_block=(1, 1, 2), use_linear_projection=True
    )
    return d.StableDiffusionXLPipeline(
        **_text_free("text_encoder_2", "tokenizer_2"),
        vae=None,
        unet=unet,
        scheduler=d.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def _motion(blocks: dict[str, tuple[str, ...]], **more: Any) -> Any:
    types = {key: tuple(name.replace("2D", "Motion") for name in names) for key, names in blocks.items()}
    base = {key: value for key, value in _UNET.items() if key != "attention_head_dim"}
    return d.UNetMotionModel(
        **{**base, "layers_per_block": 1, **types, **more}, num_attention_heads=2, motion_num_attention_heads=2
    )


def _motion_parts() -> dict[str, Any]:
    scheduler = d.DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1)
    unet = _motion(_CROSS_FIRST)
    return {
        **_text_free("feature_extractor"),
        "vae": None,
        "motion_adapter": None,
        "unet": unet,
        "scheduler": scheduler,
    }


def _animatediff_sdxl() -> Any:
    return d.AnimateDiffSDXLPipeline(
        **_text_free("text_encoder_2", "tokenizer_2"),
        vae=_image_vae(),
        motion_adapter=None,
        unet=_motion(_CROSS_LAST, **_ADDED, use_motion_mid_block=False, transformer_layers_per_block=(1, 1, 2)),
        scheduler=_ddim(),
    )


def _animatediff_v2v_call(r: Request) -> dict[str, Any]:
    return {**r.text(), **r.pixels(), "latents": r.noise(r.batch, 4, *r.size, key=5), "strength": 0.7}


def _svd() -> Any:
    encoder, processor = _clip(projection=True)
    unet = d.UNetSpatioTemporalConditionModel(
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
    vae = d.AutoencoderKLTemporalDecoder(
        block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1
    )
    scheduler = d.EulerDiscreteScheduler(
        prediction_type="v_prediction", use_karras_sigmas=True, timestep_type="continuous", sigma_max=700.0
    )
    return d.StableVideoDiffusionPipeline(
        vae=vae, image_encoder=encoder, unet=unet, scheduler=scheduler, feature_extractor=processor
    )


def _svd_call(r: Request) -> dict[str, Any]:
    scales = {"min_guidance_scale": 1.0, "max_guidance_scale": 3.0 if r.guidance else 1.0, "guidance_scale": ...}
    return {"image": r.images(), **r.pixels(), "num_frames": r.size[0], **scales}


FAMILIES: dict[str, Tiny] = {
    "wan": Tiny(_wan, lambda r: {**r.text(), **r.video()}, (3, 8, 12)),
    "wan-2expert": Tiny(_wan_2expert, lambda r: {**r.text(), **r.video()}, (3, 8, 12)),
    "wan-i2v": Tiny(_wan_i2v, lambda r: {"image": r.images()[0], **r.text(512), **r.video()}, (3, 8, 12)),
    "wan-v2v": Tiny(_wan_v2v, _wan_v2v_call, (3, 8, 12)),
    "wan-vace": Tiny(_wan_vace, _vace_call, (3, 8, 12), max_batch=1),
    "cogvideox": Tiny(_cogvideox, lambda r: {**r.text(), **r.video()}, (3, 8, 12)),
    "ltx": Tiny(_ltx, lambda r: {**r.text(), **r.masks(), **r.video(32, 8)}, (3, 4, 6)),
    "hunyuanvideo": Tiny(_hunyuanvideo, _hunyuanvideo_call, (3, 8, 12)),
    "flux": Tiny(_flux, lambda r: {**_distilled(r), **r.pixels()}),
    "flux-cfg": Tiny(_flux, _flux_cfg_call),
    "sd3": Tiny(_sd3, lambda r: {**r.text(), **r.pooled(), **r.pixels()}),
    "pixart": Tiny(_pixart, _pixart_call),
    "dit": Tiny(_dit, _dit_call, (1, 8, 8), resizable=False),
    "sd": Tiny(lambda: d.StableDiffusionPipeline(**_sd_parts()), lambda r: {**r.text(), **r.pixels()}),
    "sd-img2img": Tiny(
        lambda: d.StableDiffusionImg2ImgPipeline(**_sd_parts()),
        lambda r: {**r.text(), "image": r.noise(r.batch, 4, *r.size[1:], key=5), "strength": 0.7},
    ),
    "sd-controlnet": Tiny(_controlnet, lambda r: {**r.text(), "image": r.images(), **r.pixels()}),
    "sdxl": Tiny(_sdxl, lambda r: {**r.text(), **r.pooled(), **r.pixels()}),
    "animatediff": Tiny(
        lambda: d.AnimateDiffPipeline(**_motion_parts()),
        lambda r: {**r.text(), **r.pixels(), "num_frames": r.size[0]},
        (4, 8, 12),
    ),
    "animatediff-sdxl": Tiny(
        _animatediff_sdxl,
        lambda r: {**r.text(), **r.pooled(), **r.pixels(), "num_frames": r.size[0]},
        (4, 8, 12),
    ),
    "animatediff-v2v": Tiny(
        lambda: d.AnimateDiffVideoToVideoPipeline(**_motion_parts()), _animatediff_v2v_call, (4, 8, 12)
    ),
    "svd": Tiny(_svd, _svd_call, (4, 8, 12), max_batch=8),
}
