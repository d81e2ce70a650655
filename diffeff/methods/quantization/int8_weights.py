"""Linear layers of the denoiser's blocks with int8 weights: a quarter of the bytes of float32, faster where measured.

Source: the usual round-to-nearest scheme (one symmetric scale per output channel; one dynamic scale per token for the
activations), as in LLM.int8 (arXiv 2208.07339) without its outlier split. No calibration, no data.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffeff.anatomy.types import DenoiserMap
from diffeff.core.config import Config, knob
from diffeff.core.method import Claim, Layer, Method, Need, Undo
from diffeff.core.run import Run
from diffeff.errors import ArtefactError, ConfigError, KernelUnavailable, MethodInapplicable
from diffeff.kernels.int8_linear import dequantise, kernels_on, measure, quantise_weight
from diffeff.methods.quantization.qlinear import Original, QLinear

__all__ = ["Int8Weights", "QLinear"]

log = logging.getLogger("diffeff")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FOREIGN = 0.1
"""Relative error of a weight above which saved int8 weights were not made from it (rounding alone costs 0.005-0.03)."""
SKIP = ("*norm*.linear*", "*embed*", "*time_emb*", "*adaln*", "*lora_*")


@dataclass(frozen=True, kw_only=True)
class Int8Weights(Config):
    """Smaller and, where measured so, faster: the linear layers of the blocks hold their weights in int8.

    Replaces the `nn.Linear` layers of the blocks (those inside LoRA adapters included), leaving out modulation,
    embedding and adapter layers (`skip`) and tiny ones. Each layer runs the fastest kernel for its shape, dtype and
    device, found by a micro-benchmark of about a third of a second per shape, once per machine. Expect four times less
    than float32 and half of float16 in weight bytes; on CPUs with VNNI or AMX a multiple of float32 speed and little
    over bfloat16. One layer errs by 0.5 % (weights only) to 1.2 % (activations too) on Gaussian data.

    For the exact undo the float weights are kept: in main memory (which on a CPU means no byte is saved while the plan
    is on, only an accelerator's memory is), or with `keep_original="disk"` in temporary files. For inference only:
    gradients reach inputs, not weights. Load LoRA adapters before, not after. A layer that `keep_slow="float"` runs in
    float holds both weights. Another machine may choose other kernels and so differ within the stated error; name a
    `kernel` where runs must agree to the bit.
    """

    name: ClassVar[str] = "int8_weights"
    summary: ClassVar[str] = "Linear weights in int8: a quarter of the bytes, and faster kernels where measured so."

    activation: Literal["auto", "dynamic", "none"] = knob(
        "auto", "int8 activations, one scale per token (dynamic); float ones (none); or whichever is faster"
    )
    kernel: Literal["auto", "int_mm", "triton", "aten_dynamic", "dequantise"] = knob(
        "auto", "matrix product; auto measures. aten_dynamic: less accurate, on some CPUs faster; never chosen by auto"
    )
    keep_slow: Literal["int8", "float"] = knob(
        "int8", "layers whose plain float form is the fastest: keep them in int8 for the memory, or run them in float"
    )
    keep_original: Literal["memory", "disk"] = knob(
        "memory", "where the float weights wait for the undo: main memory, or temporary files"
    )
    min_features: int = knob(16, "leave layers with fewer inputs or outputs in float", low=1, step=16)
    skip: tuple[str, ...] = knob(SKIP, "leave layers whose path matches one of these patterns in float")

    def check(self) -> None:
        if not all(isinstance(pattern, str) for pattern in self.skip):
            raise ConfigError(f"int8_weights.skip is {self.skip!r}; allowed: patterns such as '*.attn2.*'")
        quantised = {"int_mm": "dynamic", "triton": "dynamic", "aten_dynamic": "dynamic", "dequantise": "none"}
        needed = quantised.get(self.kernel, self.activation)
        if self.activation not in ("auto", needed):
            raise ConfigError(
                f"int8_weights.kernel is {self.kernel!r}, which works with activation={needed!r} only; "
                f"activation is {self.activation!r}"
            )

    def build(self) -> Int8WeightsMethod:
        return Int8WeightsMethod(self)


@dataclass
class _Layers:
    """What was done to one denoiser: stand-ins and weight errors by path, reasons for the layers left in float."""

    quantised: dict[str, QLinear] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


class Int8WeightsMethod(Method[Int8Weights]):
    """Swaps linear layers for `QLinear` at attach, and the originals back at detach."""

    layer: ClassVar[Layer] = Layer.QUANTIZE
    claims: ClassVar[frozenset[Claim]] = frozenset({Claim.LINEAR_WEIGHTS})
    breaks: ClassVar[frozenset[Need]] = frozenset({Need.FLOAT_WEIGHTS})

    def __init__(self, config: Int8Weights) -> None:
        super().__init__(config)
        self._layers: dict[str, _Layers] = {}
        self._given: dict[str, Tensor] = {}

    # --- attach -------------------------------------------------------------------------------------------------
    def bind(self, denoisers: tuple[DenoiserMap, ...]) -> None:
        found = [module for d in denoisers for module in self._linears(d)[0].values()]
        if not found:
            reasons = Counter(reason for d in denoisers for reason in self._linears(d)[1].values())
            why = "; ".join(f"{n} {reason}" for reason, n in reasons.most_common(4)) or "the blocks hold no nn.Linear"
            raise MethodInapplicable(f"int8_weights finds no layer to quantise: {why}")
        kernel, device = self.config.kernel, found[0].weight.device
        if kernel != "auto" and kernel not in kernels_on(device):
            raise KernelUnavailable(
                f"int8_weights.kernel is {kernel!r}, which cannot run on {device}. There: "
                f"{', '.join(kernels_on(device))}; or 'auto'."
            )

    def claimed(self, denoiser: DenoiserMap) -> Mapping[Claim, frozenset[str]]:
        return {Claim.LINEAR_WEIGHTS: frozenset(self._linears(denoiser)[0])}

    def inspect(self, denoiser: DenoiserMap) -> str:
        self.bind((denoiser,))
        chosen, left = self._linears(denoiser)
        before = sum(m.weight.nbytes for m in chosen.values())
        after = sum(m.weight.numel() + 4 * m.out_features for m in chosen.values())
        return f"{len(chosen)} linear layers, {before:,} -> {after:,} bytes; {len(left)} are left in float"

    def _linears(self, denoiser: DenoiserMap) -> tuple[dict[str, nn.Linear], dict[str, str]]:
        """The layers to quantise by path, and why the others are left alone."""
        uses = _uses(denoiser.module)
        chosen: dict[str, nn.Linear] = {}
        left: dict[str, str] = {}
        for path, module in _block_linears(denoiser):
            reason = self._obstacle(path, module, uses)
            if reason is None:
                chosen[path] = module
            else:
                left[path] = reason
        return chosen, left

    def _obstacle(self, path: str, module: nn.Linear, uses: Counter[int]) -> str | None:
        weight, pattern = module.weight, next((p for p in self.config.skip if fnmatchcase(path, p)), None)
        if pattern is not None:
            return f"match the skip pattern {pattern!r}"
        if min(module.in_features, module.out_features) < self.config.min_features:
            return f"have fewer than min_features={self.config.min_features} inputs or outputs"
        if type(module) is not nn.Linear or type(weight.data) is not Tensor or weight.dtype not in _FLOATS:
            return f"are special or already quantised ({type(module).__name__}, {weight.dtype})"
        if weight.is_meta:
            return "are offloaded one by one (use model offload instead)"
        if any(name in vars(module) for name in ("_hf_hook", "_diffusers_hook", "forward")):
            return "carry a hook of another tool"
        if module._forward_hooks or module._forward_pre_hooks:
            return "carry a forward hook"
        return "share their weight with another layer" if uses[id(weight)] > 1 else None

    # --- rewrite ------------------------------------------------------------------------------------------------
    def rewrite(self, denoiser: DenoiserMap) -> Undo | None:
        chosen, left = self._linears(denoiser)
        layers = self._layers[denoiser.name] = _Layers(left=left)
        self._check_given(denoiser, chosen)
        with ExitStack() as stack:
            folder = None
            if self.config.keep_original == "disk":
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="diffeff-int8-")))
            stack.callback(self._restore, denoiser, layers)
            for number, (path, module) in enumerate(chosen.items()):
                self._replace(denoiser, layers, path, Original(module, folder, f"{number:05d}"))
            for key in list(self._given):
                if key.startswith(f"{denoiser.name}/"):
                    del self._given[key]
            return stack.pop_all().close

    def _replace(self, denoiser: DenoiserMap, layers: _Layers, path: str, original: Original) -> None:
        weight, key = original.module.weight.data, _key(denoiser, path)
        if f"{key}.qweight" in self._given:
            qweight, scale = (self._given[f"{key}.{part}"].to(weight.device) for part in ("qweight", "weight_scale"))
        else:
            qweight, scale = quantise_weight(weight)
        error = _relative_error(weight, qweight, scale)
        if not error < _FOREIGN:
            cause = (
                "holds a NaN or an infinity"
                if not weight.isfinite().all()
                else "is not what the int8 weight was made of"
            )
            raise ArtefactError(
                f"int8_weights: the weight of {denoiser.name}.{path} {cause} (relative error {error:.2g})"
            )
        layers.errors[path] = error
        layers.quantised[path] = QLinear(original, qweight, scale, self._among(weight.device))
        original.stow()
        parent, _, child = path.rpartition(".")
        denoiser.module.get_submodule(parent)._modules[child] = layers.quantised[path]

    def _restore(self, denoiser: DenoiserMap, layers: _Layers) -> None:
        """Put every original back wherever its stand-in is now (unloading an adapter moves it up the tree)."""
        stand_ins = {id(module): module for module in layers.quantised.values()}
        for parent in list(denoiser.module.modules()):
            for name, child in parent._modules.items():
                q = stand_ins.pop(id(child), None)
                if q is not None:
                    restored = q.original.restore(q.qweight.device, q.dtype)
                    parent._modules[name] = restored.train(q.training)
        if stand_ins:
            log.warning("int8_weights: %d layers of %s were taken out by someone else", len(stand_ins), denoiser.name)
        layers.quantised.clear()

    def _among(self, device: torch.device) -> tuple[str, ...]:
        """The kernels to choose from on a device, the default first."""
        config = self.config
        if config.kernel != "auto":
            names: tuple[str, ...] = (config.kernel,)
        else:
            dynamic, none = ("int_mm", "triton"), ("dequantise",)
            wanted = {"dynamic": dynamic, "none": none, "auto": dynamic + none}[config.activation]
            names = tuple(name for name in wanted if name in kernels_on(device)) or none
        return (*names, "float") if config.keep_slow == "float" else names

    # --- artefacts ----------------------------------------------------------------------------------------------
    def artefacts(self) -> Mapping[str, Tensor]:
        """The int8 weights and scales in use: `denoiser/path.qweight` and `denoiser/path.weight_scale`."""
        return {
            f"{name}/{_plain(path)}.{part}": getattr(module, part)
            for name, layers in self._layers.items()
            for path, module in layers.quantised.items()
            for part in ("qweight", "weight_scale")
        }

    def load_artefacts(self, tensors: Mapping[str, Tensor]) -> None:
        """Use these int8 weights, bit for bit, instead of rounding again. They must fit the model's float weights."""
        self._given = dict(tensors)

    def _check_given(self, denoiser: DenoiserMap, chosen: Mapping[str, nn.Linear]) -> None:
        prefix = f"{denoiser.name}/"
        given = {key: tuple(value.shape) for key, value in self._given.items() if key.startswith(prefix)}
        if not given:
            return
        wanted: dict[str, tuple[int, ...]] = {}
        for path, module in chosen.items():
            wanted[f"{_key(denoiser, path)}.qweight"] = tuple(module.weight.shape)
            wanted[f"{_key(denoiser, path)}.weight_scale"] = (module.out_features,)
        wrong = sorted(k for k in given.keys() | wanted.keys() if given.get(k) != wanted.get(k))
        if wrong:
            raise ArtefactError(
                "int8_weights: the saved weights were made for another model or other options: "
                f"{len(wrong)} tensors are missing, left over or of another shape, first {wrong[0]!r}. "
                "Quantise anew and save again."
            )

    # --- report -------------------------------------------------------------------------------------------------
    def engaged(self, run: Run) -> tuple[bool, str]:
        modules = [m for layers in self._layers.values() for m in layers.quantised.values()]
        used = [m for m in modules if set(m.choices.values()) - {"float"}]
        if not used:
            return False, "no quantised layer ran in int8: plain float was measured faster for each (keep_slow='float')"
        before, after = sum(m.original.nbytes for m in modules), sum(m.nbytes for m in modules)
        kernels = ", ".join(sorted({k for m in used for k in m.choices.values()}))
        text = f"{len(used)} of {len(modules)} linear layers in int8 ({kernels}), {before:,} -> {after:,} bytes"
        return True, text + self._slower(modules)

    def _slower(self, modules: list[QLinear]) -> str:
        """A clause on the shapes at which plain float was measured faster than the kernel in use."""
        rows = list(self._kernel_table(modules).values())
        timed = [
            (row["microseconds"][row["kernel"]], row["microseconds"]["float"]) for row in rows if row["microseconds"]
        ]
        slow = sum(ours > plain for ours, plain in timed)
        return f"; float was measured faster at {slow} of {len(timed)} shapes (see keep_slow)" if slow else ""

    def details(self, run: Run) -> Mapping[str, Any]:
        return {name: self._figures(layers) for name, layers in self._layers.items()}

    def _figures(self, layers: _Layers) -> dict[str, Any]:
        modules = list(layers.quantised.values())
        kept = [m.original.kept for m in modules]
        worst = max(layers.errors, key=layers.errors.__getitem__, default="")
        return {
            "layers": len(modules),
            "left_in_float": dict(Counter(layers.left.values())),
            "bytes_before": sum(m.original.nbytes for m in modules),
            "bytes_after": sum(m.nbytes for m in modules),
            "bytes_kept_in_memory": sum(size for place, size in kept if place == "memory"),
            "bytes_kept_on_disk": sum(size for place, size in kept if place == "disk"),
            "weight_error_mean": sum(layers.errors.values()) / max(len(layers.errors), 1),
            "weight_error_worst": [worst, layers.errors.get(worst, 0.0)],
            "kernels": self._kernel_table(modules),
        }

    def _kernel_table(self, modules: list[QLinear]) -> dict[str, Any]:
        """Per shape: the kernel in use, by how many layers, and the measured microseconds where there was a choice."""
        table: dict[str, Any] = {}
        for module in modules:
            for (rows, dtype), kernel in module.choices.items():
                key = f"{rows}x{module.in_features}x{module.out_features} {str(dtype).removeprefix('torch.')}"
                row = table.setdefault(key, {"kernel": kernel, "layers": 0, "microseconds": {}})
                row["layers"] += 1
                if len(module.among) > 1 and row["layers"] == 1:
                    row["microseconds"] = _microseconds(module, rows, dtype)
        return table


def _block_linears(denoiser: DenoiserMap) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of the denoiser's blocks with their paths, each once."""
    seen: set[int] = set()
    for block in denoiser.blocks:
        for name, module in block.module.named_modules():
            if isinstance(module, nn.Linear) and id(module) not in seen:
                seen.add(id(module))
                yield f"{block.name}.{name}", module


def _uses(root: nn.Module) -> Counter[int]:
    """How many places of the tree hold each weight, by id: tied weights and shared layers have more than one."""
    modules = (m for _, m in root.named_modules(remove_duplicate=False))
    return Counter(id(p) for m in modules for p in m._parameters.values() if p is not None)


def _plain(path: str) -> str:
    """A layer's path without the adapter around it, so that saved weights fit with and without adapters."""
    return path.replace(".base_layer", "")


def _key(denoiser: DenoiserMap, path: str) -> str:
    return f"{denoiser.name}/{_plain(path)}"


def _relative_error(weight: Tensor, qweight: Tensor, scale: Tensor) -> float:
    """Frobenius norm of the rounding error over that of the weight."""
    exact = weight.float()
    norm = exact.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return float((dequantise(qweight, scale, torch.float32) - exact).norm() / norm)


def _microseconds(module: QLinear, rows: int, dtype: torch.dtype) -> dict[str, float]:
    among = [name for name in module.among if name != "float"]
    seconds = measure(rows, module.in_features, module.out_features, dtype, module.qweight.device, among)
    return {name: round(1e6 * value, 2) for name, value in seconds.items()}
