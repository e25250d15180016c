"""
What rl-zoo3 offers no argument, subclass or registration for, changed while one of its programs runs.

One context manager a change, each with its reason. For each, ``tests/test_patches.py`` shows the fault without it, and fails
when rl-zoo3 changes: a patch that is no longer needed can then go.
"""

import argparse
import functools
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import rl_zoo3.exp_manager
import rl_zoo3.train
import rl_zoo3.utils
from huggingface_sb3 import EnvironmentName
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_flow.zoo.runs import latest_run_id


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _registered(algo: str, algorithm: type[BaseAlgorithm]) -> Iterator[None]:
    original = ALGOS[algo]
    ALGOS[algo] = algorithm
    try:
        yield
    finally:
        ALGOS[algo] = original


@contextmanager
def parsed_by(parse: Callable[..., argparse.Namespace]) -> Iterator[None]:
    """
    The programs of rl-zoo3 make parsers of their own, and take no arguments: theirs is the first one that parses.

    :param parse: What it is given to, in place of its ``parse_args()``
    """
    parse_args = argparse.ArgumentParser.parse_args

    def parse_first(parser: argparse.ArgumentParser, *args, **kwargs) -> argparse.Namespace:
        setattr(argparse.ArgumentParser, "parse_args", parse_args)  # noqa: B010 mypy refuses the plain assignment of a method
        return parse(parser, *args, **kwargs)

    with _replaced(argparse.ArgumentParser, "parse_args", parse_first):
        yield


def experiment_manager(manager: Callable[..., ExperimentManager]) -> AbstractContextManager[None]:
    """
    ``rl_zoo3.train`` makes its experiment manager by name, and has no argument for another one.

    :param manager: The one to use, with the arguments of ``ExperimentManager``
    :return: context manager
    """
    return _replaced(rl_zoo3.train, "ExperimentManager", manager)


def envs_from(start_index: int) -> AbstractContextManager[None]:
    """
    ``ExperimentManager.create_envs`` counts its environments, which the Monitor files have as their names, from 0. In each of
    several processes there is only a part of them.

    :param start_index: Number of the first one
    :return: context manager
    """
    make_vec_env = rl_zoo3.exp_manager.make_vec_env
    return _replaced(rl_zoo3.exp_manager, "make_vec_env", functools.partial(make_vec_env, start_index=start_index))


def runs_with_uuid() -> AbstractContextManager[None]:
    """
    ``enjoy`` and ``record_video`` look for the latest run of an environment, and do not find those of ``--uuid``.

    :return: context manager
    """
    return _replaced(rl_zoo3.utils, "get_latest_run_id", latest_run_id)


@contextmanager
def without_replay_buffer(algo: str) -> Iterator[None]:
    """
    ``enjoy`` and ``record_video`` load with a replay buffer of one transition what is in a list of rl-zoo3's own off-policy
    algorithms. All others, CrossQ included, would allocate the buffer of their training.

    :param algo: Name of the algorithm that is loaded
    """
    algorithm = ALGOS.get(algo)
    if algorithm is None or not issubclass(algorithm, OffPolicyAlgorithm):
        yield
        return

    # (mypy has no classes whose base is a variable)
    class WithoutReplayBuffer(algorithm):  # type: ignore[misc, valid-type]
        @classmethod
        def load(cls, *args, **kwargs) -> BaseAlgorithm:
            return super().load(*args, **{"buffer_size": 1, **kwargs})

    with _registered(algo, WithoutReplayBuffer):
        yield


def timesteps_of_both_phases(algo: str, offline_steps: int) -> AbstractContextManager[None]:
    """
    A trial of rl-zoo3 has one number of timesteps, from which it also knows when to evaluate. Here it is that of both phases,
    whereas ``learn()`` of an offline algorithm takes that of the online phase.

    :param algo: Name of the algorithm
    :param offline_steps: Number of gradient steps on the dataset that ``learn()`` starts with
    :return: context manager
    """
    algorithm = ALGOS[algo]

    # (mypy has no classes whose base is a variable)
    class BothPhases(algorithm):  # type: ignore[misc, valid-type]
        def learn(self, total_timesteps: int, *args, **kwargs) -> BaseAlgorithm:
            return super().learn(total_timesteps - offline_steps, *args, **kwargs)

    return _registered(algo, BothPhases)


