"""What SB3's buffers lack: a dataset to sample from, and batches drawn from several buffers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, PyTorchObs, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_flow.common.datasets import Observations, Transitions


def map_observations(function: Callable, *observations: Any) -> Any:
    """
    Apply a function to observations, or to each part of those that are dictionaries.

    :param function: takes as many tensors as there are observations
    :param observations: tensors, or dictionaries of them with the same keys
    :return: a tensor, or a dictionary
    """
    first = observations[0]
    if isinstance(first, dict):
        return {key: function(*(obs[key] for obs in observations)) for key in first}
    return function(*observations)


class OfflineBuffer:
    """
    A dataset, on the device that trains, sampled as SB3's replay buffers are: uniformly and with replacement.
    On the CPU the arrays of the dataset are not copied.

    :param transitions: The dataset, with actions in [-1, 1]
    :param device: PyTorch device
    :param n_steps: Number of steps of the returns
    :param gamma: Discount factor, for returns of several steps
    """

    def __init__(self, transitions: Transitions, device: th.device | str = "cpu", n_steps: int = 1, gamma: float = 0.99):
        self.n_steps = n_steps
        self.gamma = gamma
        self.device = th.device(device)
        self.observations = self._to_torch(transitions.observations)
        self.next_observations = self._to_torch(transitions.next_observations)
        self.actions = th.as_tensor(transitions.actions.reshape(len(transitions), -1), device=self.device)
        self.rewards = th.as_tensor(transitions.rewards, device=self.device)
        self.dones = th.as_tensor(transitions.dones, device=self.device)
        self.episode_ends = th.as_tensor(transitions.episode_ends, device=self.device)

    def _to_torch(self, observations: Observations) -> PyTorchObs:
        return map_observations(lambda obs: th.as_tensor(obs, device=self.device), observations)

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
        observations = map_observations(lambda obs: obs[rows], self.observations)
        next_observations = map_observations(lambda obs: obs[last], self.next_observations)
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

    def _n_step_returns(self, rows: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Sum of the discounted rewards until the end of the episode, last row of it, and discount of what comes after."""
        rewards, last = self.rewards[rows], rows
        discounts = th.full_like(rewards, self.gamma)
        going_on = ~self.episode_ends[rows]
        for _ in range(self.n_steps - 1):
            last = last + going_on
            rewards = rewards + going_on * discounts * self.rewards[last]
            discounts = th.where(going_on, discounts * self.gamma, discounts)
            going_on = going_on & ~self.episode_ends[last]
        return rewards, last, discounts.unsqueeze(1)

    def _normalize(self, observations: PyTorchObs, env: VecNormalize) -> PyTorchObs:
        arrays = map_observations(lambda obs: obs.cpu().numpy(), observations)
        normalized = env.normalize_obs(arrays)
        return map_observations(
            lambda obs: th.as_tensor(obs, dtype=th.float32 if obs.dtype == np.float64 else None, device=self.device),
            normalized,
        )


def concatenate_samples(
    first: ReplayBufferSamples | DictReplayBufferSamples, second: ReplayBufferSamples | DictReplayBufferSamples
) -> ReplayBufferSamples | DictReplayBufferSamples:
    """
    One batch from two, of the same kind of observations.

    :param first: samples
    :param second: samples
    :return: samples
    """
    values: list[Any] = []
    for a, b in zip(first, second, strict=True):
        values.append(None if a is None else map_observations(lambda *parts: th.cat(parts), a, b))
    return type(first)(*values)
