"""
Are EnvPool's tasks the ordinary ones? `python benchmarks/envpool_tasks.py`

For each task, EnvPool's and the ordinary environment (dm_control through shimmy, gymnasium's MuJoCo) are held against each other:

  spaces    shape of the observation, bounds of the actions
  steps     EnvPool is stepped with eight kinds of actions. The ordinary environment is put into the state that EnvPool's
            observation determines, is given the same action, and observation, reward, `terminated` and `truncated` are compared;
            at every step, so that errors do not grow (`one step`), and freely from the start of each episode (`free`)
  resets    1000 first observations of each, coordinate by coordinate (Kolmogorov-Smirnov)
  returns   200 episodes of each of three fixed policies in each simulator (Kolmogorov-Smirnov)

A task is the same if the spaces are equal; the flags are equal at each step, and observations and rewards differ by no more than
TOLERANCE in one step (EnvPool's rewards have single precision); and no test of resets or returns has p < SIGNIFICANCE divided by
the number of tests of that kind. The results, one file for each task, and a table of them are left in benchmarks/results/envpool.
"""

import argparse
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from runs import ROOT, provenance, write_result

RESULTS = ROOT / "benchmarks" / "results" / "envpool"
#: of (ours - EnvPool's) / max(1, |ours|)
TOLERANCE = 1e-5
SIGNIFICANCE = 0.01
N_RESETS, N_EPISODES = 1000, 200
HORIZONS = (1, 10, 100)


# --- The state that an observation determines. What it does not determine stays as it is. After a step, MuJoCo's positions of
# bodies in space are those of the substep before, in gymnasium's environments: they are used at the start of an episode only


def nearest(angle: float, sine: float, cosine: float) -> float:
    """The angle next to a given one that has this sine and cosine."""
    return angle + np.angle((cosine + 1j * sine) * np.exp(-1j * angle))


def all_but(n: int, limit: float = np.inf) -> Callable:
    """Positions but the first n, then velocities, which are not known at the limits that the observation clips them to."""

    def restore(model, data, obs, first):
        velocities = obs[model.nq - n : model.nq - n + model.nv]
        data.qpos[n:] = obs[: model.nq - n]
        data.qvel[:] = np.where(np.abs(velocities) < limit, velocities, data.qvel)

    return restore


def cartpole(model, data, obs, first):
    data.qpos[:] = obs[0], nearest(data.qpos[1], obs[2], obs[1])
    data.qvel[:] = obs[3:]


def finger(model, data, obs, first):
    # Flattened: [dist_to_target,] position, [target_position,] touch, velocity. The tip goes around with the hinge
    position = obs[-11:-7] if len(obs) == 12 else obs[:4]
    if len(obs) == 12:
        data_target = obs[5:7]
        spinner = data.body("spinner").xpos
        model.site("target").pos[[0, 2]] = spinner[[0, 2]] + data_target
    data.qpos[:] = *position[:2], nearest(data.qpos[2], -position[2], position[3])
    data.qvel[:] = obs[-3:]


def fish(model, data, obs, first):
    data.qpos[7:] = obs[:7]
    data.qvel[:] = obs[11:]


def dmc_reacher(model, data, obs, first):
    import mujoco

    data.qpos[:] = obs[:2]
    data.qvel[:] = obs[4:]
    if first:
        mujoco.mj_kinematics(model, data)
        model.geom("target").pos[:2] = data.geom("finger").xpos[:2] + obs[2:4]


def reacher(model, data, obs, first):
    data.qpos[:] = *(nearest(data.qpos[i], obs[2 + i], obs[i]) for i in range(2)), *obs[4:6]
    data.qvel[:2] = obs[6:8]


def pusher(model, data, obs, first):
    data.qpos[:7], data.qvel[:7] = obs[:7], obs[7:14]
    if first:
        data.qpos[7:9] = (obs[17:19] - model.body("object").pos[:2])[::-1]


def inverted_double_pendulum(model, data, obs, first):
    data.qpos[:] = obs[0], *(nearest(data.qpos[i], obs[i], obs[2 + i]) for i in (1, 2))
    data.qvel[:] = np.where(np.abs(obs[5:8]) < 10, obs[5:8], data.qvel)


class Task(NamedTuple):
    """A task, by its two names, and how MuJoCo's state is restored from an observation."""

    env_id: str
    pool_id: str
    restore: Callable


