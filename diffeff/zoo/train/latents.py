"""What the latent-diffusion trainers share: the autoencoder, its latents, optimisers, and saving in fp16."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffeff.zoo.score import write_card
from diffeff.zoo.train.harness import (
    EMA,
    Clock,
    JsonLog,
    Muon,
    TrainOptions,
    cosine,
    load_checkpoint,
    progress_bar,
    publish,
    save_checkpoint,
    set_lr,
)

KL_WEIGHT = 2e-5


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 on CUDA. On CPUs fp32: at these widths bf16 was measured to gain nothing."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


class Optimisers:
    """Muon for the matrices and convolution kernels of the hidden layers, AdamW for all other parameters."""

    def __init__(
        self, modules: Iterable[nn.Module], *, muon: float = 0.02, adam: float = 2e-3, edges: tuple[str, ...] = ()
    ) -> None:
        """`edges` are name fragments of layers at a network's rim or of tables, which stay with AdamW."""
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for module in modules:
            for name, p in module.named_parameters():
                if not p.requires_grad:
                    continue
                hidden = p.ndim in (2, 4) and p.shape[0] > 8 and p[0].numel() > 8
                chosen = hidden and not any(edge in name for edge in edges)
                (matrices if chosen else rest).append(p)
        self.parameters = matrices + rest
        self.all: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, adam, betas=(0.9, 0.98), weight_decay=0.0)]
        if matrices:
            self.all.append(Muon(matrices, muon))

    def step(self, factor: float, clip: float = 1.0) -> None:
        """Clip, step at `factor` times the base rates, clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        for optimiser in self.all:
            set_lr(optimiser, factor)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """For a checkpoint."""
        return [optimiser.state_dict() for optimiser in self.all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """From a checkpoint."""
        for optimiser, state in zip(self.all, states, strict=True):
            optimiser.load_state_dict(state)


def keep_autoencoder(vae: Any, options: TrainOptions) -> None:
    """Save a trained autoencoder in the work folder."""
    save_checkpoint(options.work / "vae.pt", {"vae": vae.state_dict()})


def kept_autoencoder(vae: Any, options: TrainOptions) -> bool:
    """Load the weights that an earlier run kept into `vae`; False where there are none, or not to be resumed."""
    saved = load_checkpoint(options.work / "vae.pt") if options.resume else None
    if saved is None:
        return False
    load_autoencoder(vae, saved["vae"])
    return True


def load_autoencoder(vae: Any, state: dict[str, Tensor]) -> None:
    """Load preconditioned weights: see `precondition` for the scaling factor."""
    vae.load_state_dict(state)
    vae.register_to_config(scaling_factor=1.0)


def train_autoencoder(
    vae: Any,
    draw: Callable[[float], tuple[Tensor, Tensor]],
    validate: Callable[[Any], dict[str, float]],
    *,
    minutes: float,
    log: JsonLog,
    device: torch.device,
    muon: float = 0.02,
    adam: float = 2e-3,
) -> None:
    """Fit an `AutoencoderKL` in place and leave its averaged weights in it.

    `draw(fraction of the budget)` gives images [B, 3, H, W] in [-1, 1] and weights of their pixels, which
    broadcast; `validate` gives figures for the log.
    """
    optimisers = Optimisers([vae], muon=muon, adam=adam, edges=("conv_in", "conv_out", "quant_conv"))
    ema, clock, step, due = EMA(vae, decay=0.995), Clock(minutes), 0, 0.5
    with progress_bar("autoencoder", clock) as tick:
        while not clock.done:
            images, weight = draw(clock.fraction)
            with autocast(device):
                posterior = vae.encode(images).latent_dist
                error = vae.decode(posterior.sample()).sample.float() - images
            pixels = ((error.square() + 0.03 * error.abs()) * weight).mean()
            kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
            (pixels + KL_WEIGHT * kl).backward()
            optimisers.step(cosine(clock.fraction))
            ema.update()
            step += 1
            if clock.elapsed > due:
                due = clock.elapsed + max(0.5, minutes / 8)
                with ema.applied(), torch.no_grad():
                    figures = validate(vae)
                log.write(stage="vae", minute=clock.elapsed, step=step, loss=pixels.item(), **figures)
                tick(f"loss {pixels.item():.4f} " + " ".join(f"{k} {v:.3f}" for k, v in figures.items()))
    ema.copy_to()
    with torch.no_grad():
        log.write(stage="vae", minute=clock.elapsed, step=step, done=True, **validate(vae))


def psnr(a: Tensor, b: Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB."""
    return float(10 * torch.log10(peak**2 / (a.float() - b.float()).square().mean().clamp(min=1e-12)))


