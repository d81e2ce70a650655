"""Operations counted against the formulas of the layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffeff.eval.bench.flops import counting_flops
from diffeff.kernels.int8_linear import int8_linear, kernels_on, pack, quantise_weight


class Quantised(nn.Module):
    """A linear layer 32 -> 48 through one int8 kernel."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = kernel
        self.weight, self.scale = quantise_weight(torch.randn(48, 32))
        self.packed = pack(kernel, self.weight, self.scale, None)

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.scale, kernel=self.kernel, packed=self.packed)


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k)


def test_layers_and_attention() -> None:
    linear, convolution = nn.Linear(8, 16), nn.Conv2d(3, 6, 3, padding=1)
    attention = Attention()
    with torch.no_grad(), counting_flops([linear, convolution, attention]) as flops:
        linear(torch.randn(2, 5, 8))
        assert flops.count == 2 * 10 * 8 * 16
        before = flops.count
        convolution(torch.randn(1, 3, 7, 9))
        assert flops.count - before == 2 * 7 * 9 * 6 * 3 * 9
        before = flops.count
        attention(torch.randn(1, 2, 10, 8), torch.randn(1, 2, 20, 8))
        assert flops.count - before == 2 * 2 * 2 * 10 * 20 * 8


@pytest.mark.parametrize("kernel", [k for k in kernels_on(torch.device("cpu")) if k != "reference"])
def test_int8_products_count_like_float_ones(kernel: str) -> None:
    layer = Quantised(kernel)
    layer(torch.randn(20, 32))  # a kernel's first call may try its engine out
    with torch.no_grad(), counting_flops([layer]) as flops:
        layer(torch.randn(20, 32))
    assert flops.count == 2 * 20 * 32 * 48


def test_a_stand_in_whose_kernel_bypasses_the_dispatcher_counts_once() -> None:
    class Launched(nn.Module):
        """Like a Triton kernel: torch sees no product."""

        in_features, out_features = 8, 4

        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy() @ np.ones((8, 4), np.float32))

    class Wrapper(nn.Module):
        """Like a LoRA layer: it has features, and so has the layer it wraps."""

        def __init__(self) -> None:
            super().__init__()
            self.base, self.in_features, self.out_features = nn.Linear(8, 4), 8, 4

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x)  # type: ignore[no-any-return]

    model = nn.ModuleList([Launched(), Wrapper()])
    outer = nn.Sequential(*model)
    for layer in model:
        with torch.no_grad(), counting_flops([layer, outer]) as flops:
            layer(torch.ones(3, 8))
        assert flops.count == 2 * 3 * 8 * 4
    assert not any(layer._forward_hooks for layer in outer.modules())


def test_only_the_named_modules_count_and_hooks_come_off() -> None:
    inside, outside = nn.Linear(4, 4), nn.Linear(400, 400)
    with counting_flops([inside]) as flops:
        outside(torch.randn(1, 400))
        inside(torch.randn(1, 4))
        with pytest.raises(RuntimeError):
            inside(torch.randn(1, 5))
        inside(torch.randn(1, 4))
    assert flops.count == 2 * 2 * 16
    assert not inside._forward_hooks
    assert not inside._forward_pre_hooks
