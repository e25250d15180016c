"""
MLPs without gradients, in as few calls as there can be, all in place: with small batches, a call costs more than what it
computes. The plain twin of the integration is the sampler "euler" with ``FlowNetwork.velocity_field``.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch as th
from torch import nn

from sb3_flow.common.flow import sampler_grid, timestep_range, to_velocity

if TYPE_CHECKING:
    from sb3_flow.common.networks import FlowNetwork

Activation = Callable[[th.Tensor], th.Tensor]
# Activation functions that write their result over their argument. Others are called as they are.
IN_PLACE: dict[type[nn.Module], Activation] = {
    nn.SiLU: lambda x: nn.functional.silu(x, True),
    nn.ReLU: th.relu_,
    nn.Tanh: th.tanh_,
}


def in_place(activation: nn.Module) -> Activation:
    """
    :param activation: Activation function
    :return: the same function, which may write its result over its argument
    """
    if isinstance(activation, nn.GELU):
        return partial(th.ops.aten.gelu_, approximate=activation.approximate)
    return IN_PLACE.get(type(activation), activation)


class Prepared:
    """
    What is made of the weights of a module, once for as long as they do not change.

    Changes that autograd does not see (``weight.data.add_(...)``) are not seen here either, until :meth:`clear`.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget it."""
        self._parameters: list[nn.Parameter] = []
        self._key: Any = None

    def get(self, make: Callable[..., Any], modules: tuple[nn.Module, ...], *args: Any) -> Any:
        """
        :param make: function of the modules and the other arguments
        :param modules: whose weights it depends on
        :param args: other arguments
        :return: what the function returns, or returned before
        """
        key = (args, [(parameter._version, parameter.data_ptr()) for parameter in self._parameters])
        if self._key != key:
            self._parameters = [parameter for module in modules for parameter in module.parameters()]
            self._value = make(*modules, *args)
            self._key = (args, [(parameter._version, parameter.data_ptr()) for parameter in self._parameters])
        return self._value

    def __deepcopy__(self, memo: dict) -> "Prepared":
        return Prepared()

    def __reduce__(self) -> tuple:
        return Prepared, ()


class InPlaceMLP:
    """
    An MLP as it is: it does not follow its weights. A column of its input, and of its output, is one of the batch: products
    with few outputs, as those of actions, are faster this way.

    :param modules: Linear, activation function, Linear, ...
    """

    def __init__(self, modules: Iterable[Any]):
        modules = list(modules)
        if len(modules) % 2 == 1:
            modules.append(nn.Identity())
        self.layers = [
            (linear.bias.unsqueeze(1), linear.weight, in_place(activation))
            for linear, activation in zip(modules[::2], modules[1::2], strict=True)
        ]
        self._buffers: list[th.Tensor] = []

    def with_buffers(self, batch_size: int) -> list[tuple[th.Tensor, th.Tensor, th.Tensor, Activation]]:
        """
        :param batch_size: Number of inputs
        :return: bias, weight, memory for the output (the same in every call) and activation of each layer
        """
        if not self._buffers or self._buffers[0].shape[1] != batch_size:
            self._buffers = [weight.new_empty(len(weight), batch_size) for _, weight, _ in self.layers]
        return [(*layer[:2], buffer, layer[2]) for layer, buffer in zip(self.layers, self._buffers, strict=True)]

    def __call__(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: (inputs, batch)
        :return: (outputs, batch), overwritten by the next call
        """
        for bias, weight, buffer, activation in self.with_buffers(x.shape[1]):
            x = activation(th.addmm(bias, weight, x, out=buffer))
        return x


class EulerIntegrator:
    """
    Euler's method from noise to actions for a flow network, as it is: it does not follow its weights.

    The velocity is affine in x and in the output of the last layer, W h + b. So a step is x <- beta x + alpha (W h + b),
    one product, and what the biases b add up to is known beforehand: x = y + shift b, with y <- beta y + alpha W h.

    :param network: The flow network, with at least one hidden layer
    :param prediction_type: What it predicts: "velocity", "noise" or "action"
    :param n_flow_steps: Number of steps
    """

    def __init__(self, network: "FlowNetwork", prediction_type: str, n_flow_steps: int):
        times, scales, shifts = euler_coefficients(prediction_type, n_flow_steps, network.output_scale)
        activation, *hidden, last = network.layers
        assert isinstance(last, nn.Linear)
        weight, first_action = network.input_layer.weight, network.features_dim
        self.weight_features, weight_x, weight_times = (
            part.contiguous() for part in weight.tensor_split([first_action, first_action + network.action_dim], dim=1)
        )
        shift = weight.new_tensor(shifts)
        # What the first layer gets besides features and y
        embedding = network.timestep_embedding(weight.new_tensor(times))
        biases = network.input_layer.bias + embedding @ weight_times.t() + th.outer(shift[:-1], weight_x @ last.bias)
        self.activation, self.layers = in_place(activation), InPlaceMLP(hidden)
        # Behind the weights of y, as if a number of it were always one
        self.steps = [
            (th.cat([weight_x, bias.unsqueeze(1)], dim=1), alpha * last.weight, beta)
            for bias, (alpha, beta) in zip(biases, scales, strict=True)
        ]
        self.last_shift = (shift[-1] * last.bias).unsqueeze(1)

    def __call__(self, features: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        :param features: (batch, features_dim)
        :param noise: (batch, action_dim)
        :return: (batch, action_dim)
        """
        activation, addmm, layers = self.activation, th.addmm, self.layers.with_buffers(len(features))
        from_features = self.weight_features @ features.t()
        first = th.empty_like(from_features)
        y_and_one = features.new_ones(noise.shape[1] + 1, len(noise))
        y = y_and_one[:-1].copy_(noise.t())
        for first_weight, last_weight, beta in self.steps:
            h = activation(addmm(from_features, first_weight, y_and_one, out=first))
            for bias, weight, buffer, following in layers:
                h = following(addmm(bias, weight, h, out=buffer))
            if beta != 1.0:
                y.mul_(beta)
            y.addmm_(last_weight, h)
        return y.add_(self.last_shift).t()


@lru_cache
def euler_coefficients(
    prediction_type: str, n_flow_steps: int, output_scale: float
) -> tuple[list[float], list[tuple[float, float]], list[float]]:
    """
    :param prediction_type: What a network predicts
    :param n_flow_steps: Number of steps
    :param output_scale: Factor on the output of the network
    :return: the times that Euler's method visits, alpha and beta of each step, and the shift before each of them and
        after the last one, see :class:`EulerIntegrator`
    """
    earliest, latest = timestep_range(prediction_type)
    times = [min(max(t, earliest), latest) for t in sampler_grid(n_flow_steps)]
    one, zero = th.ones((), dtype=th.float64), th.zeros((), dtype=th.float64)
    scales, shifts = [], [0.0]
    for t in times:
        # velocity = to_velocity(1, 0) output + to_velocity(0, 1) x
        alpha = -output_scale * float(to_velocity(one, zero, t, prediction_type)) / n_flow_steps
        beta = 1.0 - float(to_velocity(zero, one, t, prediction_type)) / n_flow_steps
        scales.append((alpha, beta))
        shifts.append(beta * shifts[-1] + alpha)
    return times, scales, shifts
