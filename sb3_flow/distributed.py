"""
Training by several processes, such as those that ``torchrun`` starts: each has its share of the environments and of every
batch, and all of them make the same update.

Hyperparameters mean the whole: ``batch_size``, ``buffer_size`` and numbers of timesteps are those of all processes together,
and so is the number of environments of the command line. In a script, the environments given to a process are its share.
"""

import atexit
import functools
import inspect
import io
import itertools
import os
import pathlib
import signal
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch as th
import torch.distributed as dist
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
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

#: What ``torchrun`` tells a process about the others
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: How long the others wait for one that evaluates. That one is dead is known at once
TIMEOUT = timedelta(days=1)
#: Where one that stops tells the others why
STOPPED = "sb3_flow/stopped"
#: Why, if it was by Ctrl-C or the like
INTERRUPTED = KeyboardInterrupt.__name__

#: Seconds in which a process that is not dead tells that it stops
WAIT_FOR_WORD = 3.0

#: Number of meetings after which the processes compare their weights
CHECK_EVERY = 20

#: Callbacks that only rank 0 has
OF_RANK_ZERO = (EvalCallback, CheckpointCallback, ProgressBarCallback)
#: Attributes that are not hyperparameters, or need not be the same
OF_EACH_RANK = ("seed", "verbose", "tensorboard_log", "start_time", "num_timesteps", "dataset")
#: Attributes that a training goes on from
COUNTERS = ("num_timesteps", "_n_updates", "_n_iterations", "_n_offline_updates", "_episode_num")

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class RankError(RuntimeError):
    """
    Another process has stopped, and with it the training.

    :param reason: What it told before it stopped, None if it did not
    :param silent: Numbers of the processes that have told nothing
    """

    def __init__(self, reason: str | None, silent: Sequence[int] = ()):
        self.reason = reason
        who = f"rank {', '.join(map(str, silent))}" if silent else "one of the processes"
        super().__init__(reason or f"{who} was killed, or cannot be reached any more: the training of all ends")


class _Groups(NamedTuple):
    """The process group of the script, and our own."""

    world: Any
    #: What the processes tell each other without waiting
    store: Any
    #: gloo, for what is on the CPU
    cpu: Any
    #: NCCL where each process has a GPU of its own, else gloo. It is made when it is needed
    cuda: list[Any]


_groups: _Groups | None = None
_is_alone = False


def world_size() -> int:
    """:return: number of processes that train together"""
    if _is_alone or not dist.is_available():
        return 1
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if all(map(os.environ.get, ENVIRONMENT)) else 1


def rank() -> int:
    """:return: number of this process. That of rank 0 logs, evaluates and saves"""
    if world_size() == 1:
        return 0
    return dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"])


@contextmanager
def alone() -> Iterator[None]:
    """What is computed in the body is that of this process."""
    global _is_alone
    former, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = former


def share(name: str, whole: int) -> int:
    """
    :param name: Of a number, for the error message
    :param whole: The number of all processes together
    :return: that of this one
    :raises ValueError: if not all have the same
    """
    if whole % world_size() > 0:
        raise ValueError(f"`{name}` must be a multiple of the number of processes, which is {world_size()}, it is {whole}")
    return whole // world_size()


def local_device(device: th.device | str) -> th.device | str:
    """
    :param device: PyTorch device of all processes
    :return: that of this one, which takes the GPU of its number on its machine unless there is the number of another
    """
    if world_size() == 1 or device not in ("auto", "cuda", th.device("cuda")) or not th.cuda.is_available():
        return device
    index = int(os.environ.get("LOCAL_RANK", rank())) % th.cuda.device_count()
    th.cuda.set_device(index)
    return th.device("cuda", index)


def _group(device: th.device) -> Any:
    """The process group for tensors of a device. All processes ask for it at the same time."""
    global _groups
    if not dist.is_initialized():
        if _groups is not None:
            raise RankError("the processes have left each other")
        with _peers():
            dist.init_process_group("gloo")
        atexit.register(_leave)
    if _groups is None or _groups.world is not dist.group.WORLD:
        with _peers():
            store = dist.distributed_c10d._get_default_store()
            _groups = _Groups(dist.group.WORLD, store, dist.new_group(backend="gloo", timeout=TIMEOUT), [])
    if device.type != "cuda":
        return _groups.cpu
    if not _groups.cuda:
        gpus = gather(str(th.cuda.get_device_properties(device).uuid))
        has_own = len(set(gpus)) == len(gpus) and dist.is_nccl_available()
        with _peers():
            _groups.cuda.append(dist.new_group(backend="nccl") if has_own else _groups.cpu)
    return _groups.cuda[0]


