import math
from collections.abc import Mapping
from functools import partial
from itertools import chain
from typing import Any, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sb3_flow.common.activations import is_transformed
from sb3_flow.common.checks import DECAY, NOT_NEGATIVE, to_float, to_int
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
from sb3_flow.common.in_place import hidden_attributes, hooks_of
from sb3_flow.common.likelihood import log_likelihood, noisy_log_likelihood
from sb3_flow.common.networks import FlowNetwork
from sb3_flow.common.normalization import NormalizedCombinedExtractor, NormalizedFlattenExtractor, RunningStatistics
from sb3_flow.common.samplers import check_sampler
from sb3_flow.offline.policies import OfflinePolicy
from sb3_flow.on_policy.policies import FlowActorCriticPolicy


class FlowPolicy(FlowActorCriticPolicy):
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
        ``n_baseline_actions`` in :class:`.FPO`: without them, only one of two equally good actions is kept.
        (The authors' code has none.)
    :param sampler: "euler", "sde" (stochastic Euler), or, with the extra ``solvers``, "midpoint", "heun", "rk4" or "dopri5"
        (adaptive: ``n_flow_steps`` has no meaning for it), see :mod:`sb3_flow.common.samplers`.
        It can be changed later: :meth:`set_sampler`.
    :param sampler_sigma: Standard deviation of the noise that the "sde" sampler adds at each step
    :param action_perturbation_std: Standard deviation of the Gaussian noise added to the raw actions
        during training (exploration); predictions are not perturbed
    :param ema_decay: Decay of the exponential moving average of the actor that predicts, see :class:`.FPO`.
        No average is kept if None.
    :param normalize_values: Whether the value network learns values that are normalized by the returns (PopArt)
    :param timestep_embedding_dim: Number of features of the timestep, sines and cosines (authors' code), or 0 for the timestep
        itself
    :raises ValueError: if an argument has no meaning for a flow policy or is out of its range
    """

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
        timestep_embedding_dim: int = 8,
    ):
        check_sampler(sampler, n_flow_steps, sampler_sigma)
        self.sampler = sampler
        self.sampler_sigma = to_float("sampler_sigma", sampler_sigma)
        self.action_perturbation_std = to_float("action_perturbation_std", action_perturbation_std, NOT_NEGATIVE)
        # Arguments of the constructor that set_sampler() has changed
        self.changed_sampler: dict[str, Any] = {}
        #: Whether :meth:`forward` runs as a CUDA graph where it can, see ``compile`` of :class:`.FPO`
        self.captures_forward = False
        self._graphs = Graphs()

        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch,
            activation_fn,
            ortho_init,
            use_sde,
            squash_type,
            action_scale,
            features_extractor_class,
            features_extractor_kwargs,
            share_features_extractor,
            normalize_images,
            optimizer_class,
            optimizer_kwargs,
            n_flow_steps,
            prediction_type,
            output_scale,
            skip_connection,
            normalize_values,
            timestep_embedding_dim,
        )
        self.ema_decay: float | None = None
        self.ema: AveragedModel | None = None
        if ema_decay is not None:
            self.create_ema(ema_decay)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | dict(
            sampler=self.sampler,
            sampler_sigma=self.sampler_sigma,
            action_perturbation_std=self.action_perturbation_std,
            ema_decay=None if self.ema is None else self.ema_decay,
        )

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

    def load_actor(self, state_dict: Mapping[str, Any]) -> None:
        super().load_actor(state_dict)
        if self.ema is not None:
            self.update_ema(restart=True)

    @classmethod
    def arguments_of_clone(cls, clone: OfflinePolicy) -> dict[str, Any]:
        of_flow = dict(prediction_type="velocity", skip_connection=False, sampler=clone.sampler)
        return super().arguments_of_clone(clone) | of_flow

    def _check_average(self) -> None:
        if _structure(self._actor()) != self._averaged:
            raise ValueError(
                "The networks of the actor were replaced or changed: call `create_ema()` again, for an average of the new ones"
            )

    # (ActorCriticPolicy says what is returned without types)
    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:  # type: ignore[override]
        """
        Forward pass in all the networks (actor and critic), to collect a rollout

        :param obs: Observation
        :param deterministic: Whether to integrate from zero noise, without perturbation
        :return: raw action, ``(batch, *action_space.shape)``, value, (batch, 1), and zeros, (batch,),
            in place of the log probability, which a flow policy does not need
        :raises ValueError: if the action is not finite, telling whether the observation or the weights are the cause
        """
        actions, values = self._collect(obs, deterministic)
        return self._shape_actions(actions, obs), values, values.new_zeros(values.shape[0])

    def _collect(self, obs: PyTorchObs, deterministic: bool) -> tuple[th.Tensor, th.Tensor]:
        in_graph = None
        if self.captures_forward and not deterministic and not th.is_grad_enabled() and not is_transformed():
            in_graph = self._forward_in_graph(obs)
        return self._actions_and_values(obs, deterministic) if in_graph is None else in_graph

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

    def _predicting_actor(self, obs: PyTorchObs) -> tuple[FlowNetwork, th.Tensor]:
        """The flow network that predicts, and the features that it takes."""
        if self.ema is not None and not is_transformed():
            self._check_average()
        actor = self._actor() if self.ema is None else cast(nn.ModuleList, self.ema.module)
        return cast(FlowNetwork, actor[1]), self._latent_pi(obs, actor)

    def act(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        action_net, features = self._predicting_actor(obs)
        return action_net.sample(features, noise, self.n_flow_steps, self.sampler, 0.0)

    def log_likelihood(self, obs: PyTorchObs, actions: th.Tensor, divergence: str = "exact", n_probes: int = 1) -> th.Tensor:
        """
        Log-likelihood of raw actions under the flow, whatever the sampler. A diagnostic: it takes many evaluations of the
        network, and no gradient flows through it. Needs the extra ``solvers``.

        :param obs: Observation, a tensor (see ``obs_to_tensor``)
        :param actions: Raw actions, (batch, action_dim), see ``scale_action``
        :param divergence: "exact" or, for many action dimensions, "hutchinson"
        :param n_probes: Number of random vectors of Hutchinson's estimate
        :return: (batch,)
        """
        return log_likelihood(self.velocity_field(obs), actions, divergence, n_probes)

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        raise NotImplementedError("A flow policy has no closed-form likelihood: see evaluate_flow() and log_likelihood()")

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


class FlowCnnPolicy(FlowPolicy):
    """
    Flow policy for image observations: :class:`.FlowPolicy` (where the parameters are described)
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
    Flow policy for ``Dict`` observations: :class:`.FlowPolicy` (where the parameters are described)
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
