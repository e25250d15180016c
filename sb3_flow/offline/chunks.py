"""Action chunks: several steps in a row, taken as one action."""

from typing import NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import VecNormalize

from sb3_flow.offline.transitions import Observations, map_arrays


class ChunkSamples(NamedTuple):
    """
    Samples of chunks, which start anywhere. The steps of a chunk after the end of an episode are not valid: nobody took
    them there.

    :param observations: Of the first step, (batch, ...)
    :param actions: Of all steps one after the other, (batch, chunk_size * action_dim)
    :param next_observations: After the last step, (batch, ...)
    :param dones: 1 where an episode terminated in the chunk, (batch, 1)
    :param rewards: Discounted sum over the steps, (batch, 1)
    :param discounts: Of what comes after the last step, (batch, 1)
    :param valid: 1 for the steps before which no episode ended, 0 for the others, (batch, chunk_size)
    """

    observations: PyTorchObs
    actions: th.Tensor
    next_observations: PyTorchObs
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor
    valid: th.Tensor


def join_steps(
    rewards: th.Tensor, dones: th.Tensor, ends: th.Tensor, gamma: float
) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
    """
    What is learned from the steps of chunks (Q-chunking, https://arxiv.org/abs/2507.07969, and the authors' code).

    :param rewards: (batch, chunk_size)
    :param dones: 1 where there is nothing to bootstrap from, (batch, chunk_size)
    :param ends: True where an episode ended, terminated or truncated, (batch, chunk_size)
    :param gamma: Discount factor
    :return: the columns of :class:`ChunkSamples` from ``dones`` on
    """
    chunk_size = rewards.shape[1]
    returns = (rewards * gamma ** th.arange(chunk_size, device=rewards.device)).sum(dim=1, keepdim=True)
    n_ends_before = ends.int().cumsum(dim=1) - ends.int()
    valid = (n_ends_before == 0).to(rewards.dtype)
    return dones.amax(dim=1, keepdim=True), returns, th.full_like(returns, gamma**chunk_size), valid


class ChunkSampling(ReplayBuffer):
    """
    What a replay buffer of single steps needs to be sampled by chunks, each of one environment. They may start anywhere in
    an episode, and go on to the next one, but not beyond the latest step.

    :param args: See ``ReplayBuffer``
    :param chunk_size: Number of steps of a chunk
    :param gamma: Discount factor
    :param kwargs: See ``ReplayBuffer``
    :raises ValueError: with ``optimize_memory_usage``
    """

    def __init__(self, *args, chunk_size: int, gamma: float, **kwargs):
        super().__init__(*args, **kwargs)
        if self.optimize_memory_usage:
            raise ValueError("`optimize_memory_usage` must be False with action chunks")
        self.chunk_size = chunk_size
        self.gamma = gamma
        #: Where what follows is not the next step, as the environment was reset (when learning goes on, say)
        self.breaks = np.zeros((self.buffer_size, self.n_envs), dtype=bool)

    def add(self, *args, **kwargs) -> None:
        previous = self.pos - 1
        position, is_first = self.pos, self.size() == 0
        super().add(*args, **kwargs)
        if not is_first:
            self.breaks[previous] = False
            following = map_arrays(lambda obs: obs[position], self.observations)
            expected = map_arrays(lambda obs: obs[previous], self.next_observations)
            map_arrays(lambda *both: self._mark_break(previous, *both), following, expected)

    def _mark_break(self, row: int, following: np.ndarray, expected: np.ndarray) -> None:
        differs = following != expected
        if np.issubdtype(following.dtype, np.floating):
            differs &= ~(np.isnan(following) & np.isnan(expected))
        self.breaks[row] |= differs.reshape(self.n_envs, -1).any(axis=1)

    @property
    def n_chunks(self) -> int:
        """Number of chunks of each environment."""
        return max(self.size() - self.chunk_size + 1, 0)

    # (its samples are of another class than those of a buffer of SB3)
    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ChunkSamples:  # type: ignore[override]
        """
        Sample chunks.

        :param batch_size: Number of chunks
        :param env: VecNormalize to normalize the observations and rewards with
        :return: samples
        """
        # (from the oldest step on)
        starts = np.random.randint(self.n_chunks, size=batch_size) + (self.pos if self.full else 0)
        return self._get_samples(starts % self.buffer_size, env)

    # (as above)
    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ChunkSamples:  # type: ignore[override]
        envs = np.random.randint(self.n_envs, size=len(batch_inds))
        steps = (batch_inds[:, None] + np.arange(self.chunk_size)) % self.buffer_size, envs[:, None]
        observations = self._take(self.observations, (batch_inds, envs), env)
        next_observations = self._take(self.next_observations, (steps[0][:, -1], envs), env)
        ended = self.dones[steps] > 0
        # Not where it was a time limit
        dones = self.dones[steps] * (1 - self.timeouts[steps])
        rewards = self._normalize_reward(self.rewards[steps], env)
        columns = join_steps(
            self.to_torch(rewards.astype(np.float32)),
            self.to_torch(dones.astype(np.float32)),
            self.to_torch(ended | self.breaks[steps]),
            self.gamma,
        )
        actions = self.to_torch(self.actions[steps]).flatten(1)
        return ChunkSamples(observations, actions, next_observations, *columns)

    def _take(self, observations: Observations, rows: tuple[np.ndarray, np.ndarray], env: VecNormalize | None) -> PyTorchObs:
        return map_arrays(self.to_torch, self._normalize_obs(map_arrays(lambda obs: obs[rows], observations), env))


class ChunkReplayBuffer(ChunkSampling):
    """:class:`ChunkSampling`, of observations that are arrays."""


# (its samples are of another class)
class ChunkDictReplayBuffer(ChunkSampling, DictReplayBuffer):  # type: ignore[misc]
    """:class:`ChunkSampling`, of observations that are dictionaries."""