TASKS = {
    task.env_id: task
    for task in (
        Task("dm_control/ball_in_cup-catch-v0", "BallInCupCatch-v1", all_but(0)),
        Task("dm_control/cartpole-balance-v0", "CartpoleBalance-v1", cartpole),
        Task("dm_control/cheetah-run-v0", "CheetahRun-v1", all_but(1)),
        Task("dm_control/finger-spin-v0", "FingerSpin-v1", finger),
        Task("dm_control/finger-turn_easy-v0", "FingerTurnEasy-v1", finger),
        Task("dm_control/finger-turn_hard-v0", "FingerTurnHard-v1", finger),
        Task("dm_control/fish-swim-v0", "FishSwim-v1", fish),
        Task("dm_control/point_mass-easy-v0", "PointMassEasy-v1", all_but(0)),
        Task("dm_control/reacher-easy-v0", "ReacherEasy-v1", dmc_reacher),
        Task("dm_control/reacher-hard-v0", "ReacherHard-v1", dmc_reacher),
        Task("Ant-v5", "Ant-v5", all_but(2)),
        Task("HalfCheetah-v5", "HalfCheetah-v5", all_but(1)),
        Task("Hopper-v5", "Hopper-v5", all_but(1, limit=10)),
        Task("Humanoid-v5", "Humanoid-v5", all_but(2)),
        Task("HumanoidStandup-v5", "HumanoidStandup-v5", all_but(2)),
        Task("InvertedDoublePendulum-v5", "InvertedDoublePendulum-v5", inverted_double_pendulum),
        Task("InvertedPendulum-v5", "InvertedPendulum-v5", all_but(0)),
        Task("Pusher-v5", "Pusher-v5", pusher),
        Task("Reacher-v5", "Reacher-v5", reacher),
        Task("Swimmer-v5", "Swimmer-v5", all_but(2)),
        Task("Walker2d-v5", "Walker2d-v5", all_but(1, limit=10)),
    )
}


# --- The two simulators


class Pool:
    """EnvPool, with the observations of the ordinary environment: its keys, in its order, flattened."""

    def __init__(self, task: Task, keys: list[str] | None, n_envs: int, seed: int):
        import envpool

        self.keys, self.n_envs = keys, n_envs
        self.envs = envpool.make_gymnasium(task.pool_id, num_envs=n_envs, num_threads=1, seed=seed)

    def flat(self, obs) -> np.ndarray:
        parts = [obs] if self.keys is None else [obs[key] for key in self.keys]
        return np.concatenate([part.reshape(self.n_envs, -1) for part in parts], axis=1)

    def reset(self) -> np.ndarray:
        return self.flat(self.envs.reset()[0])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        obs, rewards, terminated, truncated, _ = self.envs.step(actions)
        return self.flat(obs), rewards.astype(np.float64), terminated, truncated


class Ordinary:
    """The ordinary environment, whose state can be set."""

    def __init__(self, task: Task):
        self.restore = task.restore
        env = gym.make(task.env_id)
        self.keys = list(env.observation_space) if isinstance(env.observation_space, spaces.Dict) else None
        self.env = env if self.keys is None else gym.wrappers.FlattenObservation(env)
        #: dm_control's physics, or None
        self.physics = env.unwrapped._env.physics if self.keys is not None else None  # type: ignore[attr-defined]

    @property
    def state(self) -> tuple[Any, Any]:
        env: Any = self.env.unwrapped
        return (env.model, env.data) if self.physics is None else (self.physics.model.ptr, self.physics.data.ptr)

    def start(self, obs: np.ndarray, orientation: np.ndarray | None = None) -> None:
        """A new episode that starts with an observation."""
        import mujoco

        self.env.reset()
        model, data = self.state
        mujoco.mj_resetData(model, data)
        if self.physics is not None:
            self.physics.after_reset()
        self.restore(model, data, obs, True)
        if orientation is not None:
            aim(model, data, obs, orientation)
        if self.physics is None:
            mujoco.mj_forward(model, data)
        else:
            self.physics.after_reset()

    def correct(self, obs: np.ndarray) -> None:
        """Go on from the state of an observation of the same step."""
        import mujoco

        model, data = self.state
        self.restore(model, data, obs, False)
        if self.physics is not None:
            # dm_control's steps begin with the second half of MuJoCo's
            mujoco.mj_step1(model, data)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        obs, reward, terminated, truncated, _ = self.env.step(action)
        return obs, float(reward), terminated, truncated


# --- The fish swims without gravity and without anything to touch, so the same motion in another orientation is the same motion.
# Its orientation is not observed, but the velocity is, in space


def aim(model, data, obs, orientation):
    """Turn the fish, and put the target where its mouth sees it."""
    import mujoco

    data.qpos[3:7] = orientation
    mujoco.mj_kinematics(model, data)
    mouth = data.geom("mouth")
    model.geom("target").pos[:] = mouth.xpos + mouth.xmat.reshape(3, 3) @ obs[7:10]


