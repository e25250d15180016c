"""The networks that offline algorithms are made of: a flow that clones, a one-step policy, critics."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_flow.common.activations import TanhGELU
from sb3_flow.common.bounds import RescaledActionsPolicy
from sb3_flow.common.flow import check_choice
from sb3_flow.common.networks import EnsembleMLP, FlowNetwork, xavier_uniform_init
from sb3_flow.common.samplers import SAMPLERS, VelocityField, check_sampler


class OneStepActor(RescaledActionsPolicy):
    """
    A policy that needs a single step (that of FQL): an action from an observation and a noise, in one step.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Number of units of the hidden layers
    :param features_extractor: Network to extract features
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param normalize_images: Whether to normalize images or not, dividing by 255.0
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = TanhGELU,
        normalize_images: bool = True,
    ):
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
            squash_output=True,
        )
        self.net_arch = net_arch
        self.features_dim = features_dim
        self.activation_fn = activation_fn
        self.action_dim = get_action_dim(action_space)
        self.mu = nn.Sequential(*create_mlp(features_dim + self.action_dim, self.action_dim, net_arch, activation_fn))
        self.mu.apply(xavier_uniform_init)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            dict(
                net_arch=self.net_arch,
                features_dim=self.features_dim,
                activation_fn=self.activation_fn,
                features_extractor=self.features_extractor,
            )
        )
        return data

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic)

    def unclipped_actions(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        """
        :param obs: Observation
        :param noise: (batch, action_dim)
        :return: action in [-1, 1], but for the bounds, which are not enforced here, (batch, action_dim)
        """
        features = self.extract_features(obs, self.features_extractor)
        return self.mu(th.cat([features, noise], dim=1))

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        noise = _draw_noise(observation, self.action_dim, self.device, deterministic)
        return self.unclipped_actions(observation, noise).clamp(-1, 1)


class BCFlow(RescaledActionsPolicy):
    """
    The flow that clones the behaviour of the dataset, integrated with Euler's method unless told otherwise.
    It is a policy by itself: ``model.policy.bc_flow.predict(obs)``.

    In this package t = 1 is noise and t = 0 the action; the authors' time runs the other way.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Number of units of the hidden layers
    :param features_extractor: Network to extract features
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param n_flow_steps: Number of steps of the sampler
    :param normalize_images: Whether to normalize images or not, dividing by 255.0
    :param sampler: One of :mod:`sb3_flow.common.samplers`
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = TanhGELU,
        n_flow_steps: int = 10,
        normalize_images: bool = True,
        sampler: str = "euler",
    ):
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
            squash_output=True,
        )
        self.net_arch = net_arch
        self.features_dim = features_dim
        self.activation_fn = activation_fn
        self.action_dim = get_action_dim(action_space)
        self.n_flow_steps = n_flow_steps
        self.sampler = sampler
        # The time itself is the input, without an embedding
        self.network = FlowNetwork(features_dim, self.action_dim, net_arch, activation_fn, timestep_embedding_dim=0)
        self.network.apply(xavier_uniform_init)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            dict(
                net_arch=self.net_arch,
                features_dim=self.features_dim,
                activation_fn=self.activation_fn,
                features_extractor=self.features_extractor,
                n_flow_steps=self.n_flow_steps,
                sampler=self.sampler,
            )
        )
        return data

    def forward(self, obs: PyTorchObs, x: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        """
        Velocity at points of the paths between noise and action.

        :param obs: Observation
        :param x: (batch, action_dim)
        :param timesteps: (batch,)
        :return: (batch, action_dim)
        """
        features = self.extract_features(obs, self.features_extractor)
        return self.network(features, x.unsqueeze(1), timesteps.unsqueeze(1)).squeeze(1)

    @th.no_grad()
    def velocity_field(self, obs: PyTorchObs) -> VelocityField:
        """
        The velocity field of the flow, for pictures and diagnostics.

        :param obs: Observation
        :return: function of x, (batch, action_dim), and the time, a float, to the velocity, (batch, action_dim)
        """
        features = self.extract_features(obs, self.features_extractor)
        return self.network.velocity_field(features, self.n_flow_steps)

    @th.no_grad()
    def sample(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        """
        Integrate from noise to an action. No gradient flows through it.

        :param obs: Observation
        :param noise: (batch, action_dim)
        :return: action in [-1, 1], (batch, action_dim)
        """
        features = self.extract_features(obs, self.features_extractor)
        # Clipped at the end only
        return self.network.sample(features, noise, self.n_flow_steps, self.sampler).clamp_(-1, 1)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.sample(observation, _draw_noise(observation, self.action_dim, self.device, deterministic))


def check_flow_sampler(sampler: str, n_flow_steps: int) -> None:
    """
    :param sampler: Sampler of a flow that clones: its actions must be a function of the noise
    :param n_flow_steps: Number of steps
    :raises ValueError: if an argument is unknown or out of its range
    :raises ImportError: if the sampler needs torchdiffeq, and it is not installed
    """
    check_choice("sampler", sampler, [name for name in SAMPLERS if name != "sde"])
    check_sampler(sampler, n_flow_steps)


def _draw_noise(obs: PyTorchObs, action_dim: int, device: th.device, deterministic: bool) -> th.Tensor:
    batch_size = (next(iter(obs.values())) if isinstance(obs, dict) else obs).shape[0]
    return (th.zeros if deterministic else th.randn)((batch_size, action_dim), device=device)


class EnsembleCritic(BaseModel):
    """
    Q-value networks, evaluated together.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Number of units of the hidden layers
    :param features_extractor: Network to extract features
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param normalize_images: Whether to normalize images or not, dividing by 255.0
    :param n_critics: Number of critic networks
    :param layer_norm: Whether to normalize the layers
    :param share_features_extractor: Whether the features extractor is shared with the actor
    """

    features_extractor: BaseFeaturesExtractor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = TanhGELU,
        normalize_images: bool = True,
        n_critics: int = 2,
        layer_norm: bool = True,
        share_features_extractor: bool = False,
    ):
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.share_features_extractor = share_features_extractor
        input_dim = features_dim + get_action_dim(action_space)
        self.q_networks = EnsembleMLP(n_critics, input_dim, net_arch, activation_fn, layer_norm)

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: Observation
        :param actions: in [-1, 1], (batch, action_dim)
        :return: (n_critics, batch)
        """
        # A shared features extractor is learned with the policy, not with the values (as in SB3's SAC)
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            features = self.extract_features(obs, self.features_extractor)
        return self.q_networks(th.cat([features, actions], dim=1))


#: What an update may be captured with
NETWORKS = (OneStepActor, BCFlow, EnsembleCritic)
