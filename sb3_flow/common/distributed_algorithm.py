"""Algorithms that several processes can learn with together."""

import functools
import inspect
import io
import itertools
import pathlib
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EventCallback,
    ProgressBarCallback,
)
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import MaybeCallback, RolloutReturn, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import set_random_seed
from torch import nn

from sb3_flow import distributed
from sb3_flow.distributed import rank, running_statistics, world_size

#: Callbacks that only rank 0 has
OF_RANK_ZERO = (EvalCallback, CheckpointCallback, ProgressBarCallback)
#: Attributes that are not hyperparameters, or need not be the same
OF_EACH_RANK = ("seed", "verbose", "tensorboard_log", "start_time", "num_timesteps", "dataset")
#: Attributes that a training goes on from
COUNTERS = ("num_timesteps", "_n_updates", "_n_iterations", "_n_offline_updates", "_n_pretrain_updates", "_episode_num")

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class _SinceLastMeeting:
    """What a process has seen since it last met the others, beginning with what they agreed on then."""

    statistics: list[RunningMeanStd]
    n_episodes: int
    number: int = 1
    episodes: list[dict[str, Any]] = field(default_factory=list)
    successes: list[float] = field(default_factory=list)
    has_merged_statistics: bool = False


class _OfAllRanks(CallbackList):
    """
    Around the other callbacks, whose timesteps and statistics are those of all processes.

    :param callbacks: Those of this process
    """

    #: Timesteps of the other processes for each step of this one, 0 in an offline phase
    n_others = 0

    def __init__(self, callbacks: list[BaseCallback]):
        super().__init__(callbacks)
        self.progress_bars = [callback for callback in _walk(self) if isinstance(callback, ProgressBarCallback)]

    def _on_rollout_start(self) -> None:
        self.n_others = self.training_env.num_envs * (world_size() - 1)
        super()._on_rollout_start()

    def _on_step(self) -> bool:
        self.model.num_timesteps += self.n_others
        if self.n_others > 0:
            for progress_bar in self.progress_bars:
                progress_bar.pbar.update(self.n_others)
            if self._is_last_step():
                # Before a checkpoint is saved
                assert isinstance(self.model, DistributedAlgorithm)
                self.model._merge_statistics()
        return super()._on_step()

    def _is_last_step(self) -> bool:
        if "n_rollout_steps" in self.locals:
            return self.locals["n_steps"] + 1 == self.locals["n_rollout_steps"]
        return self.locals["num_collected_steps"] == self.locals["train_freq"].frequency


def _walk(callback: BaseCallback) -> Iterator[BaseCallback]:
    """A callback and those that it calls."""
    yield callback
    children = callback.callbacks if isinstance(callback, CallbackList) else [getattr(callback, "callback", None)]
    for child in children:
        if isinstance(child, BaseCallback):
            yield from _walk(child)


def _of_this_rank(callback: BaseCallback) -> BaseCallback | None:
    """A callback without what only rank 0 has. None if nothing is left."""
    if rank() == 0:
        return callback
    if isinstance(callback, OF_RANK_ZERO):
        return None
    if isinstance(callback, CallbackList):
        return CallbackList([child for child in map(_of_this_rank, callback.callbacks) if child is not None])
    if isinstance(callback, EventCallback) and callback.callback is not None:
        callback.callback = _of_this_rank(callback.callback)
    return callback


def learns_together(learn: F) -> F:
    """
    :param learn: Method of a :class:`DistributedAlgorithm`
    :return: the same, that begins and ends in all processes
    """

    @functools.wraps(learn)
    def learn_together(self: "DistributedAlgorithm", *args, **kwargs):
        if world_size() == 1:
            # (it need not be asked again for each minibatch)
            with distributed.alone():
                return learn(self, *args, **kwargs)
        _, n_steps, *_ = inspect.signature(learn).bind(self, *args, **kwargs).arguments.values()
        with distributed.together():
            self._begin_together(n_steps)
            return learn(self, *args, **kwargs)

    # (functools.wraps keeps the signature, which mypy does not see)
    return learn_together  # type: ignore[return-value]


