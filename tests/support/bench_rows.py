"""Rows as `diffeff bench`, `bench matrix` and `bench scaling` write them, and a report of `diffeff eval`."""

from __future__ import annotations

import base64
import copy
import io
import math
from typing import Any

import numpy as np

from diffeff.eval.render.records import Cell, cells
from diffeff.plan import Plan

ENVIRONMENT = {"diffeff": "0.1.0", "torch": "2.13.0+cpu", "diffusers": "0.42.1", "python": "3.11.7"}
PROMPTS = 50


def bench_rows(
    model: str = "sprites-wan", run: str = "20261121T101500-abcd", samples: bool = True
) -> list[dict[str, Any]]:
    """One run with every kind of row: plain, plans, a sweep, peers, two curves of fewer steps, idle, failed."""
    rows = [_row(model, run, "plain", "plain", "plain", 1.0, None, 30, flops=1.0)]
    for name, speed, psnr in (("high", 1.65, 61.6), ("balanced", 2.27, 56.9), ("fast", 3.19, 43.6)):
        rows.append(_row(model, run, "plan", name, name, speed, psnr, 30, flops=1.05 / speed))
    rows += _sweep(model, run, "plan", "tuned", "feature_cache threshold", (0.05, 0.1, 0.2, 0.3), 1.4, 0.5, 60)
    rows += _sweep(
        model, run, "peer", "diffusers:fbcache", "diffusers FirstBlockCache", (0.05, 0.1, 0.2, 0.4), 1.3, 0.4, 51
    )
    rows += _sweep(model, run, "peer", "cache-dit:dbcache", "cache-dit DBCache", (0.05, 0.1, 0.2, 0.4), 1.35, 0.45, 52)
    rows += _sweep(model, run, "peer", "para-attn:fbcache", "ParaAttention first-block cache", (0.1, 0.2), 1.5, 0.3, 49)
    for steps in (20, 15, 12, 10, 8, 6):
        rows.append(_fewer(model, run, "fewer-steps", "fewer steps", steps, 0))
        rows.append(_fewer(model, run, "fewer-steps:unipc", "fewer steps, UniPC order 2", steps, -3))
    rows.append(_idle(_row(model, run, "peer", "diffusers:taylorseer", "diffusers TaylorSeer", 0.99, None, 30)))
    rows.append(
        _stopped(
            model,
            run,
            "plan",
            "downsample.json",
            "refused",
            "check",
            "MethodInapplicable",
            "kv_downsample: no attention of 1024 tokens or more; lower min_tokens",
        )
    )
    rows.append(
        _stopped(
            model,
            run,
            "peer",
            "tomesd",
            "failed",
            "apply",
            "AttributeError",
            "'WanPipeline' object has no attribute 'named_modules' | <b>raw</b>",
        )
    )
    rows.append(
        _stopped(
            model,
            run,
            "peer",
            "deepcache",
            "failed",
            "apply",
            "AttributeError",
            "'WanPipeline' object has no attribute 'unet'",
        )
    )
    if samples:
        for number, row in enumerate(rows):
            row["samples"] = {"sheet": strip(number)} if row["status"] == "ok" else None
    return rows


def _sweep(
    model: str,
    run: str,
    kind: str,
    name: str,
    label: str,
    values: tuple[float, ...],
    speed: float,
    rise: float,
    psnr: float,
) -> list[dict[str, Any]]:
    return [
        _row(
            model,
            run,
            kind,
            name,
            f"{label}, threshold {value}",
            speed + rise * i,
            psnr - 4.5 * i,
            30,
            options={"threshold": value},
            flops=1 / (speed + rise * i),
        )
        for i, value in enumerate(values)
    ]


def _fewer(model: str, run: str, name: str, label: str, steps: int, shift: float) -> dict[str, Any]:
    speed = 28.5 / (steps - 0.4)
    return _row(
        model,
        run,
        "fewer-steps",
        name,
        f"{label}, {steps} steps",
        speed,
        60 + shift - 9.5 * math.log2(speed),
        steps,
        flops=steps / 30,
    )


