import math
from collections.abc import Mapping
from functools import partial
from itertools import chain
from typing import Any, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim, preprocess_obs
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    MlpExtractor,
    NatureCNN,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sb3_flow.common.activations import is_transformed
from sb3_flow.common.bounds import RescaledActionsPolicy, is_bounded, middle_and_half_range, warn_if_too_wide
from sb3_flow.common.checks import DECAY, NOT_NEGATIVE, POSITIVE, to_bool, to_float, to_int, to_net_arch
from sb3_flow.common.cuda_graphs import (
    CAPTURED_SAMPLERS,
    CapturedFunction,
    Graphs,
    clone,
    copy_into,
    find_obstacle,
    global_state,
    layout,
)
from sb3_flow.common.flow import PREDICTION_TYPES, check_choice
from sb3_flow.common.in_place import Memory, PlainMLP, hidden_attributes, hooks_of, is_plain, runs_in_place
from sb3_flow.common.likelihood import log_likelihood, noisy_log_likelihood
from sb3_flow.common.networks import FlowNetwork, lecun_uniform_init
from sb3_flow.common.normalization import (
    NormalizedCombinedExtractor,
    NormalizedFlattenExtractor,
    RunningNormalization,
    RunningStatistics,
    ValueNormalization,
)
from sb3_flow.common.optimizers import make_optimizer
from sb3_flow.common.samplers import VelocityField, check_sampler

#: How raw actions are brought into the bounds.
SQUASH_TYPES = ("clip", "tanh")
#: Numbers of units of the hidden layers: the flow needs some to bring its inputs together, also behind a CNN
DEFAULT_NET_ARCH: dict[str, list[int]] = dict(pi=[64, 64], vf=[256, 256])
#: How far from the middle actions may be without a loss (``bounds_loss_coef``), in units of half the distance of the bounds,
#: before they are squashed or clipped.
SOFT_BOUNDS = {"tanh": 3.0, "clip": 1.5}


#: Features extractors with statistics
NORMALIZED = (NormalizedFlattenExtractor, NormalizedCombinedExtractor)


