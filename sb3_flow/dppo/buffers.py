"""Rollout buffers that keep how actions were made."""

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer


class ChainRolloutBuffer(RolloutBuffer):
    """
    SB3's ``RolloutBuffer`` with the states of a denoising chain in place of the log probability of its end.
    """

    #: How many of the states are kept, the last ones
    n_states = 1

    def reset(self) -> None:
        super().reset()
        self.log_probs = np.zeros((self.buffer_size, self.n_envs, self.n_states * self.action_dim), dtype=np.float32)

    def add(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: th.Tensor,
        log_prob: th.Tensor,
    ) -> None:
        """
        :param obs: Observation
        :param action: Raw action, where the chain ends
        :param reward:
        :param episode_start: Start of episode signal.
        :param value: estimated value of the current state
            following the current policy.
        :param log_prob: The denoising chain, (n_envs, n_flow_steps + 1, action_dim)
        """
        super().add(obs, action, reward, episode_start, value, log_prob[:, -self.n_states :].flatten(1))


# (of DictRolloutBuffer's observations, only the shape is passed on: to mypy, they are another argument of `add`)
class ChainDictRolloutBuffer(ChainRolloutBuffer, DictRolloutBuffer):  # type: ignore[misc]
    """
    The same for ``Dict`` observations.
    """
