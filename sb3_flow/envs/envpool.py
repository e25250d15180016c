"""
EnvPool (https://github.com/sail-sg/envpool): the tasks of dm_control and MuJoCo, simulated in C++, as a ``VecEnv``.

.. code-block:: python

    from sb3_flow import FPO
    from sb3_flow.envs import make_envpool

    FPO("MlpPolicy", make_envpool("CheetahRun-v1", n_envs=16)).learn(1_000_000)
"""

import difflib
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from numbers import Real
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_flow import distributed
from sb3_flow.common.checks import to_int
from sb3_flow.envs.dm_control import register_dm_control

#: Prefix of the ids of EnvPool's tasks
NAMESPACE = "envpool/"
#: The first version whose observations, rewards and ends were compared with those of the ordinary environments
MIN_VERSION = (1, 2, 5)

#: Tasks of dm_control that EnvPool has too, by their domain. (Not lqr, whose episodes have no limit in dm_control.)
DM_CONTROL = {
    "acrobot": ("swingup", "swingup_sparse"),
    "ball_in_cup": ("catch",),
    "cartpole": ("balance", "balance_sparse", "swingup", "swingup_sparse", "two_poles", "three_poles"),
    "cheetah": ("run",),
    "dog": ("stand", "walk", "trot", "run", "fetch"),
    "finger": ("spin", "turn_easy", "turn_hard"),
    "fish": ("upright", "swim"),
    "hopper": ("stand", "hop"),
    "humanoid": ("stand", "walk", "run", "run_pure_state"),
    "humanoid_CMU": ("stand", "walk", "run"),
    "manipulator": ("bring_ball", "bring_peg", "insert_ball", "insert_peg"),
    "pendulum": ("swingup",),
    "point_mass": ("easy", "hard"),
    "quadruped": ("walk", "run", "escape", "fetch"),
    "reacher": ("easy", "hard"),
    "stacker": ("stack_2", "stack_4"),
    "swimmer": ("swimmer6", "swimmer15"),
    "walker": ("stand", "walk", "run"),
}
#: Tasks of MuJoCo v5, which have the same ids
MUJOCO = tuple(
    f"{name}-v5"
    for name in (
        "Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "InvertedPendulum", "Pusher",
        "Reacher", "Swimmer", "Walker2d",
    )
)  # fmt: skip


