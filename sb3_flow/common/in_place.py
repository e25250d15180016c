"""
MLPs without gradients, in as few calls as there can be, all in place: with small batches, a call costs more than what it
computes. The plain twin of the integration is the sampler "euler" with ``FlowNetwork.velocity_field``.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch as th
from torch import nn

from sb3_flow.common.activations import TanhGELU, tanh_gelu_
from sb3_flow.common.flow import sampler_grid, standard_normal_std, timestep_range, to_velocity

if TYPE_CHECKING:
    from sb3_flow.common.networks import FlowNetwork

Activation = Callable[[th.Tensor], th.Tensor]
IN_PLACE: dict[type[nn.Module], Activation] = {
    nn.SiLU: lambda x: nn.functional.silu(x, True),
    nn.ReLU: th.relu_,
    nn.Tanh: th.tanh_,
    nn.Identity: lambda x: x,
    TanhGELU: tanh_gelu_,
}


def in_place(activation: nn.Module) -> Activation:
    """
    :param activation: Activation function
    :return: the same function, which writes its result over its argument
    """
    return IN_PLACE.get(type(activation), lambda x: x.copy_(activation(x)))


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
    with few outputs, as those of actions, are faster this way. And so are biases that are a column of the weights, of inputs
    that are always one: behind the outputs of each layer there is a row of ones. The first layer is given in the call.

    :param modules: Activation function (of the first layer), Linear, activation function, ...
    """

    def __init__(self, modules: Iterable[nn.Module]):
        modules = list(modules)
        self.activations = [in_place(activation) for activation in modules[::2]]
        self.weights = [weight_and_bias(cast(nn.Linear, linear)) for linear in modules[1::2]]
        self._outputs: list[th.Tensor] = []

    def __call__(self, bias: th.Tensor, weight: th.Tensor, x: th.Tensor) -> th.Tensor:
        """
        :param bias: Bias of the first layer, (outputs, batch) or (outputs, 1)
        :param weight: Its weights, (outputs, inputs)
        :param x: (inputs, batch)
        :return: (outputs + 1, batch), overwritten by the next call
        """
        if not self._outputs or self._outputs[0].shape[1] != x.shape[1]:
            self._outputs = [x.new_ones(len(w) + 1, x.shape[1]) for w in (weight, *self.weights)]
            self._without_ones = [output[:-1] for output in self._outputs]
        th.addmm(bias, weight, x, out=self._without_ones[0])
        self.activations[0](self._without_ones[0])
        for layer, (weight, activation) in enumerate(zip(self.weights, self.activations[1:], strict=True)):
            activation(th.mm(weight, self._outputs[layer], out=self._without_ones[layer + 1]))
        return self._outputs[-1]


def weight_and_bias(linear: nn.Linear) -> th.Tensor:
    """
    :param linear: Linear layer
    :return: its weights with its bias as the last column, (outputs, inputs + 1)
    """
    return th.cat([linear.weight, linear.bias.unsqueeze(1)], dim=1)


class EulerIntegrator:
    """
    Euler's method from noise to actions for a flow network, as it is: it does not follow its weights.

    The velocity is affine in x and in the output of the network: a step is x <- beta x + alpha output, and the last layer
    adds its output to x by itself.

    :param network: The flow network, with at least one hidden layer
    :param n_flow_steps: Number of steps
    """

    def __init__(self, network: "FlowNetwork", n_flow_steps: int):
        times, scales = euler_coefficients(
            network.prediction_type, n_flow_steps, network.output_scale, network.skip_connection
        )
        *hidden, last = network.layers
        assert isinstance(last, nn.Linear)
        weight, first_action = network.input_layer.weight, network.features_dim
        self.weight_features, weight_x, weight_times = (
            part.contiguous() for part in weight.tensor_split([first_action, first_action + network.action_dim], dim=1)
        )
        # What the first layer gets besides features and x, behind the weights of x
        biases = network.input_layer.bias + network.timestep_embedding(weight.new_tensor(times)) @ weight_times.t()
        self.hidden_layers = InPlaceMLP(hidden)
        self.steps = [
            (th.cat([weight_x, bias.unsqueeze(1)], dim=1), alpha * weight_and_bias(last), beta)
            for bias, (alpha, beta) in zip(biases, scales, strict=True)
        ]

    def __call__(self, features: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        :param features: (batch, features_dim)
        :param noise: (batch, action_dim)
        :return: (batch, action_dim)
        """
        from_features = self.weight_features @ features.t()
        x_and_one = features.new_ones(noise.shape[1] + 1, len(noise))
        x = x_and_one[:-1].copy_(noise.t())
        for first_weight, last_weight, beta in self.steps:
            hidden = self.hidden_layers(from_features, first_weight, x_and_one)
            if beta != 1.0:
                x.mul_(beta)
            x.addmm_(last_weight, hidden)
        return x.t()


@lru_cache
def euler_coefficients(
    prediction_type: str, n_flow_steps: int, output_scale: float, skip_connection: bool
) -> tuple[list[float], list[tuple[float, float]]]:
    """
    :param prediction_type: What a network predicts
    :param n_flow_steps: Number of steps
    :param output_scale: Factor on the output of the network
    :param skip_connection: Whether it has a skip connection
    :return: the times that Euler's method visits, and alpha and beta of each step, see :class:`EulerIntegrator`
    """
    earliest, latest = timestep_range(prediction_type)
    times = [min(max(t, earliest), latest) for t in sampler_grid(n_flow_steps)]
    one, zero = th.ones((), dtype=th.float64), th.zeros((), dtype=th.float64)
    scales = []
    for t, clipped in zip(sampler_grid(n_flow_steps), times, strict=True):
        # velocity = to_velocity(1, 0) output_of_the_layers + to_velocity(0, 1) x, or, with a skip connection, in place of the
        # second the flow of a standard normal distribution, which is integrated exactly
        alpha = -output_scale * float(to_velocity(one, zero, clipped, prediction_type)) / n_flow_steps
        beta = 1.0 - float(to_velocity(zero, one, clipped, prediction_type)) / n_flow_steps
        if skip_connection:
            beta = standard_normal_std(t - 1 / n_flow_steps) / standard_normal_std(t)
            alpha *= beta
        scales.append((alpha, beta))
    return times, scales
