"""What SB3's buffers lack: a dataset to sample from, and batches drawn from several buffers."""

from copy import copy
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, PyTorchObs, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_flow.offline.chunks import ChunkSamples, join_steps
from sb3_flow.offline.transitions import Observations, Transitions, map_arrays

#: What is learned from: transitions, or chunks of them.
Batch = ReplayBufferSamples | DictReplayBufferSamples | ChunkSamples


class OfflineBuffer:
    """
    A dataset, sampled as SB3's replay buffers are: uniformly and with replacement.
    On the CPU the arrays of the dataset are not copied.

    :param transitions: The dataset, with actions in [-1, 1]
    :param device: PyTorch device of the samples
    :param n_steps: Number of steps of the returns
    :param gamma: Discount factor, for returns of several steps
    :param n_stack: Number of observations that are stacked on their first axis, the latest one last.
        As in SB3's ``VecFrameStack``, there are zeros in place of those before the start of an episode.
    :param storage_device: PyTorch device that holds the dataset, that of the samples if None
    :param chunk_size: Number of steps that are sampled as one action, see :class:`~sb3_flow.offline.chunks.ChunkSamples`.
        They start anywhere in an episode.
    """

    def __init__(
        self,
        transitions: Transitions,
        device: th.device | str = "cpu",
        n_steps: int = 1,
        gamma: float = 0.99,
        n_stack: int = 1,
        storage_device: th.device | str | None = None,
        chunk_size: int = 1,
    ):
        self.n_steps = n_steps
        self.chunk_size = chunk_size
        self.gamma = gamma
        self.n_stack = n_stack
        self.device = th.device(device)
        self.storage_device = self.device if storage_device is None else th.device(storage_device)
        self.observations = self._to_torch(transitions.observations)
        self.next_observations = self._to_torch(transitions.next_observations)
        self.actions = th.as_tensor(transitions.actions.reshape(len(transitions), -1), device=self.storage_device)
        self.rewards = th.as_tensor(transitions.rewards, device=self.storage_device)
        self.dones = th.as_tensor(transitions.dones, device=self.storage_device)
        self.episode_ends = th.as_tensor(transitions.episode_ends, device=self.storage_device)
        #: Rows that are sampled, all of them if None
        self.rows: th.Tensor | None = None

    def _to_torch(self, observations: Observations) -> PyTorchObs:
        return map_arrays(lambda obs: th.as_tensor(obs, device=self.storage_device), observations)

    def __len__(self) -> int:
        return len(self.actions if self.rows is None else self.rows)

    @property
    def longest_episode(self) -> int:
        """Number of transitions of the longest episode of those that are sampled."""
        episodes = self.episode_ends.cumsum(0) - self.episode_ends.int()
        return int((episodes if self.rows is None else episodes[self.rows]).bincount().max())

    def split(self, fraction: float) -> tuple["OfflineBuffer", "OfflineBuffer"]:
        """
        Hold out whole episodes, the same ones every time. The dataset is held once.

        :param fraction: Share of the episodes that are held out, at least one
        :return: buffers that sample the other episodes, and those that are held out
        :raises ValueError: if no episode would be left
        """
        ends = self.episode_ends.cpu().numpy()
        n_episodes = int(ends.sum())
        n_held_out = max(1, round(fraction * n_episodes))
        if n_held_out >= n_episodes:
            raise ValueError(f"Whole episodes are held out for validation: {fraction} of {n_episodes} leaves none")
        held_out = np.random.default_rng(0).permutation(n_episodes) < n_held_out
        # The number of episodes that have ended before a row is that of its episode
        is_held_out = held_out[np.cumsum(ends) - ends]
        parts = copy(self), copy(self)
        for part, mask in zip(parts, (~is_held_out, is_held_out), strict=True):
            part.rows = th.as_tensor(np.flatnonzero(mask), device=self.storage_device)
        return parts

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> Batch:
        """
        Sample transitions.

        :param batch_size: Number of transitions
        :param env: VecNormalize to normalize the observations and rewards with
        :return: samples, as from a replay buffer of SB3
        """
        rows = th.randint(len(self), (batch_size,), device=self.storage_device)
        if self.rows is not None:
            rows = self.rows[rows]
        taken = rows
        columns: tuple[th.Tensor | None, ...]
        if self.chunk_size > 1:
            # Those after the last row are not valid: an episode ends there
            taken = (rows[:, None] + th.arange(self.chunk_size, device=rows.device)).clamp(max=len(self.actions) - 1)
            last = taken[:, -1]
            columns = join_steps(self._rewards(taken, env), self.dones[taken], self.episode_ends[taken], self.gamma)
        elif self.n_steps > 1:
            rewards, last, discounts = self._n_step_returns(rows, env)
            columns = self.dones[last].unsqueeze(1), rewards.unsqueeze(1), discounts.unsqueeze(1)
        else:
            last = rows
            columns = self.dones[rows].unsqueeze(1), self._rewards(rows, env).unsqueeze(1), None
        observations = self._observations_of(rows)
        # Those before the next observation are the latest observations
        previous = [last, *self._previous_rows(last)][: self.n_stack - 1]
        next_observations = map_arrays(
            lambda obs, next_obs: self._stack(obs, previous, next_obs[last]), self.observations, self.next_observations
        )
        if env is not None:
            observations, next_observations = (self._normalize(obs, env) for obs in (observations, next_observations))
        cls: Any = DictReplayBufferSamples if isinstance(observations, dict) else ReplayBufferSamples
        cls = ChunkSamples if self.chunk_size > 1 else cls
        samples = (observations, self.actions[taken].flatten(1), next_observations, *columns)
        return cls(*(part if part is None else map_arrays(lambda x: x.to(self.device), part) for part in samples))

    def observations_of(self, rows: th.Tensor, env: VecNormalize | None = None) -> PyTorchObs:
        """
        Observations as they are sampled.

        :param rows: Numbers of transitions
        :param env: VecNormalize to normalize them with
        :return: (n, ...), on the device of the samples
        """
        observations = self._observations_of(rows)
        observations = observations if env is None else self._normalize(observations, env)
        return map_arrays(lambda obs: obs.to(self.device), observations)

    def _observations_of(self, rows: th.Tensor) -> PyTorchObs:
        previous = self._previous_rows(rows)
        return map_arrays(lambda obs: self._stack(obs, previous, obs[rows]), self.observations)

    @property
    def sampled_rows(self) -> th.Tensor:
        """Numbers of the transitions that are sampled."""
        return th.arange(len(self.actions), device=self.storage_device) if self.rows is None else self.rows

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

    def _rewards(self, rows: th.Tensor, env: VecNormalize | None) -> th.Tensor:
        rewards = self.rewards[rows]
        if env is None or not env.norm_reward:
            return rewards
        return th.as_tensor(env.normalize_reward(rewards.cpu().numpy()), device=self.storage_device)

    def _n_step_returns(self, rows: th.Tensor, env: VecNormalize | None = None) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Sum of the discounted rewards until the end of the episode, last row of it, and discount of what comes after."""
        rewards, last = self._rewards(rows, env), rows
        discounts = th.full_like(rewards, self.gamma)
        # Tasks of OGBench can be solved, and so be over, in the middle of a trajectory
        ends = self.episode_ends | (self.dones > 0)
        going_on = ~ends[rows]
        for _ in range(self.n_steps - 1):
            last = last + going_on
            rewards = rewards + going_on * discounts * self._rewards(last, env)
            discounts = th.where(going_on, discounts * self.gamma, discounts)
            going_on = going_on & ~ends[last]
        return rewards, last, discounts

    def fit_normalization(self, env: VecNormalize, has_rewards: bool = True) -> None:
        """
        Give an environment that has not seen anything yet the statistics of the dataset, as if it had been seen there.

        :param env: The environment
        :param has_rewards: Whether the rewards of the dataset mean something
        """
        of_observations = env.obs_rms if env.norm_obs else {}
        statistics = of_observations if isinstance(of_observations, dict) else {None: of_observations}
        if not env.training or any(running.count >= 1 for running in (env.ret_rms, *statistics.values())):
            return
        sampled = self.sampled_rows
        if env.norm_obs:
            for key, running in statistics.items():
                observations: Any = self.observations if key is None else self.observations[key]  # type: ignore[call-overload]
                for rows in sampled.split(1000):
                    running.update(self._stack(observations, self._previous_rows(rows), observations[rows]).cpu().numpy())
        if not has_rewards:
            return
        discounted, episode_return = np.zeros(len(self.actions)), 0.0
        for row, (reward, end) in enumerate(zip(self.rewards.tolist(), self.episode_ends.tolist(), strict=True)):
            discounted[row] = episode_return = episode_return * env.gamma + reward
            if end:
                episode_return = 0.0
        env.ret_rms.update(discounted[sampled.cpu().numpy()])

    def _normalize(self, observations: PyTorchObs, env: VecNormalize) -> PyTorchObs:
        arrays = map_arrays(lambda obs: obs.cpu().numpy(), observations)
        normalized = env.normalize_obs(arrays)
        return map_arrays(
            lambda obs: th.as_tensor(obs, dtype=th.float32 if obs.dtype == np.float64 else None, device=self.device),
            normalized,
        )


def concatenate_samples(
    first: Batch,
    second: Batch,
    gamma: float,
) -> Batch:
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


def fill_terminal_observations(
    batch: Batch,
) -> Batch:
    """
    Nothing is bootstrapped from the next observation of a terminal transition, which may be NaN, as its product with zero
    would be: the observation takes its place.

    :param batch: samples
    :return: samples
    """

    def fill(obs: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        if not next_obs.is_floating_point():
            return next_obs
        return th.where((batch.dones > 0).view(-1, *[1] * (next_obs.dim() - 1)), obs, next_obs)

    return batch._replace(next_observations=map_arrays(fill, batch.observations, batch.next_observations))


def transform_rewards(batch: Batch, gamma: float, reward_scale: float = 1.0, reward_shift: float = 0.0) -> Batch:
    """
    Scale and shift rewards, or those that returns of several steps are made of.

    :param batch: samples
    :param gamma: Discount factor. With a shift of returns of several steps it must be less than 1.
    :param reward_scale: Factor of each reward
    :param reward_shift: Added to each reward after that
    :return: samples
    """
    if reward_scale == 1 and reward_shift == 0:
        return batch
    # A return has as many rewards as the exponent of gamma in the discount of what comes after it
    n_shifts = 1 if batch.discounts is None or reward_shift == 0 else (1 - batch.discounts) / (1 - gamma)
    return batch._replace(rewards=reward_scale * batch.rewards + reward_shift * n_shifts)