class DistributedAlgorithm(BaseAlgorithm):
    """An algorithm that several processes can learn with together. In one process nothing is changed."""

    #: Number of meetings after which the processes compare their weights
    _check_every = 20
    _since_last_meeting: _SinceLastMeeting | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | dict(device=distributed.local_device(kwargs.get("device", "auto"))))

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Set the seed of the pseudo-random generators (python, numpy, pytorch, gym, action_space). With several processes, their
        environments have the seeds of those of one process.

        :param seed:
        """
        super().set_random_seed(seed)
        if seed is not None and self.env is not None and rank() > 0:
            self.env.seed(seed + rank() * self.env.num_envs)

    def _begin_together(self, n_steps: int) -> None:
        """
        All processes go on from the state of rank 0, each with random numbers of its own.

        :param n_steps: Number of steps to learn for
        :raises ValueError: if they are not going to do the same, or cannot do it together
        """
        for module in self.policy.modules():
            # (there is no other name for the class of all of them)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
                raise ValueError(
                    f"{type(module).__name__} normalizes over the batch of one process, and cannot be trained by "
                    f"{world_size()}: LayerNorm can"
                )
        statistics = running_statistics(self._vec_normalize_env)
        settings = self._settings_of_all() | dict(total_timesteps=n_steps)
        everyones = distributed.gather(settings)
        for name in sorted(set().union(*everyones)):
            values = [theirs.get(name) for theirs in everyones]
            for number, value in enumerate(values):
                if value != values[0]:
                    found = "" if name == "parameters" else f": {values[0]} on rank 0, {value} on rank {number}"
                    raise ValueError(f"`{name}` must be the same in all processes{found}")

        self._take_state_of_rank_zero()
        theirs = distributed.broadcast((statistics, int(th.randint(2**31, ()))))
        if rank() == 0:
            return
        for running, of_rank_zero in zip(statistics, theirs[0], strict=True):
            vars(running).update(vars(of_rank_zero))
        seed = int(np.random.SeedSequence([theirs[1], rank()]).generate_state(1)[0])
        set_random_seed(seed, using_cuda=self.device.type == "cuda")
        self.action_space.seed(seed)
        self.set_logger(Logger(folder=None, output_formats=[]))

    def _settings_of_all(self) -> dict[str, Any]:
        """What has to be the same in all processes, by its name."""
        normalization = self._vec_normalize_env
        settings: dict[str, Any] = {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, (bool, int, float, str)) and not name.startswith("_") and name not in OF_EACH_RANK
        }
        settings["VecNormalize"] = (
            None
            if normalization is None
            else [normalization.training, *(np.shape(running.mean) for running in running_statistics(normalization))]
        )
        settings["parameters"] = [(name, tuple(value.shape)) for name, value in self.policy.state_dict().items()]
        return settings

    def _take_state_of_rank_zero(self) -> None:
        buffer = io.BytesIO()
        counters = {name: value for name, value in vars(self).items() if name in COUNTERS}
        th.save(dict(parameters=self.get_parameters(), counters=counters), buffer)
        state = th.load(io.BytesIO(distributed.broadcast(buffer.getvalue())), map_location=self.device, weights_only=False)
        if rank() > 0:
            self.set_parameters(state["parameters"], device=self.device)
            vars(self).update(state["counters"])

    def _checksum(self) -> int:
        """Of the weights, in 20 bits."""
        checksum = 0
        for value in self.policy.state_dict().values():
            if isinstance(value, th.Tensor):
                checksum = zlib.crc32(value.detach().cpu().flatten().view(th.uint8).numpy().data, checksum)
        return checksum % 2**20

    def _setup_learn(self, *args, **kwargs) -> tuple[int, BaseCallback]:
        self._since_last_meeting = None
        if world_size() > 1:
            statistics = [running.copy() for running in running_statistics(self._vec_normalize_env)]
            self._since_last_meeting = _SinceLastMeeting(statistics, self._episode_num)
        return super()._setup_learn(*args, **kwargs)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if world_size() == 1:
            return super()._init_callback(callback, progress_bar)
        parts: list[Any] = callback if isinstance(callback, list) else [callback]
        callbacks = [part if isinstance(part, BaseCallback) else ConvertCallback(part) for part in parts]
        if progress_bar:
            callbacks.append(ProgressBarCallback())
        for part in itertools.chain.from_iterable(map(_walk, callbacks)):
            if isinstance(part, CheckpointCallback) and part.save_replay_buffer and isinstance(self, OffPolicyAlgorithm):
                raise ValueError(
                    "CheckpointCallback(save_replay_buffer=True) would save that of rank 0 only: each of the "
                    f"{world_size()} processes has its own"
                )
        return super()._init_callback(_OfAllRanks([part for part in map(_of_this_rank, callbacks) if part is not None]))

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        if self._since_last_meeting is not None:
            for index, info in enumerate(infos):
                if info.get("episode") is not None:
                    self._since_last_meeting.episodes.append(info["episode"])
                if info.get("is_success") is not None and dones is not None and dones[index]:
                    self._since_last_meeting.successes.append(info["is_success"])

    def _merge_statistics(self) -> None:
        """Those of ``VecNormalize``, once a rollout."""
        env, mine = self._vec_normalize_env, self._since_last_meeting
        assert mine is not None
        if env is not None and env.training and not mine.has_merged_statistics:
            statistics = running_statistics(env)
            distributed.merge_statistics(statistics, mine.statistics)
            mine.statistics = [running.copy() for running in statistics]
        mine.has_merged_statistics = True

    def _meet(self, continue_training: bool) -> bool:
        """
        The processes meet after a rollout, and have the episodes and the statistics of all of them.

        :param continue_training: Whether the callbacks of this process want to go on
        :return: whether those of all processes do
        """
        mine = self._since_last_meeting
        if world_size() == 1 or mine is None:
            return continue_training
        # A callback may have ended the rollout before its last step
        self._merge_statistics()
        checksum = self._checksum() if mine.number % self._check_every == 0 else 0
        numbers = [not continue_training, self._episode_num - mine.n_episodes, len(mine.episodes) + len(mine.successes)]
        sums = distributed.all_reduce(th.tensor([*numbers, checksum, checksum**2], dtype=th.float64)).tolist()
        n_stopped, n_episodes, n_infos, checksums, squares = sums
        if checksums**2 != squares * world_size():
            warnings.warn(
                "The weights of the processes were no longer the same, and are those of rank 0 again: something else than the "
                "training changes them, or the processors do not compute the same"
            )
            self._take_state_of_rank_zero()
        if n_stopped > 0:
            # It may have been before the end of the rollout, where the others are
            self.num_timesteps = distributed.broadcast(self.num_timesteps)
        self._episode_num = mine.n_episodes + int(n_episodes)
        if n_infos > 0:
            everyones = distributed.gather((mine.episodes, mine.successes))
            for buffer, index in ((self.ep_info_buffer, 0), (self.ep_success_buffer, 1)):
                assert buffer is not None
                for _ in range(min(len(everyones[rank()][index]), len(buffer))):
                    buffer.pop()
                # Of each process in turn: the buffer may not have room for all
                for infos in itertools.zip_longest(*(theirs[index] for theirs in everyones)):
                    buffer.extend(info for info in infos if info is not None)
        self._since_last_meeting = _SinceLastMeeting(mine.statistics, self._episode_num, mine.number + 1)
        return n_stopped == 0

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save all the attributes of the object and the model parameters in a zip-file. Several processes can do so under one
        name.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        """
        if world_size() == 1 or not isinstance(path, (str, pathlib.Path)):
            return super().save(path, exclude, include)
        target = pathlib.Path(path) if pathlib.Path(path).suffix else pathlib.Path(f"{path}.zip")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            super().save(pathlib.Path(folder) / target.name, exclude, include)
            (pathlib.Path(folder) / target.name).replace(target)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_since_last_meeting"]


