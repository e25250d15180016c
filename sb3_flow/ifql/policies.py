from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from sb3_flow.common.checks import to_int
from sb3_flow.offline.policies import OfflinePolicy, ValueNetwork, WithDict, WithImages, batch_size


class IFQLPolicy(OfflinePolicy):
    """
    Policy class of IFQL: the ``bc_flow``, the ``critic`` and its target, and the ``value``. It acts by the best of several
    samples of the flow.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param n_samples: Number of samples that the critics choose from
    :param kwargs: Further ones of :class:`~sb3_flow.offline.policies.OfflinePolicy`
    """

    network_names = ("bc_flow", "critic", "critic_target", "value")
    value: ValueNetwork

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

    @th.no_grad()
    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        Get the action of the flow whose least value among the critics is the largest.

        :param observation:
        :param deterministic: Whether to choose among samples of the same noise every time, or of a random one (authors)
        :return: Action in [-1, 1]
        """
        n_observations, action_dim = batch_size(observation), self.bc_flow.action_dim
        if deterministic:
            generator = th.Generator().manual_seed(0)
            noise = th.randn((self.n_samples, action_dim), generator=generator).to(self.device).repeat(n_observations, 1)
        else:
            noise = th.randn((n_observations * self.n_samples, action_dim), device=self.device)
        actions = self.bc_flow.sample(observation, noise)
        values = self.critic(observation, actions).min(dim=0).values.view(-1, self.n_samples)
        best = values.argmax(dim=1) + th.arange(n_observations, device=self.device) * self.n_samples
        return actions[best]


class IFQLCnnPolicy(WithImages, IFQLPolicy):
    """
    Policy class of IFQL for image observations: :class:`IFQLPolicy` with a small IMPALA encoder as the default features
    extractor.
    """


class IFQLMultiInputPolicy(WithDict, IFQLPolicy):
    """
    Policy class of IFQL for ``Dict`` observations: :class:`IFQLPolicy` with a ``CombinedExtractor`` as the default features
    extractor.
    """


MlpPolicy = IFQLPolicy
CnnPolicy = IFQLCnnPolicy
MultiInputPolicy = IFQLMultiInputPolicy
