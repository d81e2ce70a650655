"""Tiny Wan: text to video, two experts, image to video, video to video, VACE."""

from __future__ import annotations

from typing import Any

from diffeff.zoo.tiny.parts import clip, flow, library, text_free, unipc, wan_vae
from diffeff.zoo.tiny.request import WIDTH, Request, Tiny

__all__ = ["WAN"]

_SIZE = (3, 8, 12)
PADDING = 3
"""Zeros behind the prompt's embeddings."""
_CONFIG = {
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


def _transformer(**more: Any) -> Any:
    return library.WanTransformer3DModel(**{**_CONFIG, **more})


def _wan() -> Any:
    return library.WanPipeline(**text_free(), vae=None, transformer=_transformer(), scheduler=flow())


def _two_experts() -> Any:
    return library.WanPipeline(
        **text_free(),
        vae=None,
        transformer=_transformer(),
        transformer_2=_transformer(),
        scheduler=unipc(),
        boundary_ratio=0.8,
    )


def _image_to_video() -> Any:
    encoder, processor = clip(projection=False)
    return library.WanImageToVideoPipeline(
        **text_free(),
        vae=wan_vae(),
        image_encoder=encoder,
        image_processor=processor,
        transformer=_transformer(in_channels=12, image_dim=WIDTH, added_kv_proj_dim=24),
        scheduler=flow(),
    )


def _video_to_video() -> Any:
    return library.WanVideoToVideoPipeline(**text_free(), vae=wan_vae(), transformer=_transformer(), scheduler=unipc())


def _vace() -> Any:
    return library.WanVACEPipeline(
        **text_free(),
        vae=wan_vae(),
        transformer=library.WanVACETransformer3DModel(**_CONFIG, vace_layers=[0, 2], vace_in_channels=8 + 64),
        scheduler=flow(),
    )


def _text(r: Request) -> dict[str, Any]:
    texts = r.text()
    for embeds in texts.values():
        embeds[:, -PADDING:] = 0  # as Wan's pipelines pad
    return {**texts, **r.video()}


def _image_call(r: Request) -> dict[str, Any]:
    return {"image": r.images()[0], **r.text(512), **r.video()}


def _video_call(r: Request) -> dict[str, Any]:
    frames = r.video()["num_frames"]
    clips = [[image] * frames for image in r.images()]
    return {**r.text(), **r.pixels(), "video": clips[0] if r.batch == 1 else clips, "strength": 0.7}


def _vace_call(r: Request) -> dict[str, Any]:
    frames = r.video()["num_frames"]
    return {**r.text(), **r.video(), "video": [image for image in r.images() for _ in range(frames)]}


WAN: dict[str, Tiny] = {
    "wan": Tiny(_wan, _text, _SIZE),
    "wan-2expert": Tiny(_two_experts, _text, _SIZE),
    "wan-i2v": Tiny(_image_to_video, _image_call, _SIZE),
    "wan-v2v": Tiny(_video_to_video, _video_call, _SIZE),
    "wan-vace": Tiny(_vace, _vace_call, _SIZE, max_batch=1),
}
