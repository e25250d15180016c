from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_flow.common.activations import TanhGELU
from sb3_flow.common.bounds import RescaledActionsPolicy, warn_if_too_wide
from sb3_flow.common.checks import to_bool, to_int, to_net_arch
from sb3_flow.common.networks import ImpalaCNN
from sb3_flow.common.optimizers import make_optimizer
from sb3_flow.offline.policies import BCFlow, EnsembleCritic, OneStepActor, check_flow_sampler


class FQLPolicy(RescaledActionsPolicy):
    """
    Policy class of FQL: the one-step ``actor`` that acts, the ``bc_flow`` it is distilled from, the ``critic``
    and its target. Each has a features extractor of its own, unless it is shared.

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
    """

    actor: OneStepActor
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
        self.net_arch = [512, 512, 512, 512] if net_arch is None else to_net_arch(net_arch, ("pi", "qf"))
        self.activation_fn = activation_fn
        self.n_critics = to_int("n_critics", n_critics, at_least=1)
        self.layer_norm = to_bool("layer_norm", layer_norm)
        self.n_flow_steps = to_int("n_flow_steps", n_flow_steps)
        self.share_features_extractor = to_bool("share_features_extractor", share_features_extractor)
        self.sampler = sampler
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
            action_space=self.action_space,
            activation_fn=self.activation_fn,
            normalize_images=self.normalize_images,
        )
        actor_args = dict(net_args, net_arch=actor_arch)
        critic_args = dict(net_args, net_arch=critic_arch, n_critics=self.n_critics, layer_norm=self.layer_norm)
        self.actor = OneStepActor(**self._update_features_extractor(actor_args))
        shared = self.actor.features_extractor if self.share_features_extractor else None
        flow_args = dict(actor_args, n_flow_steps=self.n_flow_steps, sampler=self.sampler)
        self.bc_flow = BCFlow(**self._update_features_extractor(flow_args, shared))
        self.critic = EnsembleCritic(
            **self._update_features_extractor(critic_args, shared), share_features_extractor=self.share_features_extractor
        )
        # The target network has its own, which follows
        self.critic_target = EnsembleCritic(**self._update_features_extractor(critic_args))
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
            )
        )
        return data

    def set_sampler(self, sampler: str | None = None, n_flow_steps: int | None = None) -> None:
        """
        Sample the flow, ``bc_flow``, in another way from now on, also after training. It is saved with the model.
        The one-step actor, which acts, does not change; if the training goes on, it is distilled from this.

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

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        Get the action of the one-step policy.

        :param observation:
        :param deterministic: Whether to act from zero noise, or from a random one as the authors do
        :return: Action in [-1, 1]
        """
        return self.actor._predict(observation, deterministic)

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the policy in either training or evaluation mode.

        This affects certain modules, such as batch normalisation and dropout.

        :param mode: if true, set to training mode, else set to evaluation mode
        """
        for network in (self.actor, self.bc_flow, self.critic):
            network.set_training_mode(mode)
        self.training = mode


class FQLCnnPolicy(FQLPolicy):
    """
    Policy class of FQL for image observations: :class:`FQLPolicy` (where the parameters are described)
    with a small IMPALA encoder as the default features extractor.
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


class FQLMultiInputPolicy(FQLPolicy):
    """
    Policy class of FQL for ``Dict`` observations: :class:`FQLPolicy` (where the parameters are described)
    with a ``CombinedExtractor`` as the default features extractor.
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


MlpPolicy = FQLPolicy
CnnPolicy = FQLCnnPolicy
MultiInputPolicy = FQLMultiInputPolicy
