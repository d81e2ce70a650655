"""int8_linear: every kernel against float64 within stated bounds, awkward shapes, bad numbers, layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffeff.kernels import int8_linear as op
from diffeff.kernels.int8_linear import cpu

CPU = torch.device("cpu")
ON_CPU = ("int_mm", "aten_dynamic", "dequantise", "reference")
# Relative Frobenius error of one layer on Gaussian data, K = 640. 7-bit activations where the chip needs them.
BOUND = {"int_mm": 0.012, "reference": 0.012, "dequantise": 0.008, "aten_dynamic": 0.025}
SHAPES = [(1, 1, 1), (1, 8, 8), (7, 63, 65), (17, 500, 60), (33, 60, 500), (0, 8, 8)]


def layer(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) / max(k, 1) ** 0.5
    return weight.to(dtype), torch.randn(n, generator=generator).to(dtype)


def tokens(m: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("kernel", ON_CPU)
def test_error_on_gaussian_data_is_within_its_bound(kernel: str) -> None:
    weight, _ = layer(320, 640)
    x = tokens(128, 640)
    y = op.int8_linear(x, *op.quantise_weight(weight), kernel=kernel)
    assert relative(y, x.double() @ weight.double().T) < BOUND[kernel]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", ON_CPU)
def test_awkward_shapes_and_dtypes(kernel: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    weight, bias = layer(n, k, dtype)
    x = tokens(m, k, dtype)
    y = op.int8_linear(x, *op.quantise_weight(weight), bias, kernel=kernel)
    assert y.dtype is dtype
    assert y.shape == (m, n)
    exact = x.double() @ weight.double().T + bias.double()
    assert torch.allclose(y.double(), exact, rtol=0.05, atol=0.08)


@pytest.mark.parametrize("shape", SHAPES)
def test_int_mm_is_the_reference_up_to_float_rounding(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    weight, bias = layer(n, k)
    q, s = op.quantise_weight(weight)
    x = tokens(m, k)
    assert torch.allclose(op.int8_linear(x, q, s, bias), op.reference(x, q, s, bias), rtol=0, atol=2e-6)


def test_weights_on_the_grid_are_exact_and_one_scale_serves_each_channel() -> None:
    grid = torch.randint(-127, 128, (5, 12)).float()
    grid[:, 0] = 127
    weight = grid * torch.tensor([1e-3, 1.0, 50.0, 0.25, 7.0])[:, None]
    q, s = op.quantise_weight(weight)
    assert torch.equal(q.float(), grid)
    assert torch.allclose(op.dequantise(q, s, torch.float32), weight, rtol=1e-6)


def test_rounding_error_is_at_most_half_a_step() -> None:
    weight, _ = layer(40, 100)
    q, s = op.quantise_weight(weight)
    assert ((op.dequantise(q, s, torch.float64) - weight.double()).abs() <= 0.5001 * s[:, None]).all()
    assert int(q.abs().max()) == 127


def test_tokens_do_not_disturb_each_other() -> None:
    weight, bias = layer(16, 24)
    q, s = op.quantise_weight(weight)
    x = tokens(6, 24)
    alone = torch.cat([op.int8_linear(row[None], q, s, bias) for row in x])
    loud = x.clone()
    loud[0] *= 1e4
    assert torch.allclose(op.int8_linear(x, q, s, bias), alone, atol=1e-6)
    assert torch.allclose(op.int8_linear(loud, q, s, bias)[1:], alone[1:], atol=1e-6)


def test_zero_rows_and_zero_channels() -> None:
    weight, bias = layer(8, 16)
    weight[3] = 0
    x = tokens(4, 16)
    x[2] = 0
    y = op.int8_linear(x, *op.quantise_weight(weight), bias)
    assert torch.equal(y[2], bias)
    assert torch.equal(y[:, 3], bias[3].expand(4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_numbers_show(bad: float) -> None:
    weight, bias = layer(8, 16)
    x = tokens(3, 16)
    x[1, 5] = bad
    y = op.int8_linear(x, *op.quantise_weight(weight), bias)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


def test_any_layout_of_the_input() -> None:
    weight, bias = layer(8, 16)
    q, s = op.quantise_weight(weight)
    x = tokens(10, 32)[:, ::2].t().contiguous().t()
    assert torch.equal(op.int8_linear(x, q, s, bias), op.int8_linear(x.contiguous(), q, s, bias))
    assert op.int8_linear(x.reshape(2, 5, 16), q, s).shape == (2, 5, 8)


def test_weight_only_is_differentiable_in_its_input() -> None:
    weight, bias = layer(8, 16)
    q, s = op.quantise_weight(weight)
    x = tokens(3, 16).requires_grad_()
    op.int8_linear(x, q, s, bias, kernel="dequantise").sum().backward()
    assert torch.allclose(x.grad, op.dequantise(q, s, torch.float32).sum(0).expand(3, 16), atol=1e-6)


def test_the_engine_of_the_process_is_left_as_it_was() -> None:
    before = torch.backends.quantized.engine
    weight, bias = layer(8, 16)
    op.pack("aten_dynamic", *op.quantise_weight(weight), bias)
    assert torch.backends.quantized.engine == before


def test_signed_onednn_is_never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    weight, bias = layer(16, 16)
    q, s = op.quantise_weight(weight)
    packed = op.pack("aten_dynamic", q, s, bias)
    with Spy():
        for kernel in ON_CPU:
            op.int8_linear(tokens(4, 16), q, s, bias, kernel=kernel, packed=packed)
    assert any("_int_mm" in name for name in seen)
    assert not any("onednn" in name for name in seen)


def test_cuda_padding_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes that cuBLASLt refuses, with its checks imitated on the CPU."""

    plain = torch._int_mm

    def strict(a: Tensor, b: Tensor) -> Tensor:
        if a.shape[0] <= 16 or a.shape[1] % 8 or b.shape[1] % 8:
            raise RuntimeError("shape")
        return plain(a, b)

    monkeypatch.setattr(torch, "_int_mm", strict)
    for m, k, n in ((1, 8, 8), (16, 9, 8), (17, 8, 15), (5, 3, 2), (40, 16, 24)):
        a = torch.randint(-127, 128, (m, k), dtype=torch.int8)
        b = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        assert torch.equal(cpu._product_cuda(a, b), a.int() @ b.int().T)


def test_unknown_and_unavailable_kernels_are_refused() -> None:
    weight, _ = layer(8, 16)
    q, s = op.quantise_weight(weight)
    with pytest.raises(ValueError, match="known: int_mm"):
        op.int8_linear(tokens(2, 16), q, s, kernel="magic")
    with pytest.raises(RuntimeError, match="aten_dynamic"):
        op.int8_linear(torch.empty(2, 16, device="meta"), q, s, kernel="aten_dynamic")
    with pytest.raises(ValueError, match="matrices"):
        op.quantise_weight(torch.zeros(3))
    assert op.kernels_on(torch.device("meta")) == ("dequantise",)