class DistributedOnPolicyAlgorithm(DistributedAlgorithm, OnPolicyAlgorithm):
    """An on-policy algorithm that several processes can learn with together."""

    def collect_rollouts(self, *args, **kwargs) -> bool:
        return self._meet(super().collect_rollouts(*args, **kwargs))


class DistributedOffPolicyAlgorithm(DistributedAlgorithm, OffPolicyAlgorithm):
    """An off-policy algorithm that several processes can learn with together. Each has a part of the replay buffer."""

    # (they meet after each update, which may take less time than to compare the weights)
    _check_every = 1000

    def _setup_model(self) -> None:
        whole, self.buffer_size = self.buffer_size, -(-self.buffer_size // world_size())
        super()._setup_model()
        self.buffer_size = whole

    def _begin_together(self, n_steps: int) -> None:
        assert isinstance(self.train_freq, TrainFreq) and self.replay_buffer is not None
        if self.train_freq.unit == TrainFrequencyUnit.EPISODE:
            raise ValueError(
                "`train_freq` must be a number of steps with several processes, whose episodes end at other times"
            )
        if self.replay_buffer.n_envs != self.n_envs:
            raise ValueError(
                f"The replay buffer is of {self.replay_buffer.n_envs} environments, but there are {self.n_envs} here"
            )
        super()._begin_together(n_steps)

    def collect_rollouts(self, *args, **kwargs) -> RolloutReturn:
        if world_size() == 1:
            return super().collect_rollouts(*args, **kwargs)
        log_interval, n_episodes = kwargs.pop("log_interval", None), self._episode_num
        rollout = super().collect_rollouts(*args, **kwargs)
        continue_training = self._meet(rollout.continue_training)
        # (one number of episodes may be skipped)
        if log_interval is not None and self._episode_num // log_interval > n_episodes // log_interval:
            self.dump_logs()
        return RolloutReturn(rollout.episode_timesteps * world_size(), rollout.n_episodes, continue_training)
