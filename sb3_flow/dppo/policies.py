from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_flow.common.checks import FINITE_POSITIVE, to_float
from sb3_flow.common.flow import sampler_grid
from sb3_flow.common.networks import FlowNetwork
from sb3_flow.common.normalization import NormalizedCombinedExtractor, NormalizedFlattenExtractor
from sb3_flow.offline.policies import OfflinePolicy
from sb3_flow.on_policy.policies import FlowActorCriticPolicy


class DPPOPolicy(FlowActorCriticPolicy):
    """
    Actor-critic policy whose actor is a flow with noise: from Gaussian noise (t = 1) to the action (t = 0), each step of
    Euler's method adds some, so that the step is a Gaussian whose likelihood is known. Used by DPPO.

    The flow lives in an unbounded space: a *raw* action. The environment receives ``action_scale * raw`` clipped to [-1, 1]
    (or, with ``squash_type="tanh"``, its tanh), rescaled to the bounds of the action space. In a dimension without two finite
    bounds it receives ``action_scale * raw`` in env units, added to the legal action that is closest to zero, and clipped to a
    bound if there is one. Buffers and losses only see raw actions.

    :param observation_space: Observation space
    :param action_space: Action space, a ``Box`` (with finite bounds for ``squash_type="tanh"``)
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: The specification of the policy (flow) and value networks.
    :param activation_fn: Activation function
    :param ortho_init: Whether to use or not orthogonal initialization, which makes a new network almost zero: its actions are
        the sum of all noise. Otherwise weights are LeCun-uniform (authors' code of FPO).
    :param use_sde: gSDE has no meaning for a flow: must be False
    :param squash_type: How to bring actions into the bounds: "clip" or "tanh"
    :param action_scale: Factor on the raw action before it is squashed. The raw actions of a new policy have a standard
        deviation of ``sqrt(1 + n_flow_steps * noise_std**2)``, which is 1.6 by default: exploration starts with this times
        ``action_scale``, where a Gaussian policy has ``exp(log_std_init)``.
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
    :param noise_std: Standard deviation of the noise of each step, the last one too, of raw actions
    :param output_scale: Factor on the output of the flow network
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
        noise_std: float = 0.4,
        output_scale: float = 4.0,
        normalize_values: bool = True,
        timestep_embedding_dim: int = 8,
    ):
        self.noise_std = to_float("noise_std", noise_std, FINITE_POSITIVE)
        # Arguments of the constructor that set_sampler() has changed
        self.changed_sampler: dict[str, Any] = {}
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
            output_scale=output_scale,
            normalize_values=normalize_values,
            timestep_embedding_dim=timestep_embedding_dim,
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters() | dict(noise_std=self.noise_std)
        for name in ("prediction_type", "skip_connection"):
            del data[name]
        return data

    def set_sampler(self, noise_std: float) -> None:
        """
        Sample with other noise from now on, also after training. It is saved with the model.

        :param noise_std: Standard deviation of the noise of each step
        :raises ValueError: if it is not positive
        """
        self.noise_std = to_float("noise_std", noise_std, FINITE_POSITIVE)
        self.changed_sampler = dict(noise_std=self.noise_std)

    @classmethod
    def arguments_of_clone(cls, clone: OfflinePolicy) -> dict[str, Any]:
        if clone.sampler != "euler":
            raise ValueError(f'`clone` must have the sampler "euler", as DPPO does, it has "{clone.sampler}"')
        return super().arguments_of_clone(clone)

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        raise NotImplementedError("Only the likelihood of the steps of a chain is known: see evaluate_chains()")

    # (a chain in place of the log probability)
    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:  # type: ignore[override]
        """
        Forward pass in all the networks (actor and critic), to collect a rollout

        :param obs: Observation
        :param deterministic: Whether to leave out all noise
        :return: raw action, ``(batch, *action_space.shape)``, value, (batch, 1), and, in place of the log probability, the
            states of the chain from the noise to it, (batch, n_flow_steps + 1, action_dim)
        :raises ValueError: if the action is not finite, telling whether the observation or the weights are the cause
        """
        features, values = self._latent_pi_and_values(obs)
        self._check_action_net()
        chain = self._chain(self.action_net, features, deterministic)
        return self._shape_actions(chain[:, -1], obs), values, chain

    def sample_chain(self, obs: PyTorchObs) -> th.Tensor:
        """
        How actions come about.

        :param obs: Observation, a tensor (see ``obs_to_tensor``)
        :return: states from the noise to the raw action, (batch, n_flow_steps + 1, action_dim)
        """
        with th.no_grad():
            return self._chain(*self._predicting_actor(obs), deterministic=False)

    def _chain(self, action_net: FlowNetwork, features: th.Tensor, deterministic: bool) -> th.Tensor:
        """
        :param action_net: The flow network
        :param features: (batch, features_dim)
        :param deterministic: Whether to leave out all noise
        :return: states from the noise to the raw action, (batch, n_flow_steps + 1, action_dim)
        """
        shape = (self.n_flow_steps, len(features), action_net.action_dim)
        if deterministic:
            return action_net.sample_chain(features, features.new_zeros(shape[1:]), features.new_zeros(shape))
        step_noise = self.noise_std * th.randn(shape, dtype=features.dtype, device=features.device)
        return action_net.sample_chain(features, self._draw_noise(features), step_noise)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """That of the start, and of each step: (n_flow_steps + 1, action_dim)."""
        return (self.n_flow_steps + 1, self.action_net.action_dim)

    def act(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        action_net, features = self._predicting_actor(obs)
        return action_net.sample_chain(features, noise[:, 0], self.noise_std * noise[:, 1:].movedim(1, 0))[:, -1]

    def _sample(self, action_net: FlowNetwork, features: th.Tensor, deterministic: bool) -> th.Tensor:
        return self._chain(action_net, features, deterministic)[:, -1]

    def evaluate_chains(self, obs: PyTorchObs, states: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Evaluate the value function, and the Gaussians of the last steps of denoising chains.

        :param obs: Observation
        :param states: Where each of these steps starts, (batch, n_steps, action_dim)
        :return: estimated value, (batch, 1), means of the states after each step, with the standard deviation
            ``noise_std``, and the actions that it is on its way to, (batch, n_steps, action_dim)
        """
        features, values = self._latent_pi_and_values(obs)
        timesteps = states.new_tensor(sampler_grid(self.n_flow_steps)[-states.shape[1] :])
        velocities = self._flow_output(features, states, timesteps)
        means = th.sub(states, velocities, alpha=1 / self.n_flow_steps)
        return values, means, states - timesteps.unsqueeze(1) * velocities


class DPPOCnnPolicy(DPPOPolicy):
    """
    DPPO's policy for image observations: :class:`.DPPOPolicy` (where the parameters are described)
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


class DPPOMultiInputPolicy(DPPOPolicy):
    """
    DPPO's policy for ``Dict`` observations: :class:`.DPPOPolicy` (where the parameters are described)
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


MlpPolicy = DPPOPolicy
CnnPolicy = DPPOCnnPolicy
MultiInputPolicy = DPPOMultiInputPolicy
