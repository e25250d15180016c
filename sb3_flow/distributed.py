"""
Training by several processes, such as those that ``torchrun`` starts: each has its share of the environments and of every
batch, and all of them make the same update.

Hyperparameters mean the whole: ``batch_size``, ``buffer_size`` and numbers of timesteps are those of all processes together,
and so is the number of environments of the command line. In a script, the environments given to a process are its share.
"""

import atexit
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch as th
import torch.distributed as dist
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

#: How long a process tries to reach the others in the beginning, or ``torchrun``, which then waits for them
WAIT_TO_BEGIN = timedelta(minutes=2)
#: How long the others wait for one that evaluates. That one is dead is known at once
TIMEOUT = timedelta(days=1)
#: Where one that stops tells the others why
STOPPED = "sb3_flow/stopped"
#: Why, if it was by Ctrl-C or the like
INTERRUPTED = KeyboardInterrupt.__name__

#: Seconds in which a process that is not dead tells that it stops
WAIT_FOR_WORD = 3.0

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
_is_alone = ContextVar("_is_alone", default=False)


def world_size() -> int:
    """:return: number of processes that train together"""
    if _is_alone.get() or not dist.is_available():
        return 1
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if os.environ.get("RANK") and os.environ.get("WORLD_SIZE") else 1


def rank() -> int:
    """:return: number of this process. That of rank 0 logs, evaluates and saves"""
    if world_size() == 1:
        return 0
    return dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"])


@contextmanager
def alone() -> Iterator[None]:
    """What is computed in the body is that of this process."""
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


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
        _join()
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


def _join() -> None:
    """Meet the other processes, where ``torchrun`` tells in the environment."""
    try:
        store, number, size = next(dist.rendezvous("env://", timeout=WAIT_TO_BEGIN))
    except (RuntimeError, ValueError) as error:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
        raise RankError(f"the other processes were not found, with {environment}: {str(error).splitlines()[0]}") from error
    store.set_timeout(dist.constants.default_pg_timeout)
    with _peers():
        dist.init_process_group("gloo", store=store, rank=number, world_size=size)


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
    if _groups is None:
        # They have not met
        return True
    if error.reason is not None:
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


def all_reduce(tensor: th.Tensor) -> th.Tensor:
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
    return tensor if world_size() == 1 else all_reduce(tensor.clone()) / world_size()


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
    flat = all_reduce(th.cat([gradient.flatten() for gradient in gradients])).div_(world_size())
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
    sums = all_reduce(th.as_tensor(np.concatenate(added), dtype=th.float64)).numpy()
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