def orientation_of(ordinary: Ordinary, episode: "Episode", n_steps: int = 50) -> np.ndarray:
    """The orientation at the start: the one in which the velocities of the first steps are the ones observed."""
    import mujoco
    from scipy.spatial.transform import Rotation

    ordinary.start(episode.obs[0], np.array([1.0, 0, 0, 0]))
    ours = []
    for action in episode.actions[:n_steps]:
        ordinary.step(action)
        ours.append(ordinary.state[1].qvel[:3].copy())
    theirs = episode.obs[1 : n_steps + 1, 11:14]
    rotation, _ = Rotation.align_vectors(theirs, np.array(ours))
    return rotation.as_quat(scalar_first=True)


# --- Steps


class Episode(NamedTuple):
    """What EnvPool did from one reset to the next. Observations are one more than steps."""

    kind: str
    obs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


POLICIES = ("zero", "uniform", "sinusoid")
KINDS = ("uniform", "zero", "upper bound", "lower bound", "bang-bang", "sinusoid", "small", "linear")


def act(kind: str, t: int, obs: np.ndarray, space: spaces.Box, seed: int) -> np.ndarray:
    """An action of a fixed policy, with noise of its own for each seed."""
    unit = unit_action(kind, t, obs, space.shape[0], seed)
    # Representable in single precision, which gymnasium's actions have
    return (space.low + (unit + 1) / 2 * (space.high - space.low)).astype(np.float32).astype(np.float64)