def enjoy_in_benchmark() -> AbstractContextManager[None]:
    """
    ``benchmark`` runs enjoy.py of the working directory for each agent, where there is none unless it is a checkout of
    rl-zoo3, and with rl-zoo3's own algorithms only. It leaves out of its table an agent for which that fails.

    :return: context manager
    """
    call = subprocess.call

    def call_enjoy(command: list[str], *args, **kwargs) -> int:
        if command[:2] != ["python", "enjoy.py"]:
            return call(command, *args, **kwargs)
        options = [arg.gym_id if isinstance(arg, EnvironmentName) else arg for arg in command[2:]]
        status = call([sys.executable, "-m", "sb3_flow.zoo", "enjoy", *options], *args, **kwargs)
        if status != 0:
            # It has told what is wrong
            raise SystemExit(status)
        return status

    # It is a script: what it imports can be replaced, but not its own functions
    return _replaced(subprocess, "call", call_enjoy)


def folders_in_benchmark() -> AbstractContextManager[None]:
    """
    ``benchmark`` looks for an environment id in the names of folders, which have no slash.

    :return: context manager
    """
    get_trained_models = rl_zoo3.utils.get_trained_models

    def by_folder(log_folder: str) -> dict[str, tuple[str, str]]:
        return {name: (algo, EnvironmentName(env_id)) for name, (algo, env_id) in get_trained_models(log_folder).items()}

    return _replaced(rl_zoo3.utils, "get_trained_models", by_folder)


def title_of_final_performance() -> AbstractContextManager[None]:
    """
    ``plot_from_file`` calls its figure of all environments "PyBullet envs", whatever they are.

    :return: context manager
    """
    from matplotlib import pyplot as plt

    set_title = plt.title

    def title(label: str, *args, **kwargs) -> Any:
        return set_title("Final performance" if label == "PyBullet envs" else label, *args, **kwargs)

    return _replaced(plt, "title", title)


def mujoco_warnings_once() -> AbstractContextManager[None]:
    """
    ``enjoy`` and ``record_video`` take no class for their environments, whose MuJoCo warnings are to be shown once.

    :return: context manager
    """
    make_vec_env = rl_zoo3.utils.make_vec_env

    def make_vec_env_warned_once(*args, vec_env_cls: type[VecEnv] | None = None, **kwargs) -> VecEnv:
        # (what makes one, in place of a class: SB3 only calls it)
        return make_vec_env(*args, vec_env_cls=warned_once(vec_env_cls or DummyVecEnv), **kwargs)  # type: ignore[arg-type, misc]

    return _replaced(rl_zoo3.utils, "make_vec_env", make_vec_env_warned_once)


def warned_once(vec_env_class: type[VecEnv]) -> Callable[..., VecEnv]:
    """
    MuJoCo warns about a model, such as those of gymnasium with their deprecated ``settotalmass``, for each environment that
    is made of it. Here it does once, in whichever process. What it has to say later, of a simulation, is not changed.

    :param vec_env_class: Class of the vectorized environment
    :return: what makes one, with the arguments of the class
    """
    folder = _shown_warnings().name

    def make(env_fns: list[Callable[[], Any]], **kwargs) -> VecEnv:
        # (VecEnv itself takes other arguments than its subclasses)
        return vec_env_class([functools.partial(_make_env, env_fn, folder) for env_fn in env_fns], **kwargs)  # type: ignore[arg-type]

    return make


@functools.cache
def _shown_warnings() -> tempfile.TemporaryDirectory:
    """A file for each warning, since processes have nothing else in common."""
    return tempfile.TemporaryDirectory(prefix="sb3_flow_")


def _make_env(env_fn: Callable[[], Any], folder: str) -> Any:
    if importlib.util.find_spec("mujoco") is None:
        return env_fn()
    import mujoco

    # (MuJoCo ends the process if it raises)
    def warn(message: str) -> None:
        try:
            (Path(folder) / hashlib.sha256(message.encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass
        # As MuJoCo does
        print(f"WARNING: {message}\n", file=sys.stderr)
        mujoco.mju_writeLog("WARNING", message)

    former = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(warn)
    try:
        return env_fn()
    finally:
        # (dm_control has one of its own, from when it is imported)
        if mujoco.get_mju_user_warning() is warn:
            mujoco.set_mju_user_warning(former)
