"""What SB3's buffers lack: a dataset to sample from, and batches drawn from several buffers."""

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, PyTorchObs, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_flow.common.transitions import Observations, Transitions, blocks, map_arrays


class OfflineBuffer:
    """
    A dataset, on the device that trains, sampled as SB3's replay buffers are: uniformly and with replacement.
    On the CPU the arrays of the dataset are not copied.

    :param transitions: The dataset, with actions in [-1, 1]
    :param device: PyTorch device
    :param n_steps: Number of steps of the returns
    :param gamma: Discount factor, for returns of several steps
    :param n_stack: Number of observations that are stacked on their first axis, the latest one last.
        As in SB3's ``VecFrameStack``, there are zeros in place of those before the start of an episode.
    """

    def __init__(
        self,
        transitions: Transitions,
        device: th.device | str = "cpu",
        n_steps: int = 1,
        gamma: float = 0.99,
        n_stack: int = 1,
    ):
        self.n_steps = n_steps
        self.gamma = gamma
        self.n_stack = n_stack
        self.device = th.device(device)
        self.observations = self._to_torch(transitions.observations)
        self.next_observations = self._to_torch(transitions.next_observations)
        self.actions = th.as_tensor(transitions.actions.reshape(len(transitions), -1), device=self.device)
        self.rewards = th.as_tensor(transitions.rewards, device=self.device)
        self.dones = th.as_tensor(transitions.dones, device=self.device)
        self.episode_ends = th.as_tensor(transitions.episode_ends, device=self.device)

    def _to_torch(self, observations: Observations) -> PyTorchObs:
        return map_arrays(lambda obs: th.as_tensor(obs, device=self.device), observations)

    def __len__(self) -> int:
        return len(self.actions)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples | DictReplayBufferSamples:
        """
        Sample transitions.

        :param batch_size: Number of transitions
        :param env: VecNormalize to normalize the observations and rewards with
        :return: samples, as from a replay buffer of SB3
        """
        rows = th.randint(len(self), (batch_size,), device=self.device)
        rewards, dones, last, discounts = self.rewards[rows], self.dones[rows], rows, None
        if self.n_steps > 1:
            rewards, last, discounts = self._n_step_returns(rows)
            dones = self.dones[last]
        previous = self._previous_rows(rows)
        observations = map_arrays(lambda obs: self._stack(obs, previous, obs[rows]), self.observations)
        # Those before the next observation are the latest observations
        previous = [last, *self._previous_rows(last)][: self.n_stack - 1]
        next_observations = map_arrays(
            lambda obs, next_obs: self._stack(obs, previous, next_obs[last]), self.observations, self.next_observations
        )
        if env is not None:
            observations, next_observations = (self._normalize(obs, env) for obs in (observations, next_observations))
            rewards = th.as_tensor(env.normalize_reward(rewards.cpu().numpy()), dtype=th.float32, device=self.device)
        cls = DictReplayBufferSamples if isinstance(observations, dict) else ReplayBufferSamples
        return cls(
            observations=observations,
            actions=self.actions[rows],
            next_observations=next_observations,
            dones=dones.unsqueeze(1),
            rewards=rewards.unsqueeze(1),
            discounts=discounts,
        )

    def _previous_rows(self, rows: th.Tensor) -> list[th.Tensor]:
        """The rows before, the nearest first, as many as are stacked. Negative before the start of an episode."""
        previous = []
        for _ in range(self.n_stack - 1):
            before = (rows - 1).clamp(min=0)
            rows = th.where((rows <= 0) | self.episode_ends[before], -1, before)
            previous.append(rows)
        return previous

    @staticmethod
    def _stack(observations: th.Tensor, previous: list[th.Tensor], latest: th.Tensor) -> th.Tensor:
        if not previous:
            return latest
        frames = [latest]
        for rows in previous:
            exists = (rows >= 0).view(-1, *[1] * (latest.dim() - 1))
            frames.insert(0, observations[rows] * exists)
        return th.cat(frames, dim=1)

    def _n_step_returns(self, rows: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Sum of the discounted rewards until the end of the episode, last row of it, and discount of what comes after."""
        rewards, last = self.rewards[rows], rows
        discounts = th.full_like(rewards, self.gamma)
        # Tasks of OGBench can be solved, and so be over, in the middle of a trajectory
        ends = self.episode_ends | (self.dones > 0)
        going_on = ~ends[rows]
        for _ in range(self.n_steps - 1):
            last = last + going_on
            rewards = rewards + going_on * discounts * self.rewards[last]
            discounts = th.where(going_on, discounts * self.gamma, discounts)
            going_on = going_on & ~ends[last]
        return rewards, last, discounts.unsqueeze(1)

    def fit_normalization(self, env: VecNormalize) -> None:
        """
        Give an environment that has not seen anything yet the statistics of the dataset, as if it had been seen there.

        :param env: The environment
        """
        if not env.training or env.ret_rms.count >= 1:
            return
        if env.norm_obs:
            statistics = env.obs_rms if isinstance(env.obs_rms, dict) else {None: env.obs_rms}
            for key, running in statistics.items():
                observations: Any = self.observations if key is None else self.observations[key]  # type: ignore[call-overload]
                for _, rows in blocks(observations.cpu().numpy()):
                    running.update(rows)
        discounted, episode_return = np.zeros(len(self)), 0.0
        for row, (reward, end) in enumerate(zip(self.rewards.tolist(), self.episode_ends.tolist(), strict=True)):
            discounted[row] = episode_return = episode_return * env.gamma + reward
            if end:
                episode_return = 0.0
        env.ret_rms.update(discounted)

    def _normalize(self, observations: PyTorchObs, env: VecNormalize) -> PyTorchObs:
        arrays = map_arrays(lambda obs: obs.cpu().numpy(), observations)
        normalized = env.normalize_obs(arrays)
        return map_arrays(
            lambda obs: th.as_tensor(obs, dtype=th.float32 if obs.dtype == np.float64 else None, device=self.device),
            normalized,
        )


def concatenate_samples(
    first: ReplayBufferSamples | DictReplayBufferSamples,
    second: ReplayBufferSamples | DictReplayBufferSamples,
    gamma: float,
) -> ReplayBufferSamples | DictReplayBufferSamples:
    """
    One batch from two, of the same kind of observations.

    :param first: samples
    :param second: samples
    :param gamma: Discount factor, of the samples that have none of their own when the others do
    :return: samples
    """
    if (first.discounts is None) != (second.discounts is None):
        first, second = (
            batch if batch.discounts is not None else batch._replace(discounts=th.full_like(batch.rewards, gamma))
            for batch in (first, second)
        )
    values: list[Any] = []
    for a, b in zip(first, second, strict=True):
        values.append(None if a is None else map_arrays(lambda *parts: th.cat(parts), a, b))
    return type(first)(*values)
