"""Linear layers in float32, bfloat16 and int8, timed alternately in one process.

`python -m diffeff.eval.bench_int8` prints one JSON line per shape: milliseconds of every kernel (median, quartiles,
minimum), speed against float32 and bfloat16, and the relative error against float64. `--model` adds a line for a whole
DiT of that width (random weights: speed only).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffeff.kernels.int8_linear import int8_linear, kernels_on, pack, quantise_weight
from diffeff.kernels.microbench import machine

__all__ = ["bench_layer", "bench_model"]

SHAPES = ((64, 640, 640), (256, 1152, 4608), (1024, 1152, 1152), (4096, 320, 1280))
"""(tokens, inputs, outputs): a UNet's middle, a DiT's feed-forward, a DiT's projections, a UNet's outer level."""
Timed = Mapping[str, Callable[[], object]]


def bench_layer(shape: tuple[int, int, int], rounds: int = 15, device: str = "cpu") -> dict[str, Any]:
    """One linear layer on Gaussian data. The int8 rows include quantising the activations, rescaling and the bias."""
    place = torch.device(device)
    x, weight, bias = _operands(shape, place)
    exact = x.double() @ weight.double().T + bias.double()
    runs = _layer_runs(x, weight, bias)
    times = _alternate(runs, rounds, place)
    rows = {name: _summary(times[name]) | {"error": _error(runs[name](), exact)} for name in runs}
    return {"benchmark": "int8_linear", "shape": list(shape)} | _record(rows, rounds, place)


def bench_model(width: int = 1152, blocks: int = 4, rounds: int = 5, device: str = "cpu") -> dict[str, Any]:
    """A DiT of `blocks` blocks and 256 tokens, all block linears but modulation in int8; random weights."""
    place = torch.device(device)
    model, inputs = _dit(width, blocks, place)
    half, half_inputs = _dit(width, blocks, place)
    half.to(torch.bfloat16)
    half_inputs["hidden_states"] = half_inputs["hidden_states"].bfloat16()
    small, _ = _dit(width, blocks, place)
    _quantise(small)
    runs = {
        "float32": lambda: model(**inputs, return_dict=False)[0],
        "bfloat16": lambda: half(**half_inputs, return_dict=False)[0],
        "int8": lambda: small(**inputs, return_dict=False)[0],
    }
    with torch.no_grad():
        exact, times = runs["float32"]().double(), _alternate(runs, rounds, place)
        rows = {name: _summary(times[name]) | {"error": _error(runs[name](), exact)} for name in runs}
    return {"benchmark": "int8_model", "width": width, "blocks": blocks} | _record(rows, rounds, place)


def _operands(shape: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(*size, generator=generator) for size in ((m, k), (n, k), (n,)))
    x, weight, bias = (tensor.to(device) for tensor in tensors)
    return x, weight / k**0.5, bias / 100  # small: errors are relative to the output


def _layer_runs(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    qweight, scale = quantise_weight(weight)
    half = tuple(t.bfloat16() for t in (x, weight, bias))

    def quantised(name: str, tokens: Tensor) -> Callable[[], Tensor]:
        packed = pack(name, qweight, scale, bias)
        return lambda: int8_linear(tokens, qweight, scale, bias, kernel=name, packed=packed)

    runs: dict[str, Callable[[], Tensor]] = {
        "float32": lambda: F.linear(x, weight, bias),
        "bfloat16": lambda: F.linear(*half),
    }
    names = [name for name in kernels_on(x.device) if name != "reference"]
    runs |= {name: quantised(name, x) for name in names}
    return runs | {f"{name} of bfloat16": quantised(name, half[0]) for name in names if name != "dequantise"}


def _dit(width: int, blocks: int, device: torch.device) -> tuple[Any, dict[str, Any]]:
    import diffusers

    library: Any = diffusers
    torch.manual_seed(0)
    heads = width // 72 if width % 72 == 0 else width // 32
    model = library.DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, num_layers=blocks, sample_size=32, out_channels=8
    )
    latents = torch.randn(1, 4, 32, 32, device=device)
    conditions = {"timestep": torch.tensor([500], device=device), "class_labels": torch.tensor([3], device=device)}
    return model.eval().to(device), {"hidden_states": latents, **conditions}


def _quantise(model: Any) -> None:
    """The plan `int8_weights` on a bare denoiser."""
    import diffusers

    from diffeff.anatomy.table import denoisers
    from diffeff.methods.quantization.int8_weights import Int8Weights

    library: Any = diffusers
    found = denoisers(library.DiTPipeline(transformer=model, vae=None, scheduler=library.DDIMScheduler()))
    method = Int8Weights(activation="dynamic").build()
    method.bind(found)
    method.rewrite(found[0])


def _alternate(runs: Timed, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every run in every round; the first round warms up, and the order turns round each time."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in reversed(list(runs)) if number % 2 else runs:
            seconds = _seconds(runs[name], device)
            if number:
                times[name].append(seconds)
    return times


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    with torch.no_grad():
        run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def _summary(seconds: Iterable[float]) -> dict[str, float]:
    values = [1e3 * value for value in seconds]
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    figures = {"ms_median": middle, "ms_quartile_1": low, "ms_quartile_3": high, "ms_min": min(values)}
    return {name: round(value, 4) for name, value in figures.items()}


def _error(y: Tensor, exact: Tensor) -> float:
    return round(float((y.double() - exact).norm() / exact.norm()), 6)


def _record(rows: Mapping[str, dict[str, float]], rounds: int, device: torch.device) -> dict[str, Any]:
    medians = {name: row["ms_median"] for name, row in rows.items()}
    for name, row in rows.items():
        row["speed_of_float32"] = round(medians["float32"] / medians[name], 2)
        row["speed_of_bfloat16"] = round(medians["bfloat16"] / medians[name], 2)
    return {"kernels": rows, "rounds": rounds, "machine": machine(device)}


def _results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for shape in options.shape or SHAPES:
        yield bench_layer(shape, options.rounds, options.device)
    if options.model:
        yield bench_model(options.model, rounds=max(3, options.rounds // 3), device=options.device)


def _shape(text: str) -> tuple[int, int, int]:
    m, k, n = (int(part) for part in text.split("x"))
    return m, k, n


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=_shape, action="append", help="TOKENSxINPUTSxOUTPUTS; may be repeated")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: 15)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--model", type=int, metavar="WIDTH", help="also a whole DiT of this width, such as 1152")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for result in _results(options):
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
