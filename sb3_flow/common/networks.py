"""Networks: the timestep embedding, the network that a flow is made of, ensembles of critics, the image encoder."""

import itertools
import math
from typing import cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from torch import nn

from sb3_flow.common.activations import ELEMENTWISE, TanhGELU
from sb3_flow.common.checks import to_float, to_int
from sb3_flow.common.flow import sampler_grid, standard_normal_flow, standard_normal_std, timestep_range, to_velocity
from sb3_flow.common.in_place import (
    PLAIN,
    EulerIntegrator,
    Memory,
    PlainMLP,
    euler_coefficients,
    is_plain,
    methods_of,
    runs_in_place,
)
from sb3_flow.common.samplers import Sigma, VelocityField, integrate, unit_variance_field

#: That of Flax
LAYER_NORM_EPS = 1e-6
# Memory to work in is not kept for the next call beyond this: then it is large, and made in a small part of the time
LARGEST_KEPT_BATCH = 4096


class TimestepEmbedding(nn.Module):
    """
    Fourier features of the time: cos and sin of t times 1, 2, 4, ... (authors' code of FPO).

    :param embedding_dim: Number of features, even. 0 gives the time itself, as one feature (FQL).
    """

    def __init__(self, embedding_dim: int = 8):
        super().__init__()
        embedding_dim = to_int("timestep_embedding_dim", embedding_dim)
        if embedding_dim < 0 or embedding_dim % 2 != 0:
            raise ValueError(f"`timestep_embedding_dim` must be even and not negative, it is {embedding_dim}")
        self.embedding_dim = embedding_dim
        self.features_dim = embedding_dim or 1

    def forward(self, timesteps: th.Tensor) -> th.Tensor:
        """
        :param timesteps: (...,)
        :return: (..., features_dim)
        """
        timesteps = timesteps.unsqueeze(-1)
        if self.embedding_dim == 0:
            return timesteps
        angles = timesteps * 2.0 ** th.arange(self.embedding_dim // 2, dtype=timesteps.dtype, device=timesteps.device)
        return th.cat([angles.cos(), angles.sin()], dim=-1)


class FlowNetwork(nn.Module):
    """
    MLP of (features of the observation, x_t, timestep) whose output is the velocity, the noise or the action.

    Its first layer is linear in the concatenation of its three inputs, so what the features contribute to it
    is computed once for all the points that share an observation (:meth:`forward`, :meth:`velocity_field`).
    :meth:`forward_plain` is the same function, written plainly.

    :param features_dim: Number of features of the observation
    :param action_dim: Number of action dimensions
    :param net_arch: Number of units of the hidden layers
    :param activation_fn: Activation function
    :param timestep_embedding_dim: Number of features of the timestep (0: the timestep itself)
    :param output_scale: Factor on the output of the last layer
    :param skip_connection: Whether the layers only learn the difference from the flow that leaves a standard normal
        distribution as it is (c_skip of Karras et al., https://arxiv.org/abs/2206.00364). What it adds to the velocity is
        integrated exactly, see :func:`~sb3_flow.common.samplers.unit_variance_field`.
    :param prediction_type: What the network predicts, "velocity", "noise" or "action": the skip connection depends on it
    """

    def __init__(
        self,
        features_dim: int,
        action_dim: int,
        net_arch: list[int],
        activation_fn: type[nn.Module] = nn.SiLU,
        timestep_embedding_dim: int = 8,
        output_scale: float = 1.0,
        skip_connection: bool = False,
        prediction_type: str = "velocity",
    ):
        super().__init__()
        self.features_dim = features_dim
        self.action_dim = action_dim
        self.output_scale = to_float("output_scale", output_scale)
        self.skip_connection = skip_connection
        self.prediction_type = prediction_type
        self.timestep_embedding = TimestepEmbedding(timestep_embedding_dim)
        input_dim = features_dim + action_dim + self.timestep_embedding.features_dim
        input_layer, *layers = create_mlp(input_dim, action_dim, net_arch, activation_fn)
        assert isinstance(input_layer, nn.Linear)
        self.input_layer = input_layer
        self.layers = nn.Sequential(*layers)
        self._memory = Memory()

    def extra_repr(self) -> str:
        return (
            f"output_scale={self.output_scale}, skip_connection={self.skip_connection}, "
            f"prediction_type={self.prediction_type!r}, timestep_embedding_dim={self.timestep_embedding.embedding_dim}"
        )

    def forward_plain(self, features: th.Tensor, x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        """
        Output of the network, from the concatenation of its inputs.

        :param features: (batch, features_dim)
        :param x: (batch, n, action_dim), n points for each observation
        :param timesteps: (batch, n), or (batch, m): those of the first m points, of the next m, ...
        :return: (batch, n, action_dim)
        """
        timesteps = timesteps.repeat(1, x.shape[1] // timesteps.shape[1])
        features = features.unsqueeze(1).expand(-1, x.shape[1], -1)
        inputs = th.cat([features, x, self.timestep_embedding(timesteps)], dim=-1)
        return self._from_first_layer(self.input_layer(inputs.flatten(0, 1)), x, timesteps)

    def forward(self, features: th.Tensor, x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        """
        Output of the network.

        :param features: (batch, features_dim)
        :param x: (batch, n, action_dim), n points for each observation
        :param timesteps: (batch, n), or (batch, m): those of the first m points, of the next m, ...
        :return: (batch, n, action_dim)
        """
        if not self._has_plain_input_layer():
            return self.forward_plain(features, x, timesteps)
        # Each input as often as it is another one
        weight_features, weight_x, weight_t = self._input_weights()
        from_features = nn.functional.linear(features, weight_features, self.input_layer.bias)
        from_times = nn.functional.linear(self.timestep_embedding(timesteps), weight_t)
        from_x = nn.functional.linear(x, weight_x).unflatten(1, (-1, timesteps.shape[1]))
        hidden = (from_features.unsqueeze(1) + from_times).unsqueeze(1) + from_x
        return self._from_first_layer(hidden.flatten(0, 2), x, timesteps)

    def _input_weights(self) -> tuple[th.Tensor, ...]:
        """Those of the first layer for the features, x, and the features of the time."""
        first_time = self.features_dim + self.action_dim
        return self.input_layer.weight.tensor_split([self.features_dim, first_time], dim=1)

    def _has_plain_input_layer(self) -> bool:
        return type(self.input_layer) is nn.Linear and is_plain(self.input_layer)

    def _from_first_layer(self, hidden: th.Tensor, x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        """
        :param hidden: Output of the first layer, (batch * n, units): modules see points as a batch, as those of any MLP
        :param x: (batch, n, action_dim)
        :param timesteps: (batch, n), or (batch, m), see :meth:`forward`
        :return: Output of the network, (batch, n, action_dim)
        """
        return self._scale_and_skip(self.layers(hidden).view(x.shape), x, timesteps)

    def _scale_and_skip(self, output: th.Tensor, x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        if not self.skip_connection:
            return self.output_scale * output
        factor = standard_normal_flow(timesteps, self.prediction_type).unsqueeze(-1).unsqueeze(1)
        skipped = factor * x.unflatten(1, (-1, timesteps.shape[1]))
        return th.add(skipped.view(x.shape), output, alpha=self.output_scale)

    def velocity_field(self, features: th.Tensor, n_flow_steps: int) -> VelocityField:
        """
        The velocity field of a batch of observations.

        :param features: (batch, features_dim)
        :param n_flow_steps: Prepare for the times that a sampler with this number of steps visits
        :return: function of x, (batch, action_dim), and the time, a float
        """
        earliest, latest = timestep_range(self.prediction_type)
        if not (self._is_plain() and self._has_plain_input_layer()):

            def plain_field(x: th.Tensor, t: float) -> th.Tensor:
                t = min(max(t, earliest), latest)
                output = self(features, x.unsqueeze(1), th.full_like(x[:, :1], t)).squeeze(1)
                return to_velocity(output, x, t, self.prediction_type)

            return plain_field

        weight_features, weight_x, weight_t = self._input_weights()
        from_features = nn.functional.linear(features, weight_features, self.input_layer.bias)

        def from_features_and_times(times: list[float]) -> tuple[th.Tensor, ...]:
            embedding = self.timestep_embedding(_to_tensor(times, features).clamp(earliest, latest))
            return (from_features + nn.functional.linear(embedding, weight_t).unsqueeze(1)).unbind()

        grid = sampler_grid(n_flow_steps)
        prepared = dict(zip(grid, from_features_and_times(grid), strict=True))

        def field(x: th.Tensor, t: float) -> th.Tensor:
            if t not in prepared:
                (prepared[t],) = from_features_and_times([t])
            output = self.output_scale * self.layers(th.addmm(prepared[t], x, weight_x.t()))
            t = min(max(t, earliest), latest)
            if self.skip_connection:
                output = th.add(output, x, alpha=standard_normal_flow(t, self.prediction_type))
            return to_velocity(output, x, t, self.prediction_type)

        return field

    def sample(
        self,
        features: th.Tensor,
        noise: th.Tensor,
        n_flow_steps: int,
        sampler: str = "euler",
        sigma: float = 0.0,
    ) -> th.Tensor:
        """
        Integrate from noise to actions.

        :param features: (batch, features_dim)
        :param noise: (batch, action_dim)
        :param n_flow_steps: Number of steps
        :param sampler: One of :mod:`sb3_flow.common.samplers`
        :param sigma: Standard deviation of the noise of one step, for the samplers that add one
        :return: (batch, action_dim)
        """
        if sampler == "euler" and type(self.timestep_embedding) is TimestepEmbedding and runs_in_place(features, noise):
            actions = self._euler_in_place(features, noise, n_flow_steps)
            if actions is not None:
                return actions
        field = self.velocity_field(features, n_flow_steps)
        sigmas: Sigma = sigma
        if self.skip_connection:
            field = unit_variance_field(field, self.prediction_type)
            # The noise has this standard deviation in x
            sigmas = [sigma / standard_normal_std(t - 1 / n_flow_steps) for t in sampler_grid(n_flow_steps)]
        return integrate(sampler, field, noise, n_flow_steps, sigmas, timestep_range(self.prediction_type))

    def sample_chain(self, features: th.Tensor, noise: th.Tensor, step_noise: th.Tensor) -> th.Tensor:
        """
        Euler's method with noise after each step, of a network without a skip connection.

        :param features: (batch, features_dim)
        :param noise: (batch, action_dim)
        :param step_noise: What is added after each step, (n_flow_steps, batch, action_dim)
        :return: states, from the noise to the actions, (batch, n_flow_steps + 1, action_dim)
        """
        assert not self.skip_connection, "A chain is that of a network without a skip connection"
        n_flow_steps = len(step_noise)
        if type(self.timestep_embedding) is TimestepEmbedding and runs_in_place(features, noise):
            chain = self._euler_in_place(features, noise, n_flow_steps, step_noise)
            if chain is not None:
                return chain
        field, states = self.velocity_field(features, n_flow_steps), [noise]
        for t, added in zip(sampler_grid(n_flow_steps), step_noise, strict=True):
            states.append(th.sub(states[-1], field(states[-1], t), alpha=1 / n_flow_steps) + added)
        return th.stack(states, dim=1)

    def _euler_in_place(
        self, features: th.Tensor, noise: th.Tensor, n_flow_steps: int, step_noise: th.Tensor | None = None
    ) -> th.Tensor | None:
        """:return: see :meth:`sample`, or :meth:`sample_chain` if there is noise in the steps. None if it is not possible"""
        embedding, with_noise = self.timestep_embedding, step_noise is not None
        kind = (self.prediction_type, n_flow_steps, self.output_scale, self.skip_connection)
        key = (kind, with_noise, embedding.embedding_dim, noise.shape, noise.dtype, noise.device)
        with th.inference_mode():
            # Nobody else has it meanwhile
            integrator = self._memory.pop(key, None)
            if integrator is None or integrator.has_changed():
                mlp = PlainMLP.find([self.input_layer, self.layers], noise.dtype, [self, embedding])
                if mlp is None or len(mlp.activations) == 0:
                    return None
                times, scales = euler_coefficients(*kind)
                integrator = EulerIntegrator(mlp, embedding(noise.new_tensor(times)), scales, len(noise), with_noise)
            result = integrator(features, noise, step_noise)
            if with_noise:
                result = th.stack(integrator.states).permute(2, 0, 1)
        # An ordinary tensor again
        result = result.clone(memory_format=th.contiguous_format)
        if len(noise) <= LARGEST_KEPT_BATCH:
            self._memory.clear()
            self._memory[key] = integrator
        return result

    def _is_plain(self) -> bool:
        """Whether calling this network is nothing but what is written here, but for the layers."""
        return is_plain(self) and type(self.timestep_embedding) is TimestepEmbedding and is_plain(self.timestep_embedding)


# A subclass is something else
PLAIN.update({kind: methods_of(kind)(kind) for kind in (TimestepEmbedding, FlowNetwork)})


def _to_tensor(times: list[float], like: th.Tensor) -> th.Tensor:
    if like.is_cuda and not th.compiler.is_compiling() and th.cuda.is_current_stream_capturing():
        # What comes from the host is waited for, which a captured stream cannot be
        return th.stack([like.new_full((), t) for t in times])
    return like.new_tensor(times)


def lecun_uniform_init(module: nn.Module) -> None:
    """
    LeCun-uniform weights and zero biases (authors' code of FPO), to be used with ``module.apply``.

    :param module: Module whose parameters are set, if it is linear or a convolution
    """
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        fan_in, _ = nn.init._calculate_fan_in_and_fan_out(module.weight)
        bound = math.sqrt(3.0 / fan_in)
        nn.init.uniform_(module.weight, -bound, bound)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class EnsembleMLP(nn.Module):
    """
    Several MLPs of the same shape, with one output each.

    :param n_members: Number of MLPs
    :param input_dim: Number of inputs
    :param net_arch: Number of units of the hidden layers
    :param activation_fn: Activation function
    :param layer_norm: Whether to normalize the layers, **after** their activation (FQL)
    """

    def __init__(
        self,
        n_members: int,
        input_dim: int,
        net_arch: list[int],
        activation_fn: type[nn.Module] = TanhGELU,
        layer_norm: bool = True,
    ):
        super().__init__()
        sizes = [input_dim, *net_arch, 1]
        first = activation_fn()
        # One is enough if it has nothing of its own
        self.activations = nn.ModuleList(
            nn.ModuleList(first if type(first) in ELEMENTWISE else activation_fn() for _ in net_arch) for _ in range(n_members)
        )
        self.layer_norm = layer_norm
        self.weights = nn.ParameterList(th.empty(n_members, n_in, n_out) for n_in, n_out in itertools.pairwise(sizes))
        self.biases = nn.ParameterList(th.zeros(n_members, 1, n_out) for n_out in sizes[1:])
        self.norm_weights = nn.ParameterList(th.ones(n_members, 1, size) for size in net_arch if layer_norm)
        self.norm_biases = nn.ParameterList(th.zeros(n_members, 1, size) for size in net_arch if layer_norm)
        for weight in self.weights:
            for member in weight:
                nn.init.xavier_uniform_(member)

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: (batch, input_dim), the same for all members
        :return: (n_members, batch)
        """
        on_cpu = inputs.device.type == "cpu"
        return self.forward_batched(inputs) if not on_cpu and self._can_be_batched() else self.forward_in_turn(inputs)

    def _can_be_batched(self) -> bool:
        """Whether it makes no difference to an activation function what else is in its input."""
        activations = itertools.chain.from_iterable(cast(list[nn.ModuleList], self.activations))
        return all(type(activation) in ELEMENTWISE and is_plain(activation) for activation in activations)

    def forward_batched(self, inputs: th.Tensor) -> th.Tensor:
        """One batched matrix product for each layer, see :meth:`forward`. Its activation functions are elementwise."""
        x = inputs.expand(len(self.weights[0]), -1, -1)
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = th.baddbmm(bias, x, weight)
            if layer < last:
                # (each is a ModuleList, but a ModuleList only promises modules)
                x = self.activations[0][layer](x)  # type: ignore[index]
                if self.layer_norm:
                    x = nn.functional.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
                    x = th.addcmul(self.norm_biases[layer], x, self.norm_weights[layer])
        return x.squeeze(-1)

    def forward_in_turn(self, inputs: th.Tensor) -> th.Tensor:
        """One member after the other, what a layer of one of them needs stays in the cache of a CPU, see :meth:`forward`."""
        groups = (self.weights, self.biases, self.norm_weights, self.norm_biases)
        weights, biases, norm_weights, norm_biases = ([parameter.unbind() for parameter in group] for group in groups)
        last = len(weights) - 1
        outputs = []
        for member in range(len(weights[0])):
            x = inputs
            for layer in range(len(weights)):
                x = th.addmm(biases[layer][member], x, weights[layer][member])
                if layer < last:
                    # (as in forward_batched: a ModuleList only promises modules)
                    x = self.activations[member][layer](x)  # type: ignore[index]
                    if self.layer_norm:
                        scale, shift = norm_weights[layer][member][0], norm_biases[layer][member][0]
                        x = nn.functional.layer_norm(x, scale.shape, scale, shift, LAYER_NORM_EPS)
            outputs.append(x.squeeze(-1))
        return th.stack(outputs)


def xavier_uniform_init(module: nn.Module) -> None:
    """
    Xavier-uniform weights and zero biases (authors' code of FQL), to be used with ``module.apply``.

    :param module: Module whose parameters are set, if it is linear or a convolution
    """
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ImpalaCNN(BaseFeaturesExtractor):
    """
    The small encoder of IMPALA (https://arxiv.org/abs/1802.01561), with one residual block for each of its three
    stages, as used by FQL for images.

    :param observation_space: Image space, channels first
    :param features_dim: Number of features extracted
    :param normalized_image: Whether to assume that the image is already normalized, see SB3's ``NatureCNN``
    """

    def __init__(self, observation_space: spaces.Box, features_dim: int = 512, normalized_image: bool = False):
        assert is_image_space(
            observation_space, check_channels=False, normalized_image=normalized_image
        ), f"You should use ImpalaCNN only with images, not with {observation_space}"
        super().__init__(observation_space, features_dim)
        channels, height, width = observation_space.shape
        stages: list[nn.Module] = []
        for n_filters in (16, 32, 32):
            stages += [
                nn.Conv2d(channels, n_filters, 3, padding=1),
                # As in JAX: to half the size, rounded up. An odd size is padded at both ends, an even one at the end only
                nn.MaxPool2d(3, stride=2, padding=(height % 2, width % 2), ceil_mode=True),
                Residual(n_filters),
            ]
            channels, height, width = n_filters, (height + 1) // 2, (width + 1) // 2
        self.cnn = nn.Sequential(*stages, nn.ReLU(), nn.Flatten())
        self.linear = nn.Sequential(nn.Linear(channels * height * width, features_dim), TanhGELU())
        self.apply(xavier_uniform_init)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.linear(self.cnn(observations))


class Residual(nn.Module):
    """
    Residual block of :class:`ImpalaCNN`.

    :param n_filters: Number of channels
    """

    def __init__(self, n_filters: int):
        super().__init__()
        convolutions = [nn.Conv2d(n_filters, n_filters, 3, padding=1) for _ in range(2)]
        self.block = nn.Sequential(nn.ReLU(), convolutions[0], nn.ReLU(), convolutions[1])

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x + self.block(x)
