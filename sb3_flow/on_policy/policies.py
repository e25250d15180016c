"""The policy of the on-policy algorithms: an actor that is a flow, and a value function."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_flow.common.activations import is_transformed
from sb3_flow.common.bounds import RescaledActionsPolicy, is_bounded, middle_and_half_range, warn_if_too_wide
from sb3_flow.common.checks import POSITIVE, to_bool, to_float, to_int, to_net_arch
from sb3_flow.common.flow import PREDICTION_TYPES, check_choice
from sb3_flow.common.in_place import Memory, PlainMLP, is_plain, runs_in_place
from sb3_flow.common.networks import FlowNetwork, lecun_uniform_init
from sb3_flow.common.normalization import (
    NormalizedCombinedExtractor,
    NormalizedFlattenExtractor,
    RunningNormalization,
    RunningStatistics,
    ValueNormalization,
)
from sb3_flow.common.optimizers import make_optimizer
from sb3_flow.common.samplers import VelocityField
from sb3_flow.offline.policies import OfflinePolicy

#: How raw actions are brought into the bounds.
SQUASH_TYPES = ("clip", "tanh")
#: How far from the middle actions may be without a loss (``bounds_loss_coef``), in units of half the distance of the bounds,
#: before they are squashed or clipped.
SOFT_BOUNDS = {"tanh": 3.0, "clip": 1.5}
#: Features extractors with statistics
NORMALIZED = (NormalizedFlattenExtractor, NormalizedCombinedExtractor)


class FlowActorCriticPolicy(RescaledActionsPolicy, ActorCriticPolicy):
    """
    Actor-critic policy whose actor is a flow: an action is sampled by integrating a learned
    velocity field from Gaussian noise (t = 1) to the action (t = 0). How, is for its subclasses to say.

    The flow lives in an unbounded space: a *raw* action. The environment receives ``action_scale * raw`` clipped to [-1, 1]
    (or, with ``squash_type="tanh"``, its tanh), rescaled to the bounds of the action space. In a dimension without two finite
    bounds it receives ``action_scale * raw`` in env units, added to the legal action that is closest to zero, and clipped to a
    bound if there is one. Buffers and losses only see raw actions.

    :param observation_space: Observation space
    :param action_space: Action space, a ``Box`` (with finite bounds for ``squash_type="tanh"``)
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: The specification of the policy (flow) and value networks.
    :param activation_fn: Activation function
    :param ortho_init: Whether to use or not orthogonal initialization, which makes a new network almost linear
    :param use_sde: gSDE has no meaning for a flow: must be False
    :param squash_type: How to bring actions into the bounds: "clip" or "tanh"
    :param action_scale: Factor on the raw action before it is squashed
    :param features_extractor_class: Features extractor to use.
    :param features_extractor_kwargs: Keyword arguments
        to pass to the features extractor.
    :param share_features_extractor: If True, the features extractor is shared between the policy and value networks.
    :param normalize_images: Whether to normalize images or not,
         dividing by 255.0 (True by default)
    :param optimizer_class: The optimizer to use,
        ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments,
        excluding the learning rate, to pass to the optimizer
    :param n_flow_steps: Number of steps, from noise to action
    :param prediction_type: What the flow network predicts: "velocity", "noise" or "action"
    :param output_scale: Factor on the output of the flow network
    :param skip_connection: Whether the network only learns the difference from the flow that leaves a standard normal
        distribution as it is
    :param normalize_values: Whether the value network learns values that are normalized by the returns (PopArt)
    :param timestep_embedding_dim: Number of features of the timestep, sines and cosines (authors' code), or 0 for the timestep
        itself
    :raises ValueError: if an argument has no meaning for a flow policy or is out of its range
    """

    #: Numbers of units of the hidden layers: the flow needs some to bring its inputs together, also behind a CNN
    DEFAULT_NET_ARCH: ClassVar[dict[str, list[int]]] = dict(pi=[64, 64], vf=[256, 256])
    action_net: FlowNetwork
    #: Which dimensions have two finite bounds, and the soft bounds of all, in units of half the distance of the bounds
    _bounded: th.Tensor
    _soft_low: th.Tensor
    _soft_high: th.Tensor
    #: Arguments of the constructor that were changed since
    changed_sampler: dict[str, Any]

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.SiLU,
        ortho_init: bool = True,
        use_sde: bool = False,
        squash_type: str = "clip",
        action_scale: float = 0.5,
        features_extractor_class: type[BaseFeaturesExtractor] = NormalizedFlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        share_features_extractor: bool = True,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_flow_steps: int = 10,
        prediction_type: str = "velocity",
        output_scale: float = 4.0,
        skip_connection: bool = False,
        normalize_values: bool = True,
        timestep_embedding_dim: int = 8,
    ):
        check_choice("squash_type", squash_type, SQUASH_TYPES)
        _check_action_space(action_space, squash_type)
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        action_scale = to_float("action_scale", action_scale, POSITIVE)
        if use_sde:
            raise ValueError("`use_sde` must be False: generalized State Dependent Exploration is for Gaussian policies")

        # Needed by _build(), which the constructor of the parent calls
        self.n_flow_steps = to_int("n_flow_steps", n_flow_steps, at_least=1)
        self.prediction_type = prediction_type
        self.output_scale = to_float("output_scale", output_scale)
        self.skip_connection = to_bool("skip_connection", skip_connection)
        self.normalize_values = to_bool("normalize_values", normalize_values)
        self.timestep_embedding_dim = to_int("timestep_embedding_dim", timestep_embedding_dim, at_least=0)
        self._memory = Memory()

        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            to_net_arch(self.DEFAULT_NET_ARCH if net_arch is None else net_arch, ("pi", "vf")),
            activation_fn,
            to_bool("ortho_init", ortho_init),
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=features_extractor_kwargs,
            share_features_extractor=to_bool("share_features_extractor", share_features_extractor),
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
        # For SB3: actions are to be rescaled
        self._squash_output = True
        self.squash_type = squash_type
        self.action_scale = action_scale
        self._register_bounds()

    def _build_mlp_extractor(self) -> None:
        """
        Create what is between the features and the networks: the layers of the value function. The flow network takes the
        features as they are, unless a subclass creates an extractor with layers for it too.
        """
        vf_arch = self.net_arch.get("vf", []) if isinstance(self.net_arch, dict) else self.net_arch
        self.mlp_extractor = MlpExtractor(self.features_dim, dict(pi=[], vf=vf_arch), self.activation_fn, device=self.device)

    def _build(self, lr_schedule: Schedule) -> None:
        """
        Create the networks and the optimizer.

        :param lr_schedule: Learning rate schedule
            lr_schedule(1) is the initial learning rate
        """
        for extractor in self._features_extractors():
            if not isinstance(extractor, NORMALIZED) and any(isinstance(x, RunningNormalization) for x in extractor.modules()):
                raise ValueError(
                    f"`features_extractor_class`: the statistics within {type(extractor).__name__} would never be updated: "
                    f"derive it from {NORMALIZED[0].__name__} or {NORMALIZED[1].__name__}"
                )
        self._build_mlp_extractor()
        net_arch = self.net_arch
        self.action_net = FlowNetwork(
            self.mlp_extractor.latent_dim_pi,
            get_action_dim(self.action_space),
            net_arch.get("pi", []) if isinstance(net_arch, dict) else net_arch,
            self.activation_fn,
            self.timestep_embedding_dim,
            output_scale=self.output_scale,
            skip_connection=self.skip_connection,
            prediction_type=self.prediction_type,
        )
        self.value_net = nn.Linear(self.mlp_extractor.latent_dim_vf, 1)
        self.value_normalization = ValueNormalization() if self.normalize_values else None

        if self.ortho_init:
            self.apply(lambda module: self.init_weights(module, gain=np.sqrt(2)))
            self.init_weights(self.action_net.layers[-1] if len(self.action_net.layers) else self.action_net.input_layer, 0.01)
            self.init_weights(self.value_net, gain=1)
        else:
            for module in (self.action_net, self.mlp_extractor, self.value_net):
                module.apply(lecun_uniform_init)

        # Setup optimizer with initial learning rate
        self.optimizer = make_optimizer(self.optimizer_class, self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        for name in ("log_std_init", "full_std", "use_expln", "squash_output"):
            del data[name]
        return data | dict(
            squash_type=self.squash_type,
            action_scale=self.action_scale,
            share_features_extractor=self.share_features_extractor,
            n_flow_steps=self.n_flow_steps,
            prediction_type=self.prediction_type,
            output_scale=self.output_scale,
            skip_connection=self.skip_connection,
            normalize_values=self.normalize_values,
            timestep_embedding_dim=self.timestep_embedding_dim,
        )

    def _check_action_net(self) -> None:
        if not hasattr(self.action_net, "sample"):
            raise ValueError(f"`action_net` must be a FlowNetwork, it is a {type(self.action_net).__name__}")

    def _actor(self) -> nn.ModuleList:
        """What acts, with the extractor between features and flow network if it has layers for it."""
        self._check_action_net()
        features_extractor = self.features_extractor if self.share_features_extractor else self.pi_features_extractor
        extractors = [] if _passes_features(self.mlp_extractor) else [self.mlp_extractor]
        return nn.ModuleList([features_extractor, self.action_net, *extractors])

    def actor_parameters(self) -> list[nn.Parameter]:
        """:return: what the actions depend on, with a features extractor that is shared"""
        of_values = {*self.mlp_extractor.value_net.parameters()} if isinstance(self.mlp_extractor, MlpExtractor) else set()
        return [parameter for parameter in self._actor().parameters() if parameter not in of_values]

    def load_actor(self, state_dict: Mapping[str, Any]) -> None:
        """
        Act as a clone does.

        :param state_dict: Parameters and buffers of its actor
        """
        self._actor().load_state_dict(state_dict)

    @classmethod
    def arguments_of_clone(cls, clone: OfflinePolicy) -> dict[str, Any]:
        """
        :param clone: Policy whose flow clones a dataset
        :return: arguments of a policy with the same flow network, but for ``net_arch``
        """
        return dict(
            activation_fn=clone.activation_fn,
            features_extractor_class=clone.features_extractor_class,
            features_extractor_kwargs=clone.features_extractor_kwargs,
            # What the value function learns does not change the actor
            share_features_extractor=False,
            normalize_images=clone.normalize_images,
            squash_type="clip",
            action_scale=1.0,
            output_scale=1.0,
            timestep_embedding_dim=0,
            n_flow_steps=clone.n_flow_steps,
        )

    def separate_critic(self) -> None:
        """Have two groups of parameters in the optimizer, which is new: those of the actor, and the others."""
        if len(self.optimizer.param_groups) != 1:
            raise ValueError(
                f"`critic_learning_rate` must be None: the optimizer has {len(self.optimizer.param_groups)} groups of its own"
            )
        (group,) = self.optimizer.param_groups
        actor = {*self.actor_parameters()}
        others = [parameter for parameter in group["params"] if parameter not in actor]
        group["params"] = [parameter for parameter in group["params"] if parameter in actor]
        self.optimizer.add_param_group({**group, "params": others})

    def _latent_pi_and_values(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        :param obs: Observation
        :return: what the flow network takes, (batch, latent_dim_pi), and the estimated value, (batch, 1)
        """
        features: Any = self.extract_features(obs)
        pi_features, vf_features = (features, features) if self.share_features_extractor else features
        value_mlp = self._value_mlp(vf_features.dtype) if runs_in_place(vf_features) else None
        if value_mlp is not None:
            return pi_features, self._denormalize(value_mlp(vf_features))
        if self.share_features_extractor:
            latent_pi, latent_vf = self.mlp_extractor(features)
        else:
            latent_pi, latent_vf = self.mlp_extractor.forward_actor(pi_features), self.mlp_extractor.forward_critic(
                vf_features
            )
        return latent_pi, self._denormalize(self.value_net(latent_vf))

    def _denormalize(self, values: th.Tensor) -> th.Tensor:
        return values if self.value_normalization is None else self.value_normalization(values)

    def update_normalization(self, obs: PyTorchObs) -> None:
        """
        Take the observations of a rollout into the statistics that they are normalized with.

        :param obs: Observation
        """
        preprocessed: Any = preprocess_obs(obs, self.observation_space, normalize_images=self.normalize_images)
        for extractor in self._features_extractors():
            if isinstance(extractor, NORMALIZED):
                extractor.update(preprocessed)

    def fit_normalization(self, observations: Iterable[PyTorchObs]) -> None:
        """
        Normalize observations with the statistics of these, from now on. What does not vary among them, but for rounding, is
        not divided by anything.

        :param observations: Batches of them
        """
        statistics = [
            module for x in self._features_extractors() for module in x.modules() if isinstance(module, RunningStatistics)
        ]
        if not statistics:
            return
        for module in statistics:
            module.reset()
        for batch in observations:
            self.update_normalization(batch)
        for module in statistics:
            module.var[module.var <= (1e-6 * module.mean).square()] = 1.0
            # What comes later has no weight beside these
            module.count.fill_(math.inf)

    def _features_extractors(self) -> list[BaseFeaturesExtractor]:
        if self.share_features_extractor:
            return [self.features_extractor]
        return [self.pi_features_extractor, self.vf_features_extractor]

    def _value_mlp(self, dtype: th.dtype) -> PlainMLP | None:
        """The value network as an MLP, None unless it is a plain one of the features."""
        modules = self._modules
        key = (modules["mlp_extractor"], modules["value_net"], dtype)
        mlp = self._memory.get(key)
        if mlp is None or mlp.has_changed():
            self._memory.clear()
            if not _passes_features(self.mlp_extractor):
                return None
            parents = [self.mlp_extractor, self.mlp_extractor.policy_net]
            self._memory[key] = mlp = PlainMLP.find([self.mlp_extractor.value_net, self.value_net], dtype, parents)
        return mlp

    def _latent_pi(self, obs: PyTorchObs, actor: nn.ModuleList) -> th.Tensor:
        """
        :param obs: Observation
        :param actor: The actor, or its moving average
        :return: what its flow network takes, as :meth:`forward` computes it, (batch, latent_dim_pi)
        """
        features_extractor, _, *mlp_extractors = actor
        features: Any
        if self._overrides_extract_features():
            features = self.extract_features(obs)
            features = features if self.share_features_extractor else features[0]
        else:
            features = BasePolicy.extract_features(self, obs, cast(BaseFeaturesExtractor, features_extractor))
        (mlp_extractor,) = cast(list[MlpExtractor], mlp_extractors or [self.mlp_extractor])
        if _passes_features(mlp_extractor) and is_plain(mlp_extractor) and is_plain(mlp_extractor.policy_net):
            return features
        return mlp_extractor(features)[0] if self.share_features_extractor else mlp_extractor.forward_actor(features)

    def _overrides_extract_features(self) -> bool:
        return getattr(self.extract_features, "__func__", None) is not ActorCriticPolicy.extract_features

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """
        Get the estimated values according to the current policy given the observations.

        :param obs: Observation
        :return: the estimated values, (batch, 1)
        """
        return self._latent_pi_and_values(obs)[1]

    def _shape_actions(self, actions: th.Tensor, obs: PyTorchObs) -> th.Tensor:
        """
        :param actions: Raw actions, (batch, action_dim)
        :param obs: Observation they are for
        :return: ``(batch, *action_space.shape)``
        :raises ValueError: if they are not finite
        """
        # (one number tells)
        if not is_transformed() and not math.isfinite(actions.sum()):
            obs_tensors = obs.values() if isinstance(obs, dict) else [obs]
            valid = all(bool(th.isfinite(tensor).all()) for tensor in obs_tensors)
            cause = "the weights of the policy are not finite, or too large" if valid else "NaN or inf in the observations"
            raise ValueError(f"The policy could not compute a finite action: {cause}")
        # (of a Box, whose shape is not None)
        return actions.reshape((-1, *cast(spaces.Box, self.action_space).shape))

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        Get the raw action for a given observation.

        :param observation:
        :param deterministic: Whether to integrate from zero noise ("zero-sampling" of FPO++) or from a random one
        :return: Raw action, (batch, action_dim)
        """
        return self._sample(*self._predicting_actor(observation), deterministic)

    def _predicting_actor(self, obs: PyTorchObs) -> tuple[FlowNetwork, th.Tensor]:
        """The flow network that predicts, and the features that it takes."""
        actor = self._actor()
        return cast(FlowNetwork, actor[1]), self._latent_pi(obs, actor)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of what an action is made of, see :meth:`act`."""
        return (self.action_net.action_dim,)

    @abstractmethod
    def act(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        """
        What ``predict`` makes of standard normal noise, or of zeros (deterministic).

        :param obs: Observation, a tensor (see ``obs_to_tensor``)
        :param noise: (batch, \\*noise_shape)
        :return: Raw action, (batch, action_dim)
        """

    @abstractmethod
    def _sample(self, action_net: FlowNetwork, features: th.Tensor, deterministic: bool) -> th.Tensor:
        """
        :param action_net: The flow network that predicts
        :param features: (batch, features_dim)
        :param deterministic: Whether to integrate from zero noise
        :return: Raw action, (batch, action_dim)
        """

    def _draw_noise(self, features: th.Tensor) -> th.Tensor:
        return th.randn((len(features), self.action_net.action_dim), dtype=features.dtype, device=features.device)

    def velocity_field(self, obs: PyTorchObs) -> VelocityField:
        """
        The velocity field that the policy predicts with, for pictures and diagnostics.

        :param obs: Observation, a tensor (see ``obs_to_tensor``)
        :return: function of x, (batch, action_dim), and the time, a float, to the velocity, (batch, action_dim)
        """
        with th.no_grad():
            action_net, features = self._predicting_actor(obs)
            return action_net.velocity_field(features, self.n_flow_steps)

    def flow_output(self, obs: PyTorchObs, x_t: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        """
        Evaluate the flow network at points of the paths between noise and action.

        :param obs: Observation
        :param x_t: Any number of points for each observation, (batch, ..., action_dim)
        :param timesteps: Their times, (batch, ...), or what broadcasts to it
        :return: output of the flow network, (batch, ..., action_dim)
        """
        return self._flow_output(self._latent_pi(obs, self._actor()), x_t, timesteps)

    def _flow_output(self, latent_pi: th.Tensor, x_t: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        self._check_action_net()
        shape = x_t.shape[:-1]
        # Timesteps that all actions have in common are taken once, by a network that is known to
        if not (is_plain(self.action_net) and timesteps.shape == (shape[0], 1, *shape[2:])):
            timesteps = timesteps.expand(shape)
        # (there may be a single point)
        outputs = self.action_net(latent_pi, x_t.unsqueeze(1).flatten(1, -2), timesteps.unsqueeze(1).flatten(1))
        return outputs.view(x_t.shape)

    def _register_bounds(self) -> None:
        assert isinstance(self.action_space, spaces.Box)
        bounded, middle = is_bounded(self.action_space), middle_and_half_range(self.action_space)[0]
        soft_bound = SOFT_BOUNDS[self.squash_type]
        # The others are in env units, and the soft bounds as far from the bounds that there are
        low = np.where(bounded, -soft_bound, self.action_space.low - middle - (soft_bound - 1))
        high = np.where(bounded, soft_bound, self.action_space.high - middle + (soft_bound - 1))
        for name, value in (("_bounded", bounded), ("_soft_low", low), ("_soft_high", high)):
            self.register_buffer(name, th.as_tensor(value.flatten(), dtype=th.get_default_dtype()), persistent=False)

    def bounds_loss(self, actions: th.Tensor) -> th.Tensor:
        """
        Squared distance of raw actions from the soft bounds, zero inside. Beyond them the actions that the environment
        receives are all about the same, so that no reward brings a policy back.

        :param actions: Raw actions, (..., action_dim)
        :return: Sum over the dimensions, in units of half the distance of the bounds of the action space, (...,)
        """
        actions = self.action_scale * actions
        return (actions - actions.detach().clamp(self._soft_low, self._soft_high)).square().sum(dim=-1)

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        raise NotImplementedError("A flow policy has no closed-form distribution: sample from it with predict()")

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        raise NotImplementedError("A flow policy has no closed-form likelihood")

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        """
        Raw action of an action of the environment: the inverse of ``unscale_action``
        (an action on the bounds is taken to be slightly inside for a tanh).

        :param action: Action, in env units
        :return: Raw action, zero where the bounds are equal
        """
        action = super().scale_action(action)
        if self.squash_type == "tanh":
            action = np.arctanh(np.clip(action, -1 + 1e-6, 1 - 1e-6))
        return action / self.action_scale

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """
        Action that the environment receives for a raw action: squashed, and rescaled to the bounds of the action space.

        :param scaled_action: Raw action
        :return: Action, in env units
        """
        assert isinstance(self.action_space, spaces.Box)
        action = self.action_scale * scaled_action
        if self.squash_type == "tanh":
            action = np.tanh(action)
        else:
            clipped = np.clip(action, -1, 1)
            action = clipped if self.action_space.is_bounded() else np.where(is_bounded(self.action_space), clipped, action)
        # To bounds by themselves, and where rounding has put an action just outside
        return np.clip(super().unscale_action(action), self.action_space.low, self.action_space.high)


def _passes_features(mlp_extractor: nn.Module) -> bool:
    """Whether an extractor is SB3's, without layers for the actor."""
    if type(mlp_extractor) is not MlpExtractor:
        return False
    return type(mlp_extractor.policy_net) is nn.Sequential and len(mlp_extractor.policy_net) == 0


def _check_action_space(action_space: spaces.Space, squash_type: str) -> None:
    if not isinstance(action_space, spaces.Box):
        raise ValueError(f"`action_space` must be a Box: a flow policy is for continuous actions, not for {action_space}")
    if not np.issubdtype(action_space.dtype, np.floating):
        raise ValueError(f"`action_space` must have a floating point dtype, it is {action_space}")
    if squash_type == "tanh" and not action_space.is_bounded():
        raise ValueError(
            f'`squash_type="tanh"` needs an action space with finite bounds, it is {action_space}: '
            'use squash_type="clip", or bound the actions'
        )
    warn_if_too_wide(action_space)
