"""
The layers of a flow network, for many points of each observation, with their derivative written by hand.

It is what autograd makes of the modules, in fewer steps and less memory: what points have in common is computed once, the
derivatives of activation functions along with the functions, with which they have most of the work in common, and the rest in
place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from torch import nn

Kinds = Sequence[type[nn.Module]]


def _silu_(x: th.Tensor, wants_derivative: bool) -> th.Tensor | None:
    sigmoid = x.sigmoid()
    x.mul_(sigmoid)
    # s + x s (1 - s)
    return th.lerp(x, x.new_ones(()), sigmoid, out=sigmoid) if wants_derivative else None


def _tanh_(x: th.Tensor, wants_derivative: bool) -> th.Tensor | None:
    x.tanh_()
    return th.addcmul(x.new_ones(()), x, x, value=-1) if wants_derivative else None


def _relu_(x: th.Tensor, wants_derivative: bool) -> th.Tensor | None:
    x.relu_()
    return (x > 0).to(x.dtype) if wants_derivative else None


#: Activation functions that write over their argument, and return their derivative if it is wanted
WITH_DERIVATIVE: dict[type[nn.Module], Callable[[th.Tensor, bool], th.Tensor | None]] = {
    nn.SiLU: _silu_,
    nn.Tanh: _tanh_,
    nn.ReLU: _relu_,
}


def flow_mlp(kinds: Kinds, parameters: Sequence[th.Tensor], features: th.Tensor, x: th.Tensor, times: th.Tensor) -> th.Tensor:
    """
    Output of an MLP of (features, x, features of the time).

    :param kinds: Its activation functions, of ``WITH_DERIVATIVE``
    :param parameters: Weight and bias of each layer, of which there are two at least
    :param features: (batch, features_dim)
    :param x: (batch, n, action_dim), n points for each observation
    :param times: (batch, m, times_dim): those of the first m points, of the next m, ...
    :return: (batch, n, outputs)
    """
    return _FlowMLP.apply(kinds, features, x, times, *parameters)


class _FlowMLP(th.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, kinds: Kinds, features: th.Tensor, x: th.Tensor, times: th.Tensor, *parameters: th.Tensor
    ) -> th.Tensor:
        (batch_size, n, _), n_times = x.shape, times.shape[1]
        wants_derivatives = any(ctx.needs_input_grad)
        (weight, bias), *others = zip(parameters[::2], parameters[1::2], strict=True)
        of_features, of_x, of_times = _split(weight, features, x)
        shared = th.addmm(bias, features, of_features.t()).unsqueeze(1) + times @ of_times.t()
        output = shared.repeat(1, n // n_times, 1).flatten(0, 1).addmm_(x.flatten(0, 1), of_x.t())
        outputs, derivatives = [], []
        for kind, (weight, bias) in zip(kinds, others, strict=True):
            derivatives.append(WITH_DERIVATIVE[kind](output, wants_derivatives))
            outputs.append(output)
            output = th.addmm(bias, output, weight.t())
        if wants_derivatives:
            ctx.kinds = kinds
            ctx.save_for_backward(features, x, times, *parameters, *outputs, *derivatives)
        return output.view(batch_size, n, len(bias))

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> tuple[th.Tensor | None, ...]:  # type: ignore[override]
        n_hidden = len(ctx.kinds)
        inputs, saved = ctx.saved_tensors[: -2 * n_hidden], ctx.saved_tensors[-2 * n_hidden :]
        if th.is_grad_enabled():
            return None, *_differentiable_gradients(ctx, inputs, gradient)
        (features, x, times, *parameters), outputs, derivatives = inputs, saved[:n_hidden], saved[n_hidden:]
        weights = parameters[::2]
        _, needs_features, needs_x, needs_times, *_ = ctx.needs_input_grad

        (batch_size, n, _), n_times = x.shape, times.shape[1]
        gradient = gradient.flatten(0, 1)
        gradients: list[th.Tensor] = []
        for weight, output, derivative in zip(weights[:0:-1], outputs[::-1], derivatives[::-1], strict=True):
            gradients = [gradient.t() @ output, gradient.sum(dim=0), *gradients]
            gradient = (gradient @ weight).mul_(derivative)

        of_features, of_x, of_times = _split(weights[0], features, x)
        shared = gradient.unflatten(0, (batch_size, n // n_times, n_times)).sum(dim=1)
        of_observation = shared.sum(dim=1)
        first = (
            features.t() @ of_observation,
            # (the other way round, these take twice the time)
            x.flatten(0, 1).t() @ gradient,
            times.flatten(0, 1).t() @ shared.flatten(0, 1),
        )
        return (
            None,
            of_observation @ of_features if needs_features else None,
            (gradient @ of_x).view_as(x) if needs_x else None,
            shared @ of_times if needs_times else None,
            th.cat(first).t(),
            of_observation.sum(dim=0),
            *gradients,
        )


def _split(weight: th.Tensor, features: th.Tensor, x: th.Tensor) -> tuple[th.Tensor, ...]:
    """The weights of the first layer for the features, x, and the features of the time."""
    features_dim = features.shape[1]
    return weight.tensor_split([features_dim, features_dim + x.shape[2]], dim=1)


def _differentiable_gradients(ctx: Any, inputs: Sequence[th.Tensor], gradient: th.Tensor) -> list[th.Tensor | None]:
    """The derivative as autograd makes it, whose own derivative is wanted."""
    features, x, times, *parameters = inputs
    n = x.shape[1]
    times = times.repeat(1, n // times.shape[1], 1)
    output = th.cat([features.unsqueeze(1).expand(-1, n, -1), x, times], dim=-1)
    output = nn.functional.linear(output, *parameters[:2])
    for kind, weight, bias in zip(ctx.kinds, parameters[2::2], parameters[3::2], strict=True):
        output = nn.functional.linear(kind()(output), weight, bias)
    wanted = [input for input, needed in zip(inputs, ctx.needs_input_grad[1:], strict=True) if needed]
    gradients = iter(th.autograd.grad(output, wanted, gradient, create_graph=True))
    return [next(gradients) if needed else None for needed in ctx.needs_input_grad[1:]]