def _camel_case(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


#: EnvPool's id of an environment of gymnasium
TASKS = {
    f"dm_control/{domain}-{task}-v0": f"{_camel_case(domain)}{_camel_case(task)}-v1"
    for domain, tasks in DM_CONTROL.items()
    for task in tasks
} | dict(zip(MUJOCO, MUJOCO, strict=True))
#: Environment of gymnasium of a task of EnvPool
ORDINARY = {envpool_id: env_id for env_id, envpool_id in TASKS.items()}
#: Tasks of dm_control that were compared with EnvPool's (benchmarks/envpool_tasks.py), as all of MuJoCo were
COMPARED = tuple(
    f"dm_control/{name}-v0"
    for name in (
        "ball_in_cup-catch", "cartpole-balance", "cheetah-run", "finger-spin", "finger-turn_easy", "finger-turn_hard",
        "fish-swim", "point_mass-easy", "reacher-easy", "reacher-hard",
    )
)  # fmt: skip
#: Environments of gymnasium that a task of EnvPool does not stand for, and why
DIFFERENT = {
    **{env_id: "they have not been compared" for env_id in TASKS if env_id not in (*COMPARED, *MUJOCO)},
    **dict.fromkeys(
        ("dm_control/finger-spin-v0", "dm_control/finger-turn_easy-v0", "dm_control/finger-turn_hard-v0"),
        "contacts of the finger with the spinner are 64 times stiffer from MuJoCo 3.7 on, and EnvPool 1.2.5 has 3.6",
    ),
    "dm_control/ball_in_cup-catch-v0": "EnvPool mistakes the size of the ball, which is caught in a larger part of the cup",
    "HumanoidStandup-v5": (
        "contacts are solved in another way from MuJoCo 3.8 on, EnvPool 1.2.5 has 3.6, and returns have not been compared"
    ),
}
#: What EnvPool observes more than dm_control, all of whose tasks of a domain have one observation in EnvPool
NOT_OBSERVED = {
    "DogStand-v1": ("ball_state", "target_position"),
    "DogWalk-v1": ("ball_state", "target_position"),
    "DogTrot-v1": ("ball_state", "target_position"),
    "DogRun-v1": ("ball_state", "target_position"),
    "FingerSpin-v1": ("dist_to_target", "target_position"),
    "FishUpright-v1": ("target",),
    "HumanoidStand-v1": ("position",),
    "HumanoidWalk-v1": ("position",),
    "HumanoidRun-v1": ("position",),
    "HumanoidRunPureState-v1": ("com_velocity", "extremities", "head_height", "joint_angles", "torso_vertical"),
    "QuadrupedWalk-v1": ("ball_state", "origin", "rangefinder", "target_position"),
    "QuadrupedRun-v1": ("ball_state", "origin", "rangefinder", "target_position"),
    "QuadrupedEscape-v1": ("ball_state", "target_position"),
    "QuadrupedFetch-v1": ("origin", "rangefinder"),
}

#: Options that are not those of a task, and what is in place of them
NOT_OPTIONS = {
    "num_envs": "see `n_envs`",
    "env_seed": "see `seed`",
    "batch_size": "all environments make their steps together, as SB3 expects",
    "max_num_players": "there is one",
    "gym_reset_return_info": "SB3 has `reset_infos`",
    "base_path": "models are those of EnvPool",
    "xml_file": "models are those of EnvPool",
    "task_name": "each task has an id",
    "reward_threshold": "it changes nothing",
    "frame_stack": "see VecFrameStack",
    "wrapper_class": "there are no single environments to wrap, see VecEnvWrapper",
    **dict.fromkeys(
        ("render_mode", "render_env_id", "render_width", "render_height", "render_camera_id", "from_pixels"),
        "the ordinary environment renders",
    ),
}
#: Options that cannot be less
AT_LEAST = {"max_episode_steps": 1, "frame_skip": 1, "num_threads": 0, "thread_affinity_offset": -1}
#: Nor more: integers of EnvPool have 32 bits
INT_MAX = 2**31 - 1


def import_envpool() -> ModuleType:
    """
    :return: the package
    :raises ImportError: if it is not installed, telling how to, or why it cannot be; or too old
    """
    try:
        import envpool
    except ImportError as error:
        machine = f"{platform.system()} on {platform.machine()}"
        why = 'pip install "sb3-flow[envpool]"'
        if sys.version_info < (3, 11):
            why = "which needs Python 3.11 or later: the last one for Python 3.10, 0.8.4, is too old"
        elif machine not in ("Linux on x86_64", "Linux on aarch64", "Darwin on arm64", "Windows on AMD64"):
            why = f"which has no wheel for {machine}"
        raise ImportError(f"EnvPool is needed for this: {why}", name="envpool") from error
    version = tuple(int(part) for part in envpool.__version__.split(".")[:3] if part.isdigit())
    if version < MIN_VERSION:
        hint = ', which needs Python 3.11: pip install "sb3-flow[envpool]"'
        raise ImportError(f"EnvPool {envpool.__version__} is too old, 1.2.5 or later is needed{hint}", name="envpool")
    return envpool


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), 1, cutoff=0.8)
    return f" (did you mean {close[0]!r}?)" if close else ""


def to_envpool_id(env_id: str) -> str:
    """
    :param env_id: Id of an environment of gymnasium (``"dm_control/cheetah-run-v0"``, ``"HalfCheetah-v5"``), or of a task of
        EnvPool (``"CheetahRun-v1"``, ``"envpool/HalfCheetah-v5"``)
    :return: EnvPool's id of this task
    :raises ValueError: if EnvPool has no such task, or one that does not stand for this environment
    """
    if env_id in DIFFERENT:
        hint = f"it has an id of its own, {NAMESPACE}{TASKS[env_id]}"
        raise ValueError(f"EnvPool's task does not stand for {env_id}: {DIFFERENT[env_id]} ({hint})")
    if env_id in TASKS:
        return TASKS[env_id]
    known = import_envpool().list_all_envs()
    name = env_id.removeprefix(NAMESPACE)
    if name not in known:
        hint = _did_you_mean(name, [*TASKS, *known])
        raise ValueError(f"EnvPool has no task {env_id!r}, nor one that is known to be the same{hint}")
    return name


def to_ordinary_id(env_id: str) -> str:
    """
    :param env_id: Id of a task of EnvPool, with its prefix: ``"envpool/CheetahRun-v1"``
    :return: id of the environment of gymnasium of this task
    :raises ValueError: if there is none
    """
    name = env_id.removeprefix(NAMESPACE)
    if name not in ORDINARY:
        hint = _did_you_mean(name, ORDINARY) or ", and in Python make_envpool() needs none"
        raise ValueError(f"no environment of gymnasium is known for EnvPool's task {name!r}, to evaluate in{hint}")
    return ORDINARY[name]