class FlowPolicy(RescaledActionsPolicy, ActorCriticPolicy):
    """
    Actor-critic policy whose actor is a flow: an action is sampled by integrating a learned
    velocity field from Gaussian noise (t = 1) to the action (t = 0). Used by FPO.

    The flow lives in an unbounded space: a *raw* action. The environment receives ``action_scale * raw`` clipped to [-1, 1]
    (or, with ``squash_type="tanh"``, its tanh), rescaled to the bounds of the action space. In a dimension without two finite
    bounds it receives ``action_scale * raw`` in env units, added to the legal action that is closest to zero, and clipped to a
    bound if there is one. Buffers and losses only see raw actions.

    :param observation_space: Observation space
    :param action_space: Action space, a ``Box`` (with finite bounds for ``squash_type="tanh"``)
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: The specification of the policy (flow) and value networks.
    :param activation_fn: Activation function
    :param ortho_init: Whether to use or not orthogonal initialization, which makes a new network almost linear: to be used
        with a larger ``output_scale``. Otherwise weights are LeCun-uniform (authors' code).
    :param use_sde: gSDE has no meaning for a flow: must be False
    :param squash_type: How to bring actions into the bounds: "clip", which keeps the noise of exploration the same when the
        actions are large, or "tanh" (authors' code)
    :param action_scale: Factor on the raw action before it is squashed. The raw actions of a new policy are about
        standard normal: this is the standard deviation that exploration starts with, as ``exp(log_std_init)``
        is for a Gaussian policy. (The "sde" sampler adds its own noise, and with ``prediction_type="noise"`` so do the
        layers of a new network: 1.07 times this with 10 steps.)
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
    :param n_flow_steps: Number of steps of the sampler, from noise to action
    :param prediction_type: What the flow network predicts: "velocity", "noise" or "action"
    :param output_scale: Factor on the output of the flow network
    :param skip_connection: Whether the network only learns the difference from the flow that leaves a standard normal
        distribution as it is: then a new policy is a standard Gaussian, and its CFM loss close to its least. For
        ``n_baseline_actions`` in :class:`FPO`: without them, only one of two equally good actions is kept.
        (The authors' code has none.)
    :param sampler: "euler", "sde" (stochastic Euler), or, with the extra ``solvers``, "midpoint", "heun", "rk4" or "dopri5"
        (adaptive: ``n_flow_steps`` has no meaning for it), see :mod:`sb3_flow.common.samplers`.
        It can be changed later: :meth:`set_sampler`.
    :param sampler_sigma: Standard deviation of the noise that the "sde" sampler adds at each step
    :param action_perturbation_std: Standard deviation of the Gaussian noise added to the raw actions
        during training (exploration); predictions are not perturbed
    :param ema_decay: Decay of the exponential moving average of the actor that predicts, see :class:`FPO`.
        No average is kept if None.
    :param normalize_values: Whether the value network learns values that are normalized by the returns (PopArt)
    :raises ValueError: if an argument has no meaning for a flow policy or is out of its range
    """

    action_net: FlowNetwork
    #: Which dimensions have two finite bounds, and the soft bounds of all, in units of half the distance of the bounds
    _bounded: th.Tensor
    _soft_low: th.Tensor
    _soft_high: th.Tensor

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
        skip_connection: bool = True,
        sampler: str = "euler",
        sampler_sigma: float = 0.05,
        action_perturbation_std: float = 0.1,
        ema_decay: float | None = None,
        normalize_values: bool = True,
    ):
        check_choice("squash_type", squash_type, SQUASH_TYPES)
        _check_action_space(action_space, squash_type)
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_sampler(sampler, n_flow_steps, sampler_sigma)
        action_scale = to_float("action_scale", action_scale, POSITIVE)
        action_perturbation_std = to_float("action_perturbation_std", action_perturbation_std, NOT_NEGATIVE)
        if use_sde:
            raise ValueError("`use_sde` must be False: generalized State Dependent Exploration is for Gaussian policies")

        # Needed by _build(), which the constructor of the parent calls
        self.n_flow_steps = to_int("n_flow_steps", n_flow_steps)
        self.prediction_type = prediction_type
        self.output_scale = to_float("output_scale", output_scale)
        self.skip_connection = to_bool("skip_connection", skip_connection)
        self.sampler = sampler
        self.sampler_sigma = to_float("sampler_sigma", sampler_sigma)
        self.action_perturbation_std = action_perturbation_std
        self.ema_decay: float | None = None
        self.normalize_values = to_bool("normalize_values", normalize_values)
        # Arguments of the constructor that set_sampler() has changed
        self.changed_sampler: dict[str, Any] = {}
        self._memory = Memory()
        #: Whether :meth:`forward` runs as a CUDA graph where it can, see ``compile`` of :class:`FPO`
        self.captures_forward = False
        self._graphs = Graphs()

        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            to_net_arch(DEFAULT_NET_ARCH if net_arch is None else net_arch, ("pi", "vf")),
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
        self.ema: AveragedModel | None = None
        if ema_decay is not None:
            self.create_ema(ema_decay)

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
        data.update(
            dict(
                squash_type=self.squash_type,
                action_scale=self.action_scale,
                share_features_extractor=self.share_features_extractor,
                n_flow_steps=self.n_flow_steps,
                prediction_type=self.prediction_type,
                output_scale=self.output_scale,
                skip_connection=self.skip_connection,
                sampler=self.sampler,
                sampler_sigma=self.sampler_sigma,
                action_perturbation_std=self.action_perturbation_std,
                ema_decay=None if self.ema is None else self.ema_decay,
                normalize_values=self.normalize_values,
            )
        )
        return data

    def set_sampler(
        self, sampler: str | None = None, n_flow_steps: int | None = None, sampler_sigma: float | None = None
    ) -> None:
        """
        Sample in another way from now on, also after training: the flow stays the same. It is saved with the model.

        If the training goes on, its rollouts are sampled this way too, and the CFM losses are taken at the times of this
        number of steps (but for "uniform" ones, see :class:`~sb3_flow.common.flow.CFMLoss`).

        :param sampler: "euler", "sde", "midpoint", "heun", "rk4" or "dopri5". That of now if None, as the others.
        :param n_flow_steps: Number of steps
        :param sampler_sigma: Standard deviation of the noise that the "sde" sampler adds at each step
        :raises ValueError: if an argument is unknown or out of its range
        :raises ImportError: if the sampler needs torchdiffeq, and it is not installed
        """
        sampler = self.sampler if sampler is None else sampler
        n_flow_steps = self.n_flow_steps if n_flow_steps is None else n_flow_steps
        sampler_sigma = self.sampler_sigma if sampler_sigma is None else sampler_sigma
        check_sampler(sampler, n_flow_steps, sampler_sigma)
        self.changed_sampler = dict(
            sampler=sampler,
            n_flow_steps=to_int("n_flow_steps", n_flow_steps),
            sampler_sigma=to_float("sampler_sigma", sampler_sigma),
        )
        for name, value in self.changed_sampler.items():
            setattr(self, name, value)

    def create_ema(self, ema_decay: float) -> None:
        """
        Keep an exponential moving average of the actor (features extractor and flow network).
        From now on it is the one that predicts, while the actor itself collects the rollouts.

        :param ema_decay: Decay for one update, in (0, 1)
        """
        ema_decay = to_float("ema_decay", ema_decay, DECAY)
        if self._overrides_extract_features():
            raise ValueError("`ema_decay` must be None: `extract_features`, which is overridden, would not take the average's")
        self.ema_decay = ema_decay
        self.ema = AveragedModel(self._actor(), multi_avg_fn=partial(_average, decay=ema_decay), use_buffers=True)
        self.ema.requires_grad_(False)
        self._averaged = _structure(self._actor())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """
        Copy parameters and buffers from a state dictionary, see ``nn.Module``.

        :param state_dict: Parameters and buffers
        :param strict: Whether its keys must be those of this policy
        :param assign: Whether to take its tensors instead of copying them
        :return: names of missing and unexpected keys
        :raises ValueError: if it has a moving average and this policy has none, or the other way round
        """
        has_average = any(name.startswith("ema.") for name in state_dict)
        if strict and has_average != (self.ema is not None):
            found, wanted = ("a", "has none") if has_average else ("no", "has one")
            raise ValueError(
                f"What is loaded has {found} moving average of the actor, but this policy {wanted}: `ema_decay` must be "
                f"{'a number' if has_average else 'None'} here. It can be changed afterwards, by `policy.create_ema()` or "
                "`policy.ema = None`"
            )
        return super().load_state_dict(state_dict, strict, assign)

    def update_ema(self, restart: bool = False) -> None:
        """
        Update the moving average, after an iteration. Its statistics of observations are those of the actor.

        :param restart: Forget the past: make the average equal to the actor
        :raises ValueError: if networks of the actor were replaced or changed since there is an average
        """
        assert self.ema is not None, "create_ema() must be called first"
        self._check_average()
        if restart:
            self.ema.n_averaged.zero_()
        actor = self._actor()
        self.ema.update_parameters(actor)
        # Averages of them would be off for as long as the first ones, zero and one, have a weight
        for average, module in zip(self.ema.module.modules(), actor.modules(), strict=True):
            if isinstance(average, RunningStatistics):
                average.load_state_dict(module.state_dict())

    def _check_average(self) -> None:
        if _structure(self._actor()) != self._averaged:
            raise ValueError(
                "The networks of the actor were replaced or changed: call `create_ema()` again, for an average of the new ones"
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

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:  # type: ignore[override]
        """
        Forward pass in all the networks (actor and critic), to collect a rollout

        :param obs: Observation
        :param deterministic: Whether to integrate from zero noise, without perturbation
        :return: raw action, ``(batch, *action_space.shape)``, value, (batch, 1), and zeros, (batch,),
            in place of the log probability, which a flow policy does not need
        :raises ValueError: if the action is not finite, telling whether the observation or the weights are the cause
        """
        in_graph = None
        if self.captures_forward and not deterministic and not th.is_grad_enabled() and not is_transformed():
            in_graph = self._forward_in_graph(obs)
        actions, values = self._actions_and_values(obs, deterministic) if in_graph is None else in_graph
        # (one number tells)
        if not is_transformed() and not math.isfinite(actions.sum()):
            obs_tensors = obs.values() if isinstance(obs, dict) else [obs]
            valid = all(bool(th.isfinite(tensor).all()) for tensor in obs_tensors)
            cause = "the weights of the policy are not finite, or too large" if valid else "NaN or inf in the observations"
            raise ValueError(f"The policy could not compute a finite action: {cause}")
        # (of a Box, whose shape is not None)
        shape = cast(spaces.Box, self.action_space).shape
        return actions.reshape((-1, *shape)), values, values.new_zeros(values.shape[0])

    def _actions_and_values(self, obs: PyTorchObs, deterministic: bool) -> tuple[th.Tensor, th.Tensor]:
        latent_pi, values = self._latent_pi_and_values(obs)
        self._check_action_net()
        if deterministic:
            return self._sample(self.action_net, latent_pi, deterministic), values
        return self._explore(latent_pi, self._draw_noise(latent_pi)), values

    def _forward_in_graph(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor] | None:
        """
        :param obs: Observation
        :return: raw actions and values, None if there is no graph for it
        """
        graphs, key = self._graphs, global_state()
        if not graphs.is_current(key, self):
            graphs.restart(self._find_obstacle(), key, self)
        if graphs.obstacle is not None:
            return None
        name = (tuple(obs) if isinstance(obs, dict) else None, layout(obs))
        if name not in graphs:
            static = clone(obs)
            function = CapturedFunction(lambda: th.cat(self._actions_and_values(static, False), dim=1), self.device)
            graphs[name] = static, function
        static, function = graphs[name]
        copy_into(static, obs)
        result = function().clone()
        return result[:, :-1], result[:, -1:]

    def _find_obstacle(self) -> str | None:
        if type(self) not in (FlowPolicy, FlowCnnPolicy, FlowMultiInputPolicy):
            return f"{type(self).__name__} is a policy of its own"
        if self.sampler not in CAPTURED_SAMPLERS:
            return f'the sampler "{self.sampler}" waits for the device'
        return find_obstacle(self, [type(self), AveragedModel])

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        Get the raw action for a given observation, from the moving average of the actor if there is one.

        :param observation:
        :param deterministic: Whether to integrate from zero noise ("zero-sampling" of FPO++) or from a random one
        :return: Raw action, (batch, action_dim)
        """
        return self._sample(*self._predicting_actor(observation), deterministic)

    def _predicting_actor(self, obs: PyTorchObs) -> tuple[FlowNetwork, th.Tensor]:
        """The flow network that predicts, and the features that it takes."""
        if self.ema is not None and not is_transformed():
            self._check_average()
        actor = self._actor() if self.ema is None else cast(nn.ModuleList, self.ema.module)
        return cast(FlowNetwork, actor[1]), self._latent_pi(obs, actor)

    def velocity_field(self, obs: PyTorchObs) -> VelocityField:
        """
        The velocity field that the policy predicts with, for pictures and diagnostics.

        :param obs: Observation, a tensor (see ``obs_to_tensor``)
        :return: function of x, (batch, action_dim), and the time, a float, to the velocity, (batch, action_dim)
        """
        with th.no_grad():
            action_net, features = self._predicting_actor(obs)
            return action_net.velocity_field(features, self.n_flow_steps)

    def log_likelihood(self, obs: PyTorchObs, actions: th.Tensor, divergence: str = "exact", n_probes: int = 1) -> th.Tensor:
        """
        Log-likelihood of raw actions under the flow, whatever the sampler. A diagnostic: it takes many evaluations of the
        network, and no gradient flows through it. Needs the extra ``solvers``.

        :param obs: Observation, a tensor (see ``obs_to_tensor``)
        :param actions: Raw actions, (batch, action_dim), see :meth:`scale_action`
        :param divergence: "exact" or, for many action dimensions, "hutchinson"
        :param n_probes: Number of random vectors of Hutchinson's estimate
        :return: (batch,)
        """
        return log_likelihood(self.velocity_field(obs), actions, divergence, n_probes)

    def explore(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        """
        Actions as rollouts collect them, several for each observation.

        :param obs: Observation, a tensor (see ``obs_to_tensor``)
        :param noise: Where to integrate from, (batch, n_actions, action_dim)
        :return: Raw actions, (batch, n_actions, action_dim)
        """
        features = self._latent_pi(obs, self._actor())
        return self._explore(features.repeat_interleave(noise.shape[1], dim=0), noise.flatten(0, 1)).view(noise.shape)

    def exploration_log_likelihood(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        Log-likelihood of raw actions as rollouts collect them, with their perturbation, see
        :func:`~sb3_flow.common.likelihood.noisy_log_likelihood`. The sampler does not resolve the finest structure: there is
        noise of half of one of its steps at least. That of the "sde" sampler's steps is left out.

        :param obs: Observation, a tensor (see ``obs_to_tensor``)
        :param actions: Raw actions, (batch, action_dim)
        :return: (batch,)
        :raises ValueError: if ``action_net`` was replaced by a network without a velocity field
        """
        if not hasattr(self.action_net, "velocity_field"):
            raise ValueError(
                "`ent_coef` must be 0: the likelihood needs the `velocity_field` of a FlowNetwork, "
                f"{type(self.action_net).__name__} has none"
            )
        with th.no_grad():
            field = self.action_net.velocity_field(self._latent_pi(obs, self._actor()), self.n_flow_steps)
        noise_std = max(self.action_perturbation_std, 0.5 / self.n_flow_steps)
        return noisy_log_likelihood(field, actions, noise_std, self.n_flow_steps)

    def _explore(self, features: th.Tensor, noise: th.Tensor) -> th.Tensor:
        actions = self.action_net.sample(features, noise, self.n_flow_steps, self.sampler, self.sampler_sigma)
        if self.action_perturbation_std > 0:
            actions = actions + self.action_perturbation_std * th.randn_like(actions)
        return actions

    def _draw_noise(self, features: th.Tensor) -> th.Tensor:
        return th.randn((len(features), self.action_net.action_dim), dtype=features.dtype, device=features.device)

    def _sample(self, action_net: FlowNetwork, features: th.Tensor, deterministic: bool) -> th.Tensor:
        """
        :param action_net: The actor, or its moving average
        :param features: (batch, features_dim)
        :param deterministic: Whether to integrate from zero noise
        :return: Raw action, (batch, action_dim)
        """
        noise = features.new_zeros((features.shape[0], action_net.action_dim)) if deterministic else self._draw_noise(features)
        sigma = 0.0 if deterministic else self.sampler_sigma
        return action_net.sample(features, noise, self.n_flow_steps, self.sampler, sigma)

    def evaluate_flow(self, obs: PyTorchObs, x_t: th.Tensor, timesteps: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Evaluate the value function and, at points of the paths between noise and action
        (see :func:`~sb3_flow.common.flow.interpolate`), the flow network.

        :param obs: Observation
        :param x_t: Any number of points for each observation, (batch, ..., action_dim)
        :param timesteps: Their times, (batch, ...), or what broadcasts to it
        :return: estimated value, (batch, 1), and output of the flow network, (batch, ..., action_dim)
        """
        latent_pi, values = self._latent_pi_and_values(obs)
        return values, self._flow_output(latent_pi, x_t, timesteps)

    def flow_output(self, obs: PyTorchObs, x_t: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        """
        The second part of :meth:`evaluate_flow` by itself.

        :param obs: Observation
        :param x_t: (batch, ..., action_dim)
        :param timesteps: (batch, ...), or what broadcasts to it
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

    def log_squashing(self, actions: th.Tensor) -> th.Tensor:
        """
        What the log-density of actions gains where a tanh squashes them, up to a constant:
        :math:`-\\sum_d \\log(1 - \\tanh^2(s\\, a_d))` with ``action_scale`` :math:`s` (Haarnoja et al., https://arxiv.org/abs/1801.01290,
        eq. 21). With ``squash_type="clip"`` it stands in for the bounds, where there are two.

        :param actions: Raw actions, (..., action_dim)
        :return: (...,)
        """
        actions = self.action_scale * actions
        gains = actions.abs() + nn.functional.softplus(-2 * actions.abs()) - math.log(2)
        return 2 * (gains * self._bounded).sum(dim=-1)

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        raise NotImplementedError("A flow policy has no closed-form distribution: sample from it with predict()")

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        raise NotImplementedError("A flow policy has no closed-form likelihood: see evaluate_flow() and log_likelihood()")

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


def _structure(actor: nn.ModuleList) -> list[tuple]:
    """
    :param actor: The actor
    :return: what it computes, but for the values of its parameters: its modules and all that their copies do not share
    """
    return [
        (
            module,
            type(module),
            module.extra_repr(),
            [(name, None if x is None else x.shape) for name, x in module._parameters.items()],
            [*chain(*hooks_of(module))],
            # (a compiled one computes the same)
            {name for name in hidden_attributes(module) if callable(module.__dict__[name])} - {"_compiled_call_impl"},
        )
        for child in actor
        for module in child.modules()
    ]


def _average(averages: list[th.Tensor], values: list[th.Tensor], n_averaged: int, decay: float) -> None:
    # (what this returns cannot be pickled)
    get_ema_multi_avg_fn(decay)(averages, values, n_averaged)


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


class FlowCnnPolicy(FlowPolicy):
    """
    Flow policy for image observations: :class:`FlowPolicy` (where the parameters are described)
    with a ``NatureCNN`` as the default features extractor.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN,
        **kwargs,
    ):
        super().__init__(
            observation_space, action_space, lr_schedule, features_extractor_class=features_extractor_class, **kwargs
        )


class FlowMultiInputPolicy(FlowPolicy):
    """
    Flow policy for ``Dict`` observations: :class:`FlowPolicy` (where the parameters are described)
    with a ``NormalizedCombinedExtractor`` as the default features extractor.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        features_extractor_class: type[BaseFeaturesExtractor] = NormalizedCombinedExtractor,
        **kwargs,
    ):
        super().__init__(
            observation_space, action_space, lr_schedule, features_extractor_class=features_extractor_class, **kwargs
        )


MlpPolicy = FlowPolicy
CnnPolicy = FlowCnnPolicy
MultiInputPolicy = FlowMultiInputPolicy
