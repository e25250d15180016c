"""Networks: the timestep embedding, the network that a flow is made of, ensembles of critics, the image encoder."""

import itertools
import math

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from torch import nn

from sb3_flow.common.activations import TanhGELU
from sb3_flow.common.flow import sampler_grid, standard_normal_flow, standard_normal_std, timestep_range, to_velocity
from sb3_flow.common.in_place import EulerIntegrator, Prepared
from sb3_flow.common.samplers import SAMPLERS, Sigma, VelocityField, unit_variance_field

#: That of Flax
LAYER_NORM_EPS = 1e-6


class TimestepEmbedding(nn.Module):
    """
    Fourier features of the time: cos and sin of t times 1, 2, 4, ... (authors' code of FPO).

    :param embedding_dim: Number of features, even. 0 gives the time itself, as one feature (FQL).
    """

    frequencies: th.Tensor

    def __init__(self, embedding_dim: int = 8):
        super().__init__()
        if embedding_dim < 0 or embedding_dim % 2 != 0:
            raise ValueError(f"`timestep_embedding_dim` must be even and not negative, it is {embedding_dim}")
        self.features_dim = embedding_dim or 1
        self.register_buffer("frequencies", 2.0 ** th.arange(embedding_dim // 2), persistent=False)

    def forward(self, timesteps: th.Tensor) -> th.Tensor:
        """
        :param timesteps: (...,)
        :return: (..., features_dim)
        """
        timesteps = timesteps.unsqueeze(-1)
        if len(self.frequencies) == 0:
            return timesteps
        angles = timesteps * self.frequencies
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
        self.output_scale = output_scale
        self.skip_connection = skip_connection
        self.prediction_type = prediction_type
        self.timestep_embedding = TimestepEmbedding(timestep_embedding_dim)
        input_dim = features_dim + action_dim + self.timestep_embedding.features_dim
        input_layer, *layers = create_mlp(input_dim, action_dim, net_arch, activation_fn)
        assert isinstance(input_layer, nn.Linear)
        self.input_layer = input_layer
        self.layers = nn.Sequential(*layers)
        self._prepared = Prepared()

    def forward_plain(self, features: th.Tensor, x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        """
        Output of the network, from the concatenation of its inputs.

        :param features: (batch, features_dim)
        :param x: (batch, n, action_dim), n points for each observation
        :param timesteps: (batch, n)
        :return: (batch, n, action_dim)
        """
        features = features.unsqueeze(1).expand(-1, x.shape[1], -1)
        inputs = th.cat([features, x, self.timestep_embedding(timesteps)], dim=-1)
        return self._add_skip_connection(self.output_scale * self.layers(self.input_layer(inputs)), x, timesteps)

    def forward(self, features: th.Tensor, x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        """
        Output of the network.

        :param features: (batch, features_dim)
        :param x: (batch, n, action_dim), n points for each observation
        :param timesteps: (batch, n)
        :return: (batch, n, action_dim)
        """
        weight = self.input_layer.weight
        from_features = nn.functional.linear(features, weight[:, : self.features_dim], self.input_layer.bias)
        points = th.cat([x, self.timestep_embedding(timesteps)], dim=-1)
        hidden = from_features.unsqueeze(1) + nn.functional.linear(points, weight[:, self.features_dim :])
        return self._add_skip_connection(self.output_scale * self.layers(hidden), x, timesteps)

    def _add_skip_connection(self, output: th.Tensor, x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        if not self.skip_connection:
            return output
        scale = standard_normal_flow(timesteps, self.prediction_type)
        return th.addcmul(output, scale.unsqueeze(-1), x)

    def velocity_field(self, features: th.Tensor, n_flow_steps: int) -> VelocityField:
        """
        The velocity field of a batch of observations.

        :param features: (batch, features_dim)
        :param n_flow_steps: Prepare for the times that a sampler with this number of steps visits
        :return: function of x, (batch, action_dim), and the time, a float
        """
        first_action, first_time = self.features_dim, self.features_dim + self.action_dim
        weight = self.input_layer.weight
        weight_x, weight_t = weight[:, first_action:first_time].t(), weight[:, first_time:]
        from_features = nn.functional.linear(features, weight[:, :first_action], self.input_layer.bias)
        earliest, latest = timestep_range(self.prediction_type)

        def from_features_and_times(times: list[float]) -> tuple[th.Tensor, ...]:
            embedding = self.timestep_embedding(features.new_tensor(times).clamp(earliest, latest))
            return (from_features + nn.functional.linear(embedding, weight_t).unsqueeze(1)).unbind()

        grid = sampler_grid(n_flow_steps)
        prepared = dict(zip(grid, from_features_and_times(grid), strict=True))

        def field(x: th.Tensor, t: float) -> th.Tensor:
            if t not in prepared:
                (prepared[t],) = from_features_and_times([t])
            output = self.output_scale * self.layers(th.addmm(prepared[t], x, weight_x))
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
        :param sampler: One of ``SAMPLERS``
        :param sigma: Standard deviation of the noise of one step, for the samplers that add one
        :return: (batch, action_dim)
        """
        if sampler == "euler" and not th.is_grad_enabled() and len(self.layers) > 0:
            with th.inference_mode():
                integrator = self._prepared.get(EulerIntegrator, (self,), n_flow_steps)
                actions = integrator(features, noise)
            # An ordinary tensor again
            return actions.clone(memory_format=th.contiguous_format)
        field = self.velocity_field(features, n_flow_steps)
        sigmas: Sigma = sigma
        if self.skip_connection:
            field = unit_variance_field(field, self.prediction_type)
            # The noise has this standard deviation in x
            sigmas = [sigma / standard_normal_std(t - 1 / n_flow_steps) for t in sampler_grid(n_flow_steps)]
        return SAMPLERS[sampler](field, noise, n_flow_steps, sigmas, timestep_range(self.prediction_type))

    def train(self, mode: bool = True) -> "FlowNetwork":
        self._prepared.clear()
        return super().train(mode)


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
        self.activation = activation_fn()
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
        return self.forward_in_turn(inputs) if inputs.device.type == "cpu" else self.forward_batched(inputs)

    def forward_batched(self, inputs: th.Tensor) -> th.Tensor:
        """One batched matrix product for each layer, see :meth:`forward`."""
        x = inputs.expand(len(self.weights[0]), -1, -1)
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = th.baddbmm(bias, x, weight)
            if layer < last:
                x = self.activation(x)
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
                    x = self.activation(x)
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
                _Residual(n_filters),
            ]
            channels, height, width = n_filters, (height + 1) // 2, (width + 1) // 2
        self.cnn = nn.Sequential(*stages, nn.ReLU(), nn.Flatten())
        self.linear = nn.Sequential(nn.Linear(channels * height * width, features_dim), TanhGELU())
        self.apply(xavier_uniform_init)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.linear(self.cnn(observations))


class _Residual(nn.Module):
    def __init__(self, n_filters: int):
        super().__init__()
        convolutions = [nn.Conv2d(n_filters, n_filters, 3, padding=1) for _ in range(2)]
        self.block = nn.Sequential(nn.ReLU(), convolutions[0], nn.ReLU(), convolutions[1])

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x + self.block(x)
