"""Parts that several tiny pipelines share: autoencoders, image encoders, schedulers."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from diffeff.zoo.tiny.request import WIDTH

__all__ = ["clip", "flow", "image_vae", "library", "text_free", "unipc", "wan_vae"]

library: Any = diffusers
"""diffusers, as what a type checker can see of its lazy modules: anything."""
_transformers: Any = transformers


def image_vae(scale: int = 8) -> Any:
    """An image autoencoder that makes latents `scale` times smaller."""
    levels = scale.bit_length()
    return library.AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
    )


def wan_vae() -> Any:
    """Wan's video autoencoder."""
    return library.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )


def clip(projection: bool) -> tuple[Any, Any]:
    """A CLIP image encoder (five tokens of WIDTH channels) and its processor."""
    config = _transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=112,
    )
    make = _transformers.CLIPVisionModelWithProjection if projection else _transformers.CLIPVisionModel
    return make(config), _transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil()


def flow(shift: float = 3.0, **more: Any) -> Any:
    """The Euler scheduler of flow-matching models."""
    return library.FlowMatchEulerDiscreteScheduler(shift=shift, **more)


def unipc() -> Any:
    """The multistep scheduler Wan ships with."""
    return library.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )


def text_free(*names: str) -> dict[str, None]:
    """The text parts of a pipeline, and others by name, left out."""
    return dict.fromkeys((*names, "text_encoder", "tokenizer"))