@torch.no_grad()
def precondition(vae: Any, images: Tensor, power: float = 0.5) -> Tensor:
    """Rotate and rescale the latent channels inside `quant_conv` / `post_quant_conv`; return new latents.

    Channel covariance C becomes C^(1 - 2 * power / 2), normalised to unit mean variance: power 1 whitens,
    0 only rescales. The half-way choice shrinks the spread between strong channels (brightness) and weak
    ones (outlines), without lifting the codec's noise to the level of the picture. `scaling_factor` becomes 1.
    """
    mean, covariance = _moments(encode(vae, images))
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=1e-6)
    gain = values ** (-power / 2)
    gain = gain / (values * gain.square()).mean().sqrt()
    forward = vectors @ torch.diag(gain) @ vectors.T
    backward = vectors @ torch.diag(1 / gain) @ vectors.T
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    head, tail = quant.weight[:channels].flatten(1), quant.weight[channels:]
    quant.weight.copy_(torch.cat([(forward @ head)[..., None, None], tail]))
    quant.bias[:channels] = forward @ (quant.bias[:channels] - mean)
    # The posterior's spread stays in the old basis; every user of a trained codec takes the mode.
    quant.bias[channels:] += 2 * gain.log().mean()
    kernel = post.weight.flatten(1)
    post.bias.copy_(post.bias + kernel @ mean)
    post.weight.copy_((kernel @ backward)[..., None, None])
    vae.register_to_config(scaling_factor=1.0)
    return encode(vae, images)


@torch.no_grad()
def encode(vae: Any, images: Tensor, batch: int = 128) -> Tensor:
    """Posterior means of images [N, 3, H, W] in [-1, 1]."""
    device = next(vae.parameters()).device
    return torch.cat([vae.encode(chunk.to(device)).latent_dist.mode() for chunk in images.split(batch)])


def _moments(latents: Tensor) -> tuple[Tensor, Tensor]:
    flat = latents.transpose(0, 1).flatten(1)
    return flat.mean(1), torch.cov(flat)


def min_snr_v(alphas_cumprod: Tensor, gamma: float = 5.0) -> Tensor:
    """Loss weight per timestep for v-prediction, min(SNR, gamma) / (SNR + 1) (Hang et al. 2023)."""
    snr = alphas_cumprod / (1 - alphas_cumprod).clamp(min=1e-8)
    return snr.clamp(max=gamma) / (snr + 1)


@torch.no_grad()
def sample_captions(
    pipeline: Any, captions: list[str], *, batch: int, steps: int, guidance: float, seed: int, **options: Any
) -> Tensor:
    """Images [N, 3, H, W] or clips [N, F, 3, H, W] in [0, 1], on the CPU; the pipeline makes `batch` at a time."""
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for begin in range(0, len(captions), batch):
        made = pipeline(
            captions[begin : begin + batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed + begin),
            output_type="pt",
            return_dict=False,
            **options,
        )
        parts.append(made[0].float().cpu())
    return torch.cat(parts)


def describe(folder: Path, facts: dict[str, Any], text: str, log: JsonLog) -> None:
    """The card, for programs and for people, and the curve of the training, beside the weights."""
    write_card(folder, facts, text)
    (folder / "train.log").write_bytes(log.path.read_bytes())


def save_half(pipeline: Any, out: Path, extra: Callable[[Path], None] | None = None) -> None:
    """Save `pipeline` as a plain diffusers folder with fp16 weights, atomically; `extra` adds files to it.

    The live modules keep their precision: the copies on disk are converted.
    """
    built = out.with_name(f".{out.name}.building")
    shutil.rmtree(built, ignore_errors=True)
    pipeline.save_pretrained(built, safe_serialization=True)
    for weights in built.rglob("*.safetensors"):
        halve(weights)
    for config in built.rglob("config.json"):
        _settle_config(config)
    if extra is not None:
        extra(built)
    publish(built, out)


def halve(weights: Path) -> None:
    """Rewrite a safetensors file with its floating tensors in fp16."""
    from safetensors.torch import load_file, save_file

    tensors = {k: v.half() if v.is_floating_point() else v for k, v in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def _settle_config(config: Path) -> None:
    """Drop machine-specific paths. transformers loads in the precision its config names and diffusers in
    float32 unless told, so the config says float32 and a plain `from_pretrained` gets one precision."""
    facts = json.loads(config.read_text(encoding="utf-8"))
    for key in ("dtype", "torch_dtype"):
        if key in facts:
            facts[key] = "float32"
    facts.pop("_name_or_path", None)
    config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