@contextmanager
def _peers() -> Iterator[None]:
    """What goes wrong in the body is that another process has stopped."""
    try:
        yield
    except RuntimeError as error:
        reason = _reason()
        if reason == INTERRUPTED:
            raise KeyboardInterrupt from None
        raise RankError(reason) from (error if reason is None else None)


def _reason() -> str | None:
    """Why another process has stopped, if it has told so."""
    # (the store may be at the process that has stopped)
    with suppress(RuntimeError):
        if _groups is not None and _groups.store.check([STOPPED]):
            return _groups.store.get(STOPPED).decode()
    return None


def tells(error: RankError) -> bool:
    """
    :param error: What has ended this process
    :return: whether it is this one that prints so: rank 0, or the first one that notices that another was killed
    """
    if error.reason is not None or _groups is None:
        return rank() == 0
    with suppress(RuntimeError):
        return _groups.store.add(f"{STOPPED}/told", 1) == 1
    return True


@contextmanager
def together() -> Iterator[None]:
    """If the body ends by an exception in one process, it does in all."""
    if world_size() == 1:
        yield
        return
    _group(th.device("cpu"))
    try:
        yield
    except BaseException as error:
        if not dist.is_initialized():
            raise
        with undisturbed():
            _tell(error)
            _leave()
            if isinstance(error, KeyboardInterrupt) or (isinstance(error, RankError) and error.reason is None):
                # torchrun interrupts this process if another one has ended
                reason = _reason()
                if reason not in (None, INTERRUPTED):
                    raise RankError(reason) from None
                if silent := _silent_ranks():
                    raise RankError(None, silent) from None
        raise


def _tell(error: BaseException) -> None:
    """
    Tell the other processes that this one stops.

    :param error: Why
    """
    told = (
        INTERRUPTED
        if isinstance(error, (KeyboardInterrupt, SystemExit))
        else f"rank {rank()} has stopped: {str(error) or repr(error)}"
    )
    with suppress(RuntimeError):
        assert _groups is not None
        if not isinstance(error, RankError) and _reason() is None:
            _groups.store.set(STOPPED, told)
        _groups.store.set(f"{STOPPED}/{rank()}", "")


def _silent_ranks() -> list[int]:
    """Numbers of the processes that have not stopped by themselves, for which this one waits a little."""
    silent = list(range(world_size()))
    end = time.monotonic() + WAIT_FOR_WORD
    with suppress(RuntimeError):
        while silent and time.monotonic() < end:
            silent = [number for number in silent if _groups is None or not _groups.store.check([f"{STOPPED}/{number}"])]
            time.sleep(0.02)
        return silent
    # (the store was at a process that was killed)
    return [0]


def ignore_signals() -> list[tuple[int, Any]]:
    """
    This process is going to end: ``torchrun``, which ends it if another one has, is not to disturb it.

    :return: the handlers of the signals before
    """
    numbers = (signal.SIGINT, signal.SIGTERM) if world_size() > 1 else ()
    # (only the main thread can)
    with suppress(ValueError):
        return [(number, signal.signal(number, signal.SIG_IGN)) for number in numbers]
    return []


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals that would interrupt the body are ignored."""
    former = ignore_signals()
    try:
        yield
    finally:
        for number, handler in former:
            signal.signal(number, handler or signal.SIG_DFL)


def _leave() -> None:
    """The others no longer wait for this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def learns_together(learn: F) -> F:
    """
    :param learn: Method of a :class:`DistributedAlgorithm`
    :return: the same, that begins and ends in all processes
    """

    @functools.wraps(learn)
    def learn_together(self: "DistributedAlgorithm", *args, **kwargs):
        if world_size() == 1:
            return learn(self, *args, **kwargs)
        _, n_steps, *_ = inspect.signature(learn).bind(self, *args, **kwargs).arguments.values()
        with together():
            self._begin_together(n_steps)
            return learn(self, *args, **kwargs)

    # (functools.wraps keeps the signature, which mypy does not see)
    return learn_together  # type: ignore[return-value]


def broadcast(value: T) -> T:
    """
    :param value: Anything that can be pickled
    :return: that of rank 0
    """
    if world_size() == 1:
        return value
    values = [value]
    group = _group(th.device("cpu"))
    with _peers():
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def gather(value: T) -> list[T]:
    """
    :param value: Anything that can be pickled
    :return: those of all processes
    """
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        group = _group(th.device("cpu"))
        with _peers():
            dist.all_gather_object(values, value, group=group)
    return values


