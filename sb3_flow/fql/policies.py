import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_flow.offline.policies import OfflinePolicy, OneStepActor, WithDict, WithImages


class FQLPolicy(OfflinePolicy):
    """
    Policy class of FQL: the one-step ``actor`` that acts, the ``bc_flow`` it is distilled from, the ``critic``
    and its target. Its parameters are those of :class:`~sb3_flow.offline.policies.OfflinePolicy`.
    """

    network_names = ("actor", "bc_flow", "critic", "critic_target")
    actor: OneStepActor

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        Get the action of the one-step policy.

        :param observation:
        :param deterministic: Whether to act from zero noise, or from a random one as the authors do
        :return: Action in [-1, 1]
        """
        return self.actor._predict(observation, deterministic)

    def act(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        return self.actor.act(obs, noise)


class FQLCnnPolicy(WithImages, FQLPolicy):
    """
    Policy class of FQL for image observations: :class:`.FQLPolicy` with a small IMPALA encoder as the default features
    extractor.
    """


class FQLMultiInputPolicy(WithDict, FQLPolicy):
    """
    Policy class of FQL for ``Dict`` observations: :class:`.FQLPolicy` with a ``CombinedExtractor`` as the default features
    extractor.
    """


MlpPolicy = FQLPolicy
CnnPolicy = FQLCnnPolicy
MultiInputPolicy = FQLMultiInputPolicy
