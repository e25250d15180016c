"""GELU put together from vectorized functions, against PyTorch's own."""

import pytest
import torch as th
from torch.nn import functional as F

from sb3_flow.common.activations import FEW_ELEMENTS, TanhGELU, tanh_gelu_

SHAPES = [(3, 5), (2, 32, FEW_ELEMENTS // 64), (FEW_ELEMENTS + 1,)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 3, 100])
def test_like_pytorch(shape, scale):
    x = scale * th.randn(shape, generator=th.Generator().manual_seed(0))
    x.view(-1)[:2] = th.tensor([0.0, -1e4])
    expected = F.gelu(x, approximate="tanh")
    tolerance = dict(rtol=1e-5, atol=1e-6)
    th.testing.assert_close(TanhGELU()(x), expected, **tolerance)
    in_place = x.clone()
    assert tanh_gelu_(in_place) is in_place
    th.testing.assert_close(in_place, expected, **tolerance)

    weights = th.randn(shape, generator=th.Generator().manual_seed(1))
    results, gradients = [], []
    for activation in (TanhGELU(), th.nn.GELU(approximate="tanh")):
        inputs = x.clone().requires_grad_()
        results.append(activation(inputs))
        (results[-1] * weights).sum().backward()
        gradients.append(inputs.grad)
    th.testing.assert_close(*results, **tolerance)
    th.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