def make_ordinary(env_id: str, **kwargs) -> gym.Env:
    """
    Make the environment of gymnasium of a task of EnvPool, with the observations that the task has in a ``VecEnv``.

    :param env_id: Id of the environment of gymnasium
    :param kwargs: For the environment
    :return: environment, whose observations are a Box
    """
    if env_id.startswith("dm_control/"):
        register_dm_control(env_id)
    env = gym.make(env_id, **kwargs)
    return gym.wrappers.FlattenObservation(env) if isinstance(env.observation_space, spaces.Dict) else env


def register_envpool() -> None:
    """
    Register the ids of EnvPool's tasks with gymnasium, for what needs an environment by itself: to evaluate, to render. It is
    the ordinary one (see :func:`make_ordinary`).
    """
    for name, env_id in ORDINARY.items():
        if f"{NAMESPACE}{name}" not in gym.registry:
            # (which has its own limit of steps and checks)
            gym.register(
                f"{NAMESPACE}{name}",
                entry_point="sb3_flow.envs.envpool:make_ordinary",
                kwargs=dict(env_id=env_id),
                order_enforce=False,
                disable_env_checker=True,
            )


def check_options(envpool_id: str, options: dict[str, Any]) -> dict[str, Any]:
    """
    :param envpool_id: EnvPool's id of a task
    :param options: Options of the task
    :return: the same, with the types that EnvPool expects
    :raises ValueError: if one of them is unknown, or not what it should be
    """
    known = import_envpool().make_spec(envpool_id).config._asdict()
    checked = {}
    for name, value in options.items():
        if name in NOT_OPTIONS:
            raise ValueError(f"`{name}` is not an option of {envpool_id} in EnvPool: {NOT_OPTIONS[name]}")
        if name not in known:
            hint = _did_you_mean(name, known.keys() - NOT_OPTIONS.keys())
            raise ValueError(f"`{name}` is not an option of {envpool_id} in EnvPool{hint}")
        kind = type(known[name])
        if kind is int:
            value = to_int(name, value)
        # (numbers are no booleans, nor booleans numbers)
        fits = isinstance(value, Real) and not isinstance(value, bool) if kind is float else isinstance(value, kind)
        if not fits:
            raise ValueError(f"`{name}` must be a {kind.__name__}, it is {value!r}")
        if name in AT_LEAST and value < AT_LEAST[name]:
            raise ValueError(f"`{name}` must be at least {AT_LEAST[name]}, it is {value}")
        if kind is int and value > INT_MAX:
            raise ValueError(f"`{name}` must be at most {INT_MAX}, it is {value}")
        checked[name] = kind(value)
    return checked