def _row(
    model: str,
    run: str,
    kind: str,
    name: str,
    label: str,
    speed: float,
    psnr: float | None,
    steps: int,
    options: dict[str, Any] | None = None,
    flops: float | None = None,
) -> dict[str, Any]:
    def quartiles(value: float, spread: float = 0.03) -> dict[str, float]:
        return {"median": value, "q1": value * (1 - spread), "q3": value * (1 + spread)}

    plan = {"diffeff_plan": 1, "methods": [{"use": "feature_cache", "interval": 2}]} if kind == "plan" else None
    return {
        "benchmark": "bench",
        "version": 1,
        "run": run,
        "when": "2026-11-21T10:15:00+00:00",
        "commit": "7089b48",
        "model": model,
        "model_fingerprint": "0f" * 8,
        "arm": {"kind": kind, "name": name, "label": label, "options": options or {}},
        "plan": plan,
        "steps": steps,
        "call": {"height": 64, "width": 64, "num_frames": 9, "guidance_scale": 2.0},
        "prompts": PROMPTS,
        "prompt_set": "sprites",
        "prompt_set_sha256": "ab" * 32,
        "seed": 0,
        "status": "ok",
        "error": None,
        "noop": False,
        "seconds": quartiles(3.86 / speed),
        "cpu_seconds": quartiles(3.8 / speed),
        "speedup": quartiles(speed, 0.0 if kind == "plain" else 0.03),
        "cpu_speedup": quartiles(speed * 0.99),
        "flops": flops,
        "peak_memory": {"bytes": int(6.1e8 + 2e6 * speed), "above_load_bytes": 40_000_000, "how": "resident"},
        "fidelity": {
            "psnr": None if psnr is None else {"mean": psnr, "low": psnr - 0.6, "high": psnr + 0.6, "min": psnr - 8},
            "ssim": None if psnr is None else {"mean": 0.99, "low": 0.985, "high": 0.995, "min": 0.95},
            "mae": None if psnr is None else {"mean": 0.002, "low": 0.001, "high": 0.003, "min": 0.001},
            "identical": PROMPTS if psnr is None else 0,
        },
        "adherence": {
            name: {"right": right, "trials": 50, "accuracy": right / 50, "interval95": interval}
            for name, right, interval in (
                ("all", 48, [0.865, 0.989]),
                ("colour", 50, [0.929, 1.0]),
                ("shape", 49, [0.895, 0.996]),
                ("motion", 48, [0.865, 0.989]),
            )
        },
        "threads": 1,
        "device": "cpu",
        "dtype": "float32",
        "environment": ENVIRONMENT,
        "command": f"diffeff bench {model} --against fewer-steps --prompts 50",
        "samples": None,
    }


def _idle(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"noop": True, "flops": 1.0}


def _stopped(
    model: str, run: str, kind: str, name: str, status: str, phase: str, error: str, message: str
) -> dict[str, Any]:
    nothing = dict.fromkeys(
        ("seconds", "cpu_seconds", "speedup", "cpu_speedup", "flops", "peak_memory", "fidelity", "adherence", "samples")
    )
    row = _row(model, run, kind, name, name, 1.0, 40.0, 30)
    return row | nothing | {"status": status, "error": {"phase": phase, "type": error, "message": message}}


def strip(number: int, frames: int = 9, size: int = 32) -> str:
    """A row of frames as base64 PNG: a square that moves."""
    from PIL import Image

    sheet = np.full((size, size * frames, 3), 18 + 2 * (number % 9), np.uint8)
    for frame in range(frames):
        left = size * frame + 2 + frame * 2
        sheet[10:20, left : left + 10] = (230, 60 + 8 * (number % 20), 50)
    memory = io.BytesIO()
    Image.fromarray(sheet).save(memory, format="PNG")
    return base64.b64encode(memory.getvalue()).decode("ascii")


def matrix_rows() -> list[dict[str, Any]]:
    """Two methods on three families: works, refused, idle, fails."""
    reasons = {
        ("kv_downsample", "wan"): ("refused", "no attention of 1024 tokens or more"),
        ("kv_downsample", "flux"): ("idle", "every attention is below min_tokens"),
        ("int8_weights", "dit"): ("fails", "RuntimeError: expected Half"),
    }
    rows = []
    for family in ("wan", "flux", "dit"):
        for method in ("feature_cache", "kv_downsample", "int8_weights"):
            status, reason = reasons.get((method, family), ("works", ""))
            left = 0.57 if status == "works" else None
            rows.append(
                {
                    "benchmark": "matrix",
                    "family": family,
                    "method": method,
                    "status": status,
                    "reason": reason,
                    "compute_left": left,
                    "relative_difference": 0.01,
                    "environment": ENVIRONMENT,
                }
            )
    return rows


