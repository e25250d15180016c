"""The networks of offline algorithms (a flow that clones, a one-step policy, critics, values), and their policies."""

from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    create_mlp,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_flow.common.activations import TanhGELU
from sb3_flow.common.bounds import RescaledActionsPolicy, warn_if_too_wide
from sb3_flow.common.checks import to_bool, to_int, to_net_arch
from sb3_flow.common.flow import check_choice
from sb3_flow.common.networks import EnsembleMLP, FlowNetwork, ImpalaCNN, xavier_uniform_init
from sb3_flow.common.optimizers import make_optimizer
from sb3_flow.common.samplers import SAMPLERS, VelocityField, check_sampler
from sb3_flow.offline.transitions import map_arrays
from sb3_flow.offline.values import aggregate


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

    def act(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        """
        :param obs: Observation
        :param noise: (batch, action_dim)
        :return: action in [-1, 1], (batch, action_dim)
        """
        return self.unclipped_actions(obs, noise).clamp(-1, 1)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.act(observation, _draw_noise(observation, self.action_dim, self.device, deterministic))


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
        return self.integrate(obs, noise)

    def integrate(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        """
        The same, with a gradient through all steps. Of several samples for an observation, its features are computed once.

        :param obs: Observation
        :param noise: (batch, action_dim), or (batch * n_samples, action_dim), those of an observation one after the other
        :return: action in [-1, 1], of the shape of the noise
        """
        features = _for_each(self.extract_features(obs, self.features_extractor), noise)
        # Clipped at the end only
        return self.network.sample(features, noise, self.n_flow_steps, self.sampler).clamp(-1, 1)

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


def chunk_space(action_space: spaces.Space, chunk_size: int) -> spaces.Box:
    """
    :param action_space: Action space
    :param chunk_size: Number of steps
    :return: space of as many actions in a row
    """
    assert isinstance(action_space, spaces.Box)
    low, high = (np.broadcast_to(bound, (chunk_size, *bound.shape)) for bound in (action_space.low, action_space.high))
    return spaces.Box(low, high, dtype=action_space.dtype.type)


def batch_size(obs: PyTorchObs) -> int:
    """
    :param obs: Observation
    :return: how many there are
    """
    return (next(iter(obs.values())) if isinstance(obs, dict) else obs).shape[0]


def _draw_noise(obs: PyTorchObs, action_dim: int, device: th.device, deterministic: bool) -> th.Tensor:
    return (th.zeros if deterministic else th.randn)((batch_size(obs), action_dim), device=device)


def _for_each(features: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """Features of observations, as often as there are actions for them, one after the other."""
    # (`len` would be a constant to an exporter)
    n = actions.shape[0] // features.shape[0]
    return features if n == 1 else features.repeat_interleave(n, dim=0)


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
        :param actions: in [-1, 1], (batch, action_dim), or several for each observation, one after the other
        :return: (n_critics, number of actions)
        """
        # A shared features extractor is learned with the policy, not with the values (as in SB3's SAC)
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            features = _for_each(self.extract_features(obs, self.features_extractor), actions)
        return self.q_networks(th.cat([features, actions], dim=1))


class ValueNetwork(BaseModel):
    """
    A value network, of the same kind as the critics.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Number of units of the hidden layers
    :param features_extractor: Network to extract features
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param normalize_images: Whether to normalize images or not, dividing by 255.0
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
        layer_norm: bool = True,
        share_features_extractor: bool = False,
    ):
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.share_features_extractor = share_features_extractor
        self.network = EnsembleMLP(1, features_dim, net_arch, activation_fn, layer_norm)

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Observation
        :return: (batch,)
        """
        # (see EnsembleCritic)
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            features = self.extract_features(obs, self.features_extractor)
        return self.network(features).squeeze(0)


class OfflinePolicy(RescaledActionsPolicy):
    """
    The base of the policies of offline algorithms, which say what networks they have (``network_names``), among them the
    ``bc_flow``. They act by sampling that, unless they do otherwise. Each network has a features extractor of its own, unless
    it is shared.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: The specification of the policy (one-step actor and flow) and value networks:
        ``dict(pi=[...], qf=[...])``, or a list for both
    :param activation_fn: Activation function
    :param features_extractor_class: Features extractor to use.
    :param features_extractor_kwargs: Keyword arguments
        to pass to the features extractor.
    :param normalize_images: Whether to normalize images or not,
         dividing by 255.0 (True by default)
    :param optimizer_class: The optimizer to use,
        ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments,
        excluding the learning rate, to pass to the optimizer
    :param n_critics: Number of critic networks to create.
    :param layer_norm: Whether to normalize the layers of the critics
    :param n_flow_steps: Number of steps of the sampler of the flow
    :param share_features_extractor: Whether to share or not the features extractor between the actor, the flow and the
        critic (this saves memory). It is then learned with the actor and the flow.
    :param sampler: Sampler of the flow: "euler" (the authors'), "midpoint", "heun", "rk4" or "dopri5"
    :param chunk_size: Number of steps in a row that are one action of the networks (given by the algorithm)
    """

    #: Those of the networks, in the order of their creation: "actor", "bc_flow", "critic", "critic_target", "value"
    network_names: ClassVar[tuple[str, ...]]
    #: Numbers of units of the hidden layers
    DEFAULT_NET_ARCH: ClassVar[list[int]] = [512, 512, 512, 512]
    bc_flow: BCFlow
    critic: EnsembleCritic
    critic_target: EnsembleCritic

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = TanhGELU,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        layer_norm: bool = True,
        n_flow_steps: int = 10,
        share_features_extractor: bool = False,
        sampler: str = "euler",
        chunk_size: int = 1,
    ):
        check_flow_sampler(sampler, n_flow_steps)
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
            normalize_images=normalize_images,
        )
        warn_if_too_wide(action_space)
        self.net_arch = to_net_arch(self.DEFAULT_NET_ARCH if net_arch is None else net_arch, ("pi", "qf"))
        self.activation_fn = activation_fn
        self.n_critics = to_int("n_critics", n_critics, at_least=1)
        self.layer_norm = to_bool("layer_norm", layer_norm)
        self.n_flow_steps = to_int("n_flow_steps", n_flow_steps)
        self.share_features_extractor = to_bool("share_features_extractor", share_features_extractor)
        self.sampler = sampler
        self.chunk_size = to_int("chunk_size", chunk_size, at_least=1)
        # Arguments of the constructor that set_sampler() has changed
        self.changed_sampler: dict[str, Any] = {}
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        """
        Create the networks and the optimizer.

        :param lr_schedule: Learning rate schedule
            lr_schedule(1) is the initial learning rate
        """
        actor_arch, critic_arch = get_actor_critic_arch(self.net_arch)
        net_args = dict(
            observation_space=self.observation_space,
            action_space=self.action_space if self.chunk_size == 1 else chunk_space(self.action_space, self.chunk_size),
            activation_fn=self.activation_fn,
            normalize_images=self.normalize_images,
        )
        actor_args = dict(net_args, net_arch=actor_arch)
        value_args = dict(net_args, net_arch=critic_arch, layer_norm=self.layer_norm)
        critic_args = dict(value_args, n_critics=self.n_critics)
        flow_args = dict(actor_args, n_flow_steps=self.n_flow_steps, sampler=self.sampler)
        sharing = dict(share_features_extractor=self.share_features_extractor)
        classes: dict[str, tuple[type, dict[str, Any]]] = dict(
            actor=(OneStepActor, actor_args),
            bc_flow=(BCFlow, flow_args),
            critic=(EnsembleCritic, critic_args | sharing),
            critic_target=(EnsembleCritic, critic_args),
            value=(ValueNetwork, value_args | sharing),
        )
        shared = None
        for name in self.network_names:
            network_class, arguments = classes[name]
            # The target network has its own, which follows
            extractor = None if name == "critic_target" else shared
            network = network_class(**self._update_features_extractor(arguments, extractor))
            setattr(self, name, network)
            if self.share_features_extractor and shared is None:
                shared = network.features_extractor
        if "critic_target" in self.network_names:
            self.critic_target.load_state_dict(self.critic.state_dict())
            # Target networks should always be in eval mode
            self.critic_target.set_training_mode(False)
            self.critic_target.requires_grad_(False)

        # No parameter is reached by the losses of two networks (but a shared features extractor): one optimizer on the sum
        # of the losses is one for each of them
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.optimizer_class, trained, lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            dict(
                lr_schedule=self._dummy_schedule,  # dummy lr schedule, not needed for loading policy alone
                net_arch=self.net_arch,
                activation_fn=self.activation_fn,
                features_extractor_class=self.features_extractor_class,
                features_extractor_kwargs=self.features_extractor_kwargs,
                optimizer_class=self.optimizer_class,
                optimizer_kwargs=self.optimizer_kwargs,
                n_critics=self.n_critics,
                layer_norm=self.layer_norm,
                n_flow_steps=self.n_flow_steps,
                share_features_extractor=self.share_features_extractor,
                sampler=self.sampler,
                chunk_size=self.chunk_size,
            )
        )
        return data

    def set_sampler(self, sampler: str | None = None, n_flow_steps: int | None = None) -> None:
        """
        Sample the flow, ``bc_flow``, in another way from now on, also after training. It is saved with the model.
        A one-step policy that was distilled from it does not change, but if the training goes on.

        :param sampler: "euler", "midpoint", "heun", "rk4" or "dopri5". That of now if None, as the number of steps.
        :param n_flow_steps: Number of steps
        :raises ValueError: if an argument is unknown or out of its range
        :raises ImportError: if the sampler needs torchdiffeq, and it is not installed
        """
        sampler = self.sampler if sampler is None else sampler
        n_flow_steps = self.n_flow_steps if n_flow_steps is None else n_flow_steps
        check_flow_sampler(sampler, n_flow_steps)
        n_flow_steps = to_int("n_flow_steps", n_flow_steps)
        self.changed_sampler = dict(sampler=sampler, n_flow_steps=n_flow_steps)
        for policy in (self, self.bc_flow):
            policy.sampler, policy.n_flow_steps = sampler, n_flow_steps

    def forward(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(observation, deterministic=deterministic)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Get the policy action from an observation (and optional hidden state).
        Includes sugar-coating to handle different observations (e.g. normalizing images).

        With chunks, it is the next step of the chunk that is in the state, or the first one of a new chunk where none is
        left, or an episode starts.

        :param observation: the input observation
        :param state: The last hidden states: None, or with chunks what was returned before
        :param episode_start: The last masks, which correspond to beginning of episodes
        :param deterministic: Whether or not to return deterministic actions.
        :return: the model's action and the next hidden state: with chunks those of each environment, in env units,
            (n_envs, chunk_size, ...), and the number of their steps that are taken, (n_envs,)
        :raises ValueError: if the state, or the masks, are of another number of environments
        """
        if self.chunk_size == 1 or isinstance(observation, tuple):
            # (which is refused there)
            return super().predict(observation, state, episode_start, deterministic)
        # Switch to eval mode (this affects batch norm / dropout)
        self.set_training_mode(False)
        obs, is_vectorized = self.obs_to_tensor(observation)
        n_envs, shape = batch_size(obs), self.action_space.shape
        assert shape is not None
        if state is None:
            chunks = np.zeros((n_envs, self.chunk_size, *shape), dtype=self.action_space.dtype)
            state = chunks, np.full(n_envs, self.chunk_size)
        chunks, n_taken = state
        if len(n_taken) != n_envs:
            raise ValueError(f"`state` must be of {n_envs} environments, as the observation is, it is of {len(n_taken)}")
        is_new = n_taken >= self.chunk_size
        if episode_start is not None:
            starts = np.asarray(episode_start, dtype=bool).reshape(-1)
            if len(starts) != n_envs:
                raise ValueError(
                    f"`episode_start` must be of {n_envs} environments, as the observation is, it is of {len(starts)}"
                )
            is_new = is_new | starts
        if is_new.any():
            with th.no_grad():
                new = self._predict(map_arrays(lambda part: part[is_new], obs), deterministic)
            chunks, n_taken = chunks.copy(), np.where(is_new, 0, n_taken)
            chunks[is_new] = self.unscale_action(new.cpu().numpy().reshape(-1, self.chunk_size, *shape))
        actions = chunks[np.arange(n_envs), n_taken]
        return actions if is_vectorized else actions[0], (chunks, n_taken + 1)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        Get the action of the flow.

        :param observation:
        :param deterministic: Whether to act from zero noise, or from a random one as the authors do
        :return: Action in [-1, 1]
        """
        return self.bc_flow._predict(observation, deterministic)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of what an action is made of, see :meth:`act`."""
        return (self.bc_flow.action_dim,)

    def act(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        """
        What ``predict`` makes of standard normal noise, or of zeros (deterministic).

        :param obs: Observation, a tensor (see ``obs_to_tensor``)
        :param noise: (batch, \\*noise_shape)
        :return: Action in [-1, 1], or those of a chunk one after the other, (batch, chunk_size * action_dim)
        """
        return self.bc_flow.sample(obs, noise)

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the policy in either training or evaluation mode.

        This affects certain modules, such as batch normalisation and dropout.

        :param mode: if true, set to training mode, else set to evaluation mode
        """
        for name in self.network_names:
            if name != "critic_target":
                getattr(self, name).set_training_mode(mode)
        self.training = mode


class BestOfSamplesPolicy(OfflinePolicy):
    """
    A policy that acts by the best of several samples of the flow, in the eyes of the critics.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param n_samples: Number of samples that the critics choose from
    :param kwargs: Further ones of :class:`.OfflinePolicy`
    """

    #: How the critics are put together
    q_agg: ClassVar[str]

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        n_samples: int = 32,
        **kwargs,
    ):
        self.n_samples = to_int("n_samples", n_samples, at_least=1)
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | dict(n_samples=self.n_samples)

    def set_sampler(self, sampler: str | None = None, n_flow_steps: int | None = None, n_samples: int | None = None) -> None:
        """
        Sample the flow in another way from now on, also after training. It is saved with the model.

        :param sampler: "euler", "midpoint", "heun", "rk4" or "dopri5". That of now if None, as the others.
        :param n_flow_steps: Number of steps
        :param n_samples: Number of samples that the critics choose from
        :raises ValueError: if an argument is unknown or out of its range
        :raises ImportError: if the sampler needs torchdiffeq, and it is not installed
        """
        n_samples = to_int("n_samples", self.n_samples if n_samples is None else n_samples, at_least=1)
        super().set_sampler(sampler, n_flow_steps)
        self.n_samples = n_samples
        self.changed_sampler["n_samples"] = n_samples

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        Get the action of the flow that the critics value most.

        :param observation:
        :param deterministic: Whether to choose among samples of the same noise every time, or of a random one (authors)
        :return: Action in [-1, 1]
        """
        shape = (batch_size(observation), *self.noise_shape)
        noise = self.same_noise().expand(shape) if deterministic else th.randn(shape, device=self.device)
        return self.act(observation, noise)

    def same_noise(self) -> th.Tensor:
        """:return: what deterministic actions are the best of, the same every time, (n_samples, action_dim)"""
        return th.randn(self.noise_shape, generator=th.Generator().manual_seed(0)).to(self.device)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of what an action is made of, (n_samples, action_dim)."""
        return (self.n_samples, self.bc_flow.action_dim)

    @th.no_grad()
    def act(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        actions = self.bc_flow.sample(obs, noise.flatten(0, 1))
        values = aggregate(self.critic(obs, actions), self.q_agg).view(noise.shape[:2])
        best = values.argmax(dim=1).view(-1, 1, 1).expand(-1, 1, noise.shape[2])
        return actions.view(noise.shape).gather(1, best).squeeze(1)


class WithImages(OfflinePolicy):
    """
    A policy for image observations: a small IMPALA encoder is the default features extractor.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        features_extractor_class: type[BaseFeaturesExtractor] = ImpalaCNN,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        **kwargs,
    ):
        # As SB3 does for its own CNN: images that are normalized already need not be bytes
        if not normalize_images and issubclass(features_extractor_class, ImpalaCNN):
            features_extractor_kwargs = dict(features_extractor_kwargs or {}, normalized_image=True)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=features_extractor_kwargs,
            normalize_images=normalize_images,
            **kwargs,
        )


class WithDict(OfflinePolicy):
    """
    A policy for ``Dict`` observations: a ``CombinedExtractor`` is the default features extractor.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor,
        **kwargs,
    ):
        super().__init__(
            observation_space, action_space, lr_schedule, features_extractor_class=features_extractor_class, **kwargs
        )


#: What an update may be captured with
NETWORKS = (OneStepActor, BCFlow, EnsembleCritic, ValueNetwork)
