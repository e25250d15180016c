"""
MLPs in as few calls as there can be, all in place: with small batches, a call costs more than what it computes.

This stands in for modules that are called one after the other, where it cannot make a difference: see :class:`PlainMLP` and
:func:`runs_in_place`. All else takes the plain path, which calls the modules. The weights are read in every call.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from operator import attrgetter
from typing import Any, cast

import torch as th
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from sb3_flow.common.activations import ELEMENTWISE, is_transformed
from sb3_flow.common.flow import sampler_grid, standard_normal_std, timestep_range, to_velocity

Activation = Callable[[th.Tensor], th.Tensor]
_shape = attrgetter("shape")
#: Methods that the computation of a module may be made of
METHODS = ("forward", "forward_actor", "forward_critic", "velocity_field")


@cache
def methods_of(kind: type) -> Callable[[type], Any]:
    """
    :param kind: Class of modules
    :return: function that gives what the class has for ``METHODS``, in one call
    """
    return attrgetter(*(name for name in METHODS if hasattr(kind, name)))


#: Modules whose computation is known, with their methods (which somebody may replace)
PLAIN: dict[type, Any] = {kind: methods_of(kind)(kind) for kind in (nn.Linear, nn.Sequential, MlpExtractor, *ELEMENTWISE)}


@cache
def _class_attributes(kind: type) -> frozenset[str]:
    return frozenset(dir(kind))


def hidden_attributes(module: object) -> frozenset[str]:
    """
    :param module: Module (or any other object)
    :return: names of the methods, and whatever its class has, that are hidden by attributes of its own
    """
    kind: Any = type(module)  # (a class is hashable, which mypy does not see of a class of modules)
    return _class_attributes(kind).intersection(module.__dict__)


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """
    :param module: Module
    :return: its hooks, by the numbers that their handles have
    """
    return module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks


def is_plain(module: nn.Module) -> bool:
    """
    :param module: Module
    :return: whether calling it is nothing but the methods of a class whose computation is known. Not if it has hooks, is
        compiled, or is of a subclass, as what is parametrized or quantized is.
    """
    kind: Any = type(module)
    return (
        not th.compiler.is_compiling()
        # (first: not all that can be called has methods)
        and kind in PLAIN
        and PLAIN[kind] == methods_of(kind)(kind)
        # What is there in place of a method, or of a parameter
        and not hidden_attributes(module)
        and module.__dict__.keys().isdisjoint(module._parameters)
        and not any(hooks_of(module))
        and not _has_any_global_hook()
    )


def runs_in_place(*inputs: th.Tensor) -> bool:
    """
    :param inputs: Inputs of a network
    :return: whether they are ordinary, (batch, ...) and of the same precision, and all that is asked for is the numbers that
        come out: no gradients, no trace, no other precision
    """
    first = inputs[0]
    if th.is_grad_enabled() or is_transformed() or first.dtype not in (th.float32, th.float64):
        return False
    for x in inputs:
        if type(x) is not th.Tensor or x.layout is not th.strided or x.dtype is not first.dtype or x.dim() != 2:
            return False
        if x.shape[0] != first.shape[0]:
            return False
    return not th.is_autocast_enabled(first.device.type)


class PlainMLP:
    """
    Modules that are called one after the other: Linear, elementwise, Linear, ..., Linear, all plain.

    :param parents: Modules that they are in
    :param layers: The modules
    """

    def __init__(self, parents: Sequence[nn.Module], layers: Sequence[nn.Module]):
        linears, functions = layers[::2], layers[1::2]
        self.weights, self.biases = (
            [cast(nn.Parameter, linear._parameters[name]) for linear in linears] for name in ("weight", "bias")
        )
        #: They write over their argument
        self.activations = [ELEMENTWISE[type(function)] or partial(_overwrite, function) for function in functions]
        # What tells whether anything has changed, to be compared in few calls too
        self._modules = [*parents, *layers]
        self._hooks = [hooks for module in self._modules for hooks in hooks_of(module)]
        self._methods = [(kind, methods_of(kind)) for kind in {*map(type, self._modules)}]
        self._attributes = [module.__dict__ for module in self._modules]
        self._children = [module._modules for module in parents]
        self._parameters = [linear._parameters for linear in linears]
        self._state = self._get_state()

    @staticmethod
    def find(parts: Sequence[nn.Module], dtype: th.dtype, parents: Sequence[nn.Module] = ()) -> "PlainMLP | None":
        """
        :param parts: Layers, and sequences of layers, that are called one after the other
        :param dtype: Precision of the input
        :param parents: Modules that they are in
        :return: None if they are not such an MLP, in this precision
        """
        layers: list[nn.Module] = []
        for part in parts:
            layers.extend(part.children() if type(part) is nn.Sequential else [part])
        linears, functions = layers[::2], layers[1::2]
        if len(linears) == len(functions) or not all(map(is_plain, [*parents, *parts, *layers])):
            return None
        if any(type(linear) is not nn.Linear for linear in linears) or any(type(fn) not in ELEMENTWISE for fn in functions):
            return None
        for linear in linears:
            for parameter in (linear._parameters.get("weight"), linear._parameters.get("bias")):
                if type(parameter) is not nn.Parameter or parameter.dtype is not dtype or parameter.layout is not th.strided:
                    return None
        return PlainMLP([*parents, *(part for part in parts if type(part) is nn.Sequential)], layers)

    def _get_state(self) -> tuple[list, ...]:
        parameters = [*itertools.chain.from_iterable([parameters.values() for parameters in self._parameters])]
        return (
            [*map(type, self._modules)],
            [get(kind) for kind, get in self._methods],
            # One more if one of them hides something else
            [*map(len, self._attributes)],
            [*itertools.chain.from_iterable([children.values() for children in self._children])],
            [*map(id, parameters)],
            [None if parameter is None else parameter.dtype for parameter in parameters],
        )

    def has_changed(self) -> bool:
        """:return: whether it is not what it was when it was found, but for the values of its parameters"""
        return any(self._hooks) or _has_any_global_hook() or self._get_state() != self._state

    def __call__(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: (batch, inputs)
        :return: (batch, outputs)
        """
        x = nn.functional.linear(x, self.weights[0], self.biases[0])
        for activation, weight, bias in zip(self.activations, self.weights[1:], self.biases[1:], strict=True):
            x = nn.functional.linear(activation(x), weight, bias)
        return x