class EnvPoolVecEnv(VecEnv):
    """
    Environments of EnvPool. As in a ``DummyVecEnv`` of environments in ``Monitor``, an environment is reset as soon as its
    episode ends, with the last observation in ``info["terminal_observation"]`` and return, length and time of the episode in
    ``info["episode"]``.

    :param envpool_id: EnvPool's id of the task
    :param n_envs: Number of environments
    :param monitor_dir: Folder of a Monitor log of all environments, none if None
    :param info_keywords: What of ``info`` is in ``info["episode"]`` and the log, too
    :param options: Options of the task in EnvPool, ``num_threads`` included
    :raises ValueError: if one of the arguments is wrong, or SB3 knows no such environments
    """

    def __init__(
        self,
        envpool_id: str,
        n_envs: int,
        monitor_dir: str | None = None,
        info_keywords: Sequence[str] = (),
        **options,
    ):
        n_envs = to_int("n_envs", n_envs, at_least=1)
        self._envpool_id = envpool_id
        self._options_of_task = check_options(envpool_id, options)
        if not self._options_of_task.get("num_threads") and hasattr(os, "sched_getaffinity"):
            # EnvPool counts the cores of the machine, whichever of them this process may use
            self._options_of_task["num_threads"] = min(n_envs, len(os.sched_getaffinity(0)))
        spec = import_envpool().make_spec(envpool_id, num_envs=n_envs, **self._options_of_task)
        if spec.config.max_num_players > 1:
            raise ValueError(f"{envpool_id} has several players, of whom SB3 knows one")
        # EnvPool does not tell a termination in the last step of the limit from a truncation: the limit is our own
        self._limit = spec.config.max_episode_steps
        self._options_of_task["max_episode_steps"] = min(self._limit + 1, INT_MAX)
        #: Whether an episode that comes to its end at the limit is truncated all the same
        self._limit_comes_first = ORDINARY.get(envpool_id, "").startswith("dm_control/")
        #: Parts of the observation, in the order of ``FlattenObservation``. None if there is only one
        self._keys: list[str] | None = None
        observation_space = spec.observation_space
        if isinstance(observation_space, spaces.Dict):
            self._keys = sorted(observation_space.spaces.keys() - set(NOT_OBSERVED.get(envpool_id, ())))
            observation_space = spaces.Dict({key: observation_space.spaces[key] for key in self._keys})
            if not all(isinstance(space, spaces.Box) for space in observation_space.spaces.values()):
                raise ValueError(f"the observations of {envpool_id} are a Dict of more than vectors: {observation_space}")
            observation_space = spaces.flatten_space(observation_space)
        action_space = spec.action_space
        if envpool_id in MUJOCO:
            # As gymnasium has it. (EnvPool computes with 64 bits)
            low, high = action_space.low.astype(np.float32), action_space.high.astype(np.float32)
            action_space = spaces.Box(low, high, dtype=np.float32)
        super().__init__(n_envs, _without_bounds(observation_space), action_space)

        self._pool: Any = None
        self._actions = np.empty(0)
        self._info_keys = [
            key.removeprefix("info:")
            for key in spec.state_array_spec
            if key.startswith("info:") and key != "info:env_id" and "." not in key
        ]
        self._info_keywords = tuple(info_keywords)
        for key in self._info_keywords:
            if key not in self._info_keys:
                hint = f"it has {', '.join(self._info_keys) or 'nothing'}"
                raise ValueError(f"`info_keywords`: there is no {key!r} in the info of {envpool_id}, {hint}")
        self._returns = np.zeros(n_envs)
        self._t_start = time.time()
        self._results_writer: ResultsWriter | None = None
        if monitor_dir is not None:
            header: dict[str, Any] = {"t_start": self._t_start, "env_id": f"{NAMESPACE}{envpool_id}"}
            # (each of several processes has one)
            path = os.path.join(monitor_dir, str(distributed.rank()))
            self._results_writer = ResultsWriter(path, header, self._info_keywords)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        if seed is not None:
            seed = to_int("seed", seed, at_least=0)
            if seed >= 2**32:
                raise ValueError(f"`seed` must be less than 2**32, it is {seed}")
        return super().seed(seed)

    def set_options(self, options: list[dict] | dict | None = None) -> None:
        if options and any([options] if isinstance(options, dict) else options):
            raise ValueError(f"environments of EnvPool have no options of `reset()`, found {options}")

    def reset(self) -> VecEnvObs:
        if self._pool is None and self._seeds[0] is None:
            self.seed()
        if self._seeds[0] is not None:
            # EnvPool takes a seed when it is made, a signed one
            seeds = np.array([seed % 2**32 for seed in self._seeds if seed is not None], dtype=np.uint32).view(np.int32)
            self._pool = import_envpool().make_gymnasium(
                self._envpool_id, num_envs=self.num_envs, env_seed=seeds, **self._options_of_task
            )
            self._reset_seeds()
        obs, info = self._pool.reset()
        self._returns[:] = 0
        self.reset_infos = self._to_infos(info, self.num_envs)
        return self._to_obs(obs)

    def step_async(self, actions: np.ndarray) -> None:
        actions = np.asarray(actions)
        expected = (self.num_envs, *(self.action_space.shape or ()))
        # (which EnvPool does not check)
        if actions.shape != expected:
            raise ValueError(f"actions have the shape {actions.shape}, expected {expected}")
        if not np.isfinite(actions).all():
            raise ValueError(f"actions are not all finite: {actions}")
        if isinstance(self.action_space, spaces.Discrete):
            first, n_actions = self.action_space.start, self.action_space.n
            is_inside = (first <= actions) & (actions < first + n_actions)
            if not np.issubdtype(actions.dtype, np.integer) or not is_inside.all():
                raise ValueError(f"actions must be integers from {first} to {first + n_actions - 1}, they are {actions}")
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        if self._pool is None:
            raise RuntimeError("`reset()` must be called before `step()`")
        obs, rewards, terminated, truncated, info = self._pool.step(self._actions)
        obs, infos = self._to_obs(obs), self._to_infos(info, self.num_envs, {"TimeLimit.truncated": False})
        self._returns += rewards
        lengths = info["elapsed_step"]
        is_at_limit = lengths >= self._limit
        if self._limit_comes_first:
            terminated = terminated & ~is_at_limit
        dones = terminated | truncated | is_at_limit
        if dones.any():
            indices = np.flatnonzero(dones).astype(np.int32)
            terminal_obs = obs[indices]
            # Otherwise EnvPool would reset it in place of the next step
            first_obs, reset_info = self._pool.reset(indices)
            obs[indices] = self._to_obs(first_obs)
            reset_infos = self._to_infos(reset_info, len(indices))
            for i, index in enumerate(indices):
                infos[index]["terminal_observation"] = terminal_obs[i]
                infos[index]["TimeLimit.truncated"] = bool(not terminated[index])
                infos[index]["episode"] = self._to_episode(infos[index], self._returns[index], lengths[index])
                self.reset_infos[index] = reset_infos[i]
            self._returns[indices] = 0
        return obs, rewards, dones, infos

    def _to_obs(self, obs: Any) -> np.ndarray:
        if self._keys is None:
            return obs
        return np.concatenate([obs[key].reshape(len(obs[key]), -1) for key in self._keys], axis=1)

    def _to_infos(self, info: dict[str, Any], n_envs: int, more: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        infos: list[dict[str, Any]] = [dict(more or {}) for _ in range(n_envs)]
        for key in self._info_keys:
            for env_info, value in zip(infos, info[key], strict=True):
                env_info[key] = value
        return infos

    def _to_episode(self, info: dict[str, Any], episode_return: float, length: int) -> dict[str, Any]:
        episode = {"r": round(float(episode_return), 6), "l": int(length), "t": round(time.time() - self._t_start, 6)}
        episode |= {key: info[key] for key in self._info_keywords}
        if self._results_writer is not None:
            self._results_writer.write_row(episode)
        return episode

    def close(self) -> None:
        self._pool = None
        if self._results_writer is not None:
            self._results_writer.close()

    def render(self, mode: str | None = None) -> np.ndarray | None:
        raise NotImplementedError("environments of EnvPool are not rendered: load the model with the ordinary environment")

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        # Those of an environment of gymnasium that this one has, too
        if attr_name == "render_mode":
            value = None
        elif attr_name in ("observation_space", "action_space"):
            value = getattr(self, attr_name)
        else:
            raise AttributeError(f"environments of EnvPool have no attribute {attr_name!r}")
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        raise NotImplementedError(f"attributes of environments of EnvPool cannot be set, found {attr_name!r}")

    def env_method(self, method_name: str, *method_args, indices: VecEnvIndices = None, **method_kwargs) -> list[Any]:
        raise NotImplementedError(f"environments of EnvPool have no methods to be called, found {method_name!r}")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        # All that Monitor does is done
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]