def unit_action(kind: str, t: int, obs: np.ndarray, dim: int, seed: int) -> np.ndarray:
    rng, fixed = np.random.default_rng([seed, t]), np.random.default_rng(0)
    if kind == "zero":
        return np.zeros(dim)
    if kind in ("upper bound", "lower bound"):
        return np.full(dim, 1.0 if kind == "upper bound" else -1.0)
    if kind == "bang-bang":
        return np.random.default_rng([seed, t // 10]).choice([-1.0, 1.0], dim)
    if kind == "sinusoid":
        return np.sin(fixed.uniform(0.05, 0.5, dim) * t + fixed.uniform(0, 2 * np.pi, dim))
    if kind == "small":
        return 0.1 * rng.uniform(-1, 1, dim)
    if kind == "linear":
        return np.tanh(fixed.standard_normal((dim, len(obs))) @ np.clip(obs, -10, 10) / np.sqrt(len(obs)))
    return rng.uniform(-1, 1, dim)


def record(task: Task, ordinary: Ordinary, n_steps: int, seed: int) -> list[Episode]:
    space = ordinary.env.action_space
    assert isinstance(space, spaces.Box)
    pool = Pool(task, ordinary.keys, len(KINDS), seed)
    obs = pool.reset()
    rows: list[list[list]] = [[] for _ in KINDS]
    starts = list(obs)
    episodes = []
    done = np.zeros(len(KINDS), bool)
    for t in range(n_steps):
        actions = np.stack([act(kind, t, obs[i], space, seed + i) for i, kind in enumerate(KINDS)])
        obs, rewards, terminated, truncated = pool.step(actions)
        last_done, done = done, terminated | truncated
        for i, kind in enumerate(KINDS):
            if last_done[i]:
                # This step was the reset
                assert not done[i]
                starts[i] = obs[i]
                continue
            rows[i].append([obs[i], actions[i], rewards[i], terminated[i], truncated[i]])
            if done[i] or t == n_steps - 1:
                following, *rest = (np.array(values) for values in zip(*rows[i], strict=True))
                episodes.append(Episode(kind, np.concatenate([starts[i][None], following]), *rest))
                rows[i] = []
    return episodes


def difference(ours: Any, theirs: Any) -> Any:
    return np.abs(np.subtract(ours, theirs)) / np.maximum(1, np.abs(ours))


def compare_steps(ordinary: Ordinary, episodes: list[Episode], is_fish: bool) -> dict[str, Any]:
    one_step: list[np.ndarray] = []
    rewards: list[float] = []
    free = {h: 0.0 for h in HORIZONS}
    flags = rewarded = 0
    for episode in episodes:
        orientation = orientation_of(ordinary, episode) if is_fish else None
        ordinary.start(episode.obs[0], orientation)
        for t, action in enumerate(episode.actions):
            obs, reward, terminated, truncated = ordinary.step(action)
            one_step.append(difference(obs, episode.obs[t + 1]))
            rewards.append(difference(reward, float(episode.rewards[t])))
            flags += (terminated, truncated) != (episode.terminated[t], episode.truncated[t])
            rewarded += reward != 0
            ordinary.correct(episode.obs[t + 1])
        ordinary.start(episode.obs[0], orientation)
        worst = 0.0
        for t, action in enumerate(episode.actions[: max(HORIZONS)]):
            obs, *_ = ordinary.step(action)
            worst = max(worst, difference(obs, episode.obs[t + 1]).max())
            if t + 1 in HORIZONS:
                free[t + 1] = max(free[t + 1], worst)
    per_step = np.max(one_step, axis=1)
    return dict(
        steps=len(rewards),
        episodes=len(episodes),
        longest_episode=max(len(episode.actions) for episode in episodes),
        steps_with_reward=rewarded,
        one_step=dict(
            observation=float(per_step.max()),
            observation_median=float(np.median(per_step)),
            observation_above_tolerance=float(np.mean(per_step > TOLERANCE)),
            per_coordinate=np.max(one_step, axis=0).tolist(),
            reward=float(np.max(rewards)),
            reward_above_tolerance=float(np.mean(np.array(rewards) > TOLERANCE)),
            flags=flags,
        ),
        free={str(h): value for h, value in free.items()},
    )


# --- Distributions


def p_value(ours: np.ndarray, theirs: np.ndarray) -> float:
    """
    That two samples are of the same distribution.

    Values are rounded, so that one that is always the same but for the last bits is the same.
    """
    from scipy.stats import ks_2samp

    return float(ks_2samp(np.round(ours, 9), np.round(theirs, 9)).pvalue)


def compare_resets(task: Task, ordinary: Ordinary, seed: int) -> dict[str, Any]:
    n_envs = 50
    pool = Pool(task, ordinary.keys, n_envs, seed)
    theirs = np.concatenate([pool.reset() for _ in range(N_RESETS // n_envs)])
    ours = np.stack([ordinary.env.reset(seed=seed if i == 0 else None)[0] for i in range(N_RESETS)])
    return dict(
        n=N_RESETS,
        p=[p_value(*columns) for columns in zip(ours.T, theirs.T, strict=True)],
        distinct=len(np.unique(theirs, axis=0)),
        ours=dict(mean=ours.mean(0).tolist(), std=ours.std(0).tolist()),
        envpool=dict(mean=theirs.mean(0).tolist(), std=theirs.std(0).tolist()),
    )


def pool_returns(task: Task, ordinary: Ordinary, kind: str, seed: int, n_envs: int = 20) -> np.ndarray:
    """Returns of the first episodes of each environment: the same number, or short ones would be more of them."""
    pool = Pool(task, ordinary.keys, n_envs, seed)
    space = ordinary.env.action_space
    assert isinstance(space, spaces.Box)
    obs, done = pool.reset(), np.zeros(n_envs, bool)
    steps = np.zeros(n_envs, int)
    totals = np.zeros(n_envs)
    returns: list[list[float]] = [[] for _ in range(n_envs)]
    while min(map(len, returns)) < N_EPISODES // n_envs:
        actions = np.stack([act(kind, steps[i], obs[i], space, seed + i) for i in range(n_envs)])
        obs, rewards, terminated, truncated = pool.step(actions)
        # The step after the last of an episode is the reset
        totals = np.where(done, 0, totals + rewards)
        steps = np.where(done, 0, steps + 1)
        done = ~done & (terminated | truncated)
        for i in np.flatnonzero(done):
            returns[i].append(float(totals[i]))
    return np.concatenate([values[: N_EPISODES // n_envs] for values in returns])


def ordinary_returns(ordinary: Ordinary, kind: str, seed: int) -> np.ndarray:
    returns = []
    for i in range(N_EPISODES):
        obs, _ = ordinary.env.reset(seed=seed if i == 0 else None)
        total, t, done = 0.0, 0, False
        while not done:
            action = act(kind, t, obs, ordinary.env.action_space, seed + 1000 + i)
            obs, reward, terminated, truncated = ordinary.step(action)
            total, t, done = total + reward, t + 1, terminated or truncated
        returns.append(total)
    return np.array(returns)


def interval(values: np.ndarray) -> list[float]:
    """Mean, and half of its 95 % confidence interval."""
    return [float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))]


def compare_returns(task: Task, ordinary: Ordinary, seed: int) -> dict[str, Any]:
    result = {}
    for kind in POLICIES:
        ours, theirs = ordinary_returns(ordinary, kind, seed), pool_returns(task, ordinary, kind, seed)
        result[kind] = dict(
            p=p_value(ours, theirs),
            ours=interval(ours),
            envpool=interval(theirs),
            max=[float(ours.max()), float(theirs.max())],
        )
    return result