def _overwrite(function: Activation, x: th.Tensor) -> th.Tensor:
    return x.copy_(function(x))


class Memory(dict):
    """What a module keeps for the next call. It is not copied or saved with the module."""

    def __reduce__(self) -> tuple:
        return Memory, ()


class EulerIntegrator:
    """
    Euler's method from noise to actions for an MLP of (features, x, features of the time), and memory to work in: what it
    makes of the weights, it makes anew in each call.

    The velocity is affine in x and in the output of the MLP: a step is x <- beta x + alpha output, and the last layer adds its
    output to x by itself. A column is one of the batch: products with few outputs, as those of actions, are faster this way.
    And so are biases that are a column of the weights, of inputs that are always one: there is a row of ones behind the inputs
    of each layer.

    :param mlp: The MLP, of at least two layers
    :param times: Features of the times of the steps, (n_flow_steps, times_dim)
    :param scales: alpha and beta of each step
    :param batch_size: Number of columns
    :param with_noise: Whether noise is added after each step
    """

    def __init__(
        self, mlp: PlainMLP, times: th.Tensor, scales: list[tuple[float, float]], batch_size: int, with_noise: bool = False
    ):
        self.mlp = mlp
        *hidden, action_dim = (len(bias) for bias in mlp.biases)
        n_steps, times_dim = times.shape
        n_inputs = action_dim + times_dim
        # Views, see has_changed()
        self.weight_features, weight = mlp.weights[0].detach().tensor_split([-n_inputs], dim=1)
        self.from_features = times.new_empty(hidden[0], batch_size)

        # Copies of the weights with their biases, and of the last ones times alpha, which may be the same for all steps
        weights = [weight, *mlp.weights[1:]]
        copies = [times.new_empty(weight.shape[0], weight.shape[1] + 1) for weight in weights]
        self.copies = [view for copy in copies for view in (copy[:, :-1], copy[:, -1])]
        self.parameters = [parameter for layer in zip(weights, mlp.biases, strict=True) for parameter in layer]
        self._layout = self._get_layout()
        first, *others, self.last = copies
        alphas = times.new_tensor([alpha for alpha, _ in scales])
        self.alphas = alphas.view(-1, 1, 1)[: 1 if (alphas == alphas[0]).all() else n_steps]
        self.scaled_last = self.alphas * self.last
        lasts = self.scaled_last.expand(n_steps, -1, -1).unbind()

        # The inputs of each step, (x, features of the time, one), in which only x changes, and the x that it leads to
        inputs = times.new_ones(n_steps, n_inputs + 1, batch_size)
        inputs[:, action_dim:-1] = times.unsqueeze(-1)
        self.x, *next_xs = *(step[:action_dim] for step in inputs), times.new_empty(action_dim, batch_size)
        self.states, self.result = (self.x, *next_xs), next_xs[-1]
        self.step_noise = times.new_empty(n_steps if with_noise else 0, action_dim, batch_size)
        outputs_and_one = [times.new_ones(size + 1, batch_size) for size in hidden]
        outputs = [output[:-1] for output in outputs_and_one]

        # All are about the same memory
        self.calls: list[Callable[[], Any]] = []
        x = self.x
        noises = self.step_noise if with_noise else [None] * n_steps
        for step, last, (_, beta), next_x, noise in zip(inputs, lasts, scales, next_xs, noises, strict=True):
            self.calls.append(partial(th.addmm, self.from_features, first, step, out=outputs[0]))
            self.calls.append(partial(mlp.activations[0], outputs[0]))
            for index, weight in enumerate(others):
                self.calls.append(partial(th.mm, weight, outputs_and_one[index], out=outputs[index + 1]))
                self.calls.append(partial(mlp.activations[index + 1], outputs[index + 1]))
            self.calls.append(partial(th.addmm, x, last, outputs_and_one[-1], beta=beta, out=next_x))
            if noise is not None:
                self.calls.append(partial(next_x.add_, noise))
            x = next_x

    def has_changed(self) -> bool:
        """:return: whether it must be made again"""
        return self.mlp.has_changed() or self._get_layout() != self._layout

    def _get_layout(self) -> list:
        """What views of the first weights and memory to work in depend on, which may change behind the parameters."""
        first, *others = self.mlp.weights
        return [first.data_ptr(), first.stride(), *map(_shape, (first, *others, *self.mlp.biases))]

    def __call__(self, features: th.Tensor, noise: th.Tensor, step_noise: th.Tensor | None = None) -> th.Tensor:
        """
        :param features: (batch, features_dim)
        :param noise: (batch, action_dim)
        :param step_noise: What is added after each step, (n_flow_steps, batch, action_dim)
        :return: (batch, action_dim), overwritten by the next call, as ``states``, (action_dim, batch) each
        """
        if step_noise is not None:
            self.step_noise.copy_(step_noise.mT)
        th._foreach_copy_(self.copies, self.parameters)
        th.mul(self.alphas, self.last, out=self.scaled_last)
        th.mm(self.weight_features, features.t(), out=self.from_features)
        self.x.copy_(noise.t())
        for call in self.calls:
            call()
        return self.result.t()


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