def _without_bounds(space: spaces.Space) -> spaces.Space:
    """EnvPool has the smallest positive and the largest number for bounds that there are none."""
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        return space
    limits = np.finfo(space.dtype)  # type: ignore[arg-type]  # (mypy does not know that it is a float by now)
    low = np.where(space.low == limits.tiny, -np.inf, space.low)
    high = np.where(space.high == limits.max, np.inf, space.high)
    return spaces.Box(low, high, dtype=space.dtype)  # type: ignore[arg-type]  # (as above)


def make_envpool(
    env_id: str,
    n_envs: int = 1,
    seed: int | None = None,
    monitor_dir: str | None = None,
    info_keywords: Sequence[str] = (),
    **options,
) -> EnvPoolVecEnv:
    """
    Create a monitored ``VecEnv`` of EnvPool, as SB3's ``make_vec_env`` creates one of environments of gymnasium. Of a task
    that both have, observations, actions and episodes are those of the ordinary environment, its observations flattened
    (``gymnasium.wrappers.FlattenObservation``), so that a model can change from one to the other.

    :param env_id: Id of an environment of gymnasium (``"dm_control/cheetah-run-v0"``, ``"HalfCheetah-v5"``), or of a task of
        EnvPool (``"CheetahRun-v1"``, or ``"envpool/CheetahRun-v1"``)
    :param n_envs: Number of environments
    :param seed: Initial seed of the random number generators, a random one if None
    :param monitor_dir: Folder where the Monitor log is saved, none if None
    :param info_keywords: What of ``info`` is logged, too, at the end of an episode
    :param options: Options of the task in EnvPool: ``max_episode_steps``, ``num_threads``, ``ctrl_cost_weight``, ...
    :return: vectorized environment
    :raises ImportError: if EnvPool is not installed, or too old
    :raises ValueError: if an argument is wrong, or the task of this id is not the same in EnvPool
    """
    vec_env = EnvPoolVecEnv(to_envpool_id(env_id), n_envs, monitor_dir, info_keywords, **options)
    # Prepare the seeds for the first reset
    vec_env.seed(seed)
    return vec_env