def scaling_rows(model: str = "sprites-wan") -> list[dict[str, Any]]:
    """Four axes with their slopes."""
    rows = []
    for axis, xs, slope in (
        ("tokens", (64, 256, 1024, 4096), 1.3),
        ("frames", (5, 9, 17, 33), 1.1),
        ("steps", (5, 10, 20, 40), 1.0),
        ("batch", (1, 2, 4, 8), 0.9),
    ):
        points = [
            {
                "x": x,
                "seconds": 0.2 * (x / xs[0]) ** slope,
                "peak_bytes": int(5e8 + 1e6 * x),
                "above_load_bytes": int(1e7 * x**0.2),
            }
            for x in xs
        ]
        rows.append(
            {
                "benchmark": "scaling",
                "model": model,
                "axis": axis,
                "points": points,
                "slope_time": {"value": slope, "low": slope - 0.06, "high": slope + 0.07},
                "slope_memory": {"value": 0.2, "low": 0.1, "high": 0.3},
                "plan": None,
                "environment": ENVIRONMENT,
            }
        )
    return rows


def evaluation() -> dict[str, Any]:
    """A report of `diffeff eval`."""

    def result(metric: str, label: str, value: float | None, unit: str, better: str, **more: Any) -> dict[str, Any]:
        return {
            "metric": metric,
            "label": label,
            "value": value,
            "unit": unit,
            "better": better,
            "n": 200,
            "interval": None,
            "features": None,
            "details": {},
            "notes": [],
            "infinite": False,
        } | more

    interval = {"low": 55.9, "high": 57.8, "method": "bootstrap over items, 1000 resamples"}
    features = {"spec": "sprites", "label": "sprites", "sha256": "cd" * 32, "dim": 64}
    wilson = {"low": 0.942, "high": 0.991, "method": "Wilson"}
    return {
        "diffeff_eval": 1,
        "subject": {"kind": "model", "model": "sprites-wan", "plan_digest": Plan.preset("balanced").digest},
        "reference": {"kind": "plain", "model": "sprites-wan", "plan_digest": None},
        "prompts": {"name": "sprites", "n": 200, "sha256": "ab" * 32},
        "results": [
            result("psnr", "PSNR", 56.9, "dB", "higher", interval=interval),
            result("ssim", "SSIM", None, "", "higher", infinite=True),
            result(
                "fid",
                "FID-sprites",
                1.234,
                "",
                "lower",
                features=features,
                notes=["200 items: FID is biased upwards; KID is not"],
            ),
            result("adherence", "adherence: all", 0.975, "", "higher", interval=wilson, details={"attribute": "all"}),
            result("motion", "motion <px>", 3.2, "px/frame", "neither"),
        ],
        "gates": [
            {"gate": "psnr<30", "failed": False, "value": 56.9, "reason": "psnr is 56.9"},
            {"gate": "fid>1", "failed": True, "value": 1.234, "reason": "fid is 1.234"},
        ],
        "notes": ["generated pixels are stored, and compared, as 8-bit"],
        "settings": {"metrics": ["psnr", "fid"], "seed": 0},
        "environment": ENVIRONMENT,
        "samples": [],
        "seconds": {"generate": 410.0, "features": 12.5},
    }


def points(*points: tuple[str, str, float, float]) -> list[Cell]:
    """Cells of (kind, name, speed, PSNR)."""
    plain, pattern = bench_rows(samples=False)[:2]
    rows: list[dict[str, Any]] = [plain]
    for kind, name, speed, psnr in points:
        row = copy.deepcopy(pattern)
        row["arm"] = {"kind": kind, "name": kind if kind == "fewer-steps" else name, "label": name, "options": {}}
        row["speedup"] = {"median": speed, "q1": speed * 0.97, "q3": speed * 1.03}
        row["fidelity"]["psnr"] = {"mean": psnr, "low": psnr - 0.5, "high": psnr + 0.5, "min": psnr - 5}
        rows.append(row)
    return cells(rows)


CURVE = [
    ("fewer-steps", f"fewer steps, {n} steps", s, p) for n, s, p in ((15, 2.0, 50.0), (10, 3.0, 40.0), (5, 6.0, 30.0))
]