def _all_reduce(tensor: th.Tensor) -> th.Tensor:
    """The sum over all processes, in place."""
    group = _group(tensor.device)
    with _peers():
        dist.all_reduce(tensor, group=group)
    return tensor


def mean(tensor: th.Tensor) -> th.Tensor:
    """
    :param tensor: Means over the share of each process, all of the same size. Without gradient
    :return: means over the whole
    """
    return tensor if world_size() == 1 else _all_reduce(tensor.clone()) / world_size()


def normalize(values: th.Tensor) -> th.Tensor:
    """
    :param values: (batch,), of as many in each process
    :return: with the mean and standard deviation of those of all processes taken out, or as they are if there is only one
    """
    n_values = len(values) * world_size()
    # Normalization does not make sense if mini batchsize == 1, see SB3's GH issue #325
    if n_values == 1:
        return values
    if world_size() == 1:
        return (values - values.mean()) / (values.std() + 1e-8)
    average, average_of_squares = mean(th.stack([values.double().mean(), values.double().square().mean()]))
    variance = (average_of_squares - average.square()).clamp(min=0) * n_values / (n_values - 1)
    return ((values - average) / (variance.sqrt() + 1e-8)).to(values.dtype)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """
    Gradients of the loss of each process become that of the mean of the losses.

    :param parameters: Parameters, after ``backward()``
    """
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = _all_reduce(th.cat([gradient.flatten() for gradient in gradients])).div_(world_size())
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def merge_statistics(statistics: list[RunningMeanStd], former: list[RunningMeanStd]) -> None:
    """
    Statistics that the processes have updated, each with what it has seen, become those of all that was seen.

    :param statistics: Of this process
    :param former: What they were, the same in all processes
    """
    # Moments about the former mean
    added: list[Any] = []
    for new, old in zip(statistics, former, strict=True):
        shift = new.mean - old.mean
        first, second = new.count * shift, new.count * (new.var + shift**2) - old.count * old.var
        added += [np.atleast_1d(new.count - old.count), np.ravel(first), np.ravel(second)]
    sums = _all_reduce(th.as_tensor(np.concatenate(added), dtype=th.float64)).numpy()
    parts = iter(np.split(sums, np.cumsum([len(part) for part in added])[:-1]))
    for new, old in zip(statistics, former, strict=True):
        count, first, second = old.count + next(parts)[0], *(next(parts).reshape(np.shape(old.mean)) for _ in range(2))
        new.count, new.mean = count, old.mean + first / count
        new.var = np.maximum((old.count * old.var + second) / count - (first / count) ** 2, 0)


def running_statistics(env: VecNormalize | None) -> list[RunningMeanStd]:
    """
    :param env: Environment
    :return: what it normalizes observations and rewards with
    """
    if env is None:
        return []
    observations: Any = env.obs_rms if env.norm_obs else {}
    return [*(observations.values() if isinstance(observations, dict) else [observations]), env.ret_rms]


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
                self.model._merge_statistics()  # type: ignore[attr-defined]
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


class DistributedAlgorithm(BaseAlgorithm):
    """An algorithm that several processes can learn with together. In one process nothing is changed."""

    _since_last_meeting: _SinceLastMeeting | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | dict(device=local_device(kwargs.get("device", "auto"))))

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
        everyones = gather(settings)
        for name in sorted(set().union(*everyones)):
            values = [theirs.get(name) for theirs in everyones]
            for number, value in enumerate(values):
                if value != values[0]:
                    found = "" if name == "parameters" else f": {values[0]} on rank 0, {value} on rank {number}"
                    raise ValueError(f"`{name}` must be the same in all processes{found}")

        self._take_state_of_rank_zero()
        theirs = broadcast((statistics, int(th.randint(2**31, ()))))
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
        state = th.load(io.BytesIO(broadcast(buffer.getvalue())), map_location=self.device, weights_only=False)
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
            merge_statistics(statistics, mine.statistics)
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
        checksum = self._checksum() if mine.number % CHECK_EVERY == 0 else 0
        numbers = [not continue_training, self._episode_num - mine.n_episodes, len(mine.episodes) + len(mine.successes)]
        sums = _all_reduce(th.tensor([*numbers, checksum, checksum**2], dtype=th.float64)).tolist()
        n_stopped, n_episodes, n_infos, checksums, squares = sums
        if checksums**2 != squares * world_size():
            warnings.warn(
                "The weights of the processes were no longer the same, and are those of rank 0 again: something else than the "
                "training changes them, or the processors do not compute the same"
            )
            self._take_state_of_rank_zero()
        self._episode_num = mine.n_episodes + int(n_episodes)
        if n_infos > 0:
            everyones = gather((mine.episodes, mine.successes))
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
