"""
Activation functions: those known to be elementwise, and GELU as FQL's networks have it: on a CPU, PyTorch's own takes up to a
third of the time of an update.
"""

from collections.abc import Callable

import torch as th
from torch import nn
from torch.autograd import forward_ad

# GELU with the tanh approximation is x p, with p = 1 / (1 + exp(-u)) and u = SLOPE (x + CUBIC x³)
SLOPE = 2 * (2 / th.pi) ** 0.5
CUBIC = 0.044715
# Below this number of elements, calls cost more than what they compute
FEW_ELEMENTS = 4096


class TanhGELU(nn.GELU):
    """
    GELU with the tanh approximation, the activation function of FQL's networks (and the default of JAX).

    On a CPU, where PyTorch's own is slow, it is put together from vectorized functions, and its derivative
    is computed along with it. (A second derivative needs ``nn.GELU``.)
    """

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, input: th.Tensor) -> th.Tensor:
        if not _is_faster(input):
            return super().forward(input)
        if input.requires_grad and th.is_grad_enabled():
            return _WithDerivative.apply(input)
        return _tanh_gelu(input)


def tanh_gelu_(x: th.Tensor) -> th.Tensor:
    """
    GELU with the tanh approximation, without derivatives.

    :param x: overwritten with the result
    :return: x
    """
    # (PyTorch has no public name for it, and no type)
    return _tanh_gelu(x, out=x) if _is_faster(x) else th._C._nn.gelu_(x, approximate="tanh")  # type: ignore[attr-defined]


def _is_faster(x: th.Tensor) -> bool:
    return (
        # (first, as sizes may be symbols then)
        not th.compiler.is_compiling()
        and x.numel() >= FEW_ELEMENTS
        and x.device.type == "cpu"
        # Narrower ones overflow in between
        and x.dtype in (th.float32, th.float64)
        and type(x) in (th.Tensor, nn.Parameter)
        and not is_transformed()
    )


def is_transformed() -> bool:
    """
    :return: whether PyTorch does something else with operations than to compute them: it traces, compiles or captures them,
        there is a function transform (``vmap``, ``jvp``, ...), forward-mode differentiation, or a mode that overrides them
    """
    return (
        th.compiler.is_compiling()
        or th.jit.is_tracing()
        or th._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or th._C._len_torch_function_stack() > 0
        or th._C._len_torch_dispatch_stack() > 0
        or (th.cuda.is_initialized() and th.cuda.is_current_stream_capturing())
    )


def _tanh_gelu(x: th.Tensor, out: th.Tensor | None = None) -> th.Tensor:
    square = x.square()
    denominator = _one_plus_exp_minus_u(square, x, out=square)
    return th.div(x, denominator, out=denominator if out is None else out)


def _one_plus_exp_minus_u(square: th.Tensor, x: th.Tensor, out: th.Tensor | None = None) -> th.Tensor:
    return th.addcmul(x, square, x, value=CUBIC, out=out).mul_(-SLOPE).exp_().add_(1.0)


class _WithDerivative(th.autograd.Function):
    @staticmethod
    def forward(ctx, x: th.Tensor) -> th.Tensor:  # type: ignore[override]
        square = x.square()
        p = _one_plus_exp_minus_u(square, x).reciprocal_()
        result = x * p
        # p + x p (1 - p) du/dx
        derivative = square.mul_(3 * CUBIC * SLOPE).add_(SLOPE).mul_(result)
        ctx.save_for_backward(derivative.addcmul_(derivative, p, value=-1.0).add_(p))
        return result

    @staticmethod
    @th.autograd.function.once_differentiable
    def backward(ctx, grad_output: th.Tensor) -> th.Tensor:  # type: ignore[override]
        return grad_output * ctx.saved_tensors[0]


#: Activation functions whose outputs depend on one element of the input and on nothing else (no units together, no parameters,
#: no chance), whatever their arguments, with what writes the result over the input where there is such a function.
ELEMENTWISE: dict[type[nn.Module], Callable[[th.Tensor], th.Tensor] | None] = {
    nn.SiLU: th._C._nn.silu_,
    nn.ReLU: th.relu_,
    nn.Tanh: th.tanh_,
    nn.Sigmoid: th.sigmoid_,
    nn.Identity: lambda x: x,
    TanhGELU: tanh_gelu_,
    **dict.fromkeys(
        (
            nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
            nn.Mish, nn.ReLU6, nn.SELU, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanhshrink, nn.Threshold,
        )
    ),
}  # fmt: skip
