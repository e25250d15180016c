"""
Are EnvPool's tasks the ordinary ones? `python benchmarks/envpool_tasks.py`

The `VecEnv` of EnvPool is held against the ordinary environment (dm_control through shimmy, gymnasium's MuJoCo) of each task:

  spaces    shape of the observation, bounds of the actions
  steps     EnvPool is stepped with nine kinds of actions. The ordinary environment is put into the state that EnvPool's
            observation determines, and is given the same action: what observation and reward differ by after one step, and
            the observation after 10 and 100 steps from the start of an episode, and whether it ends in the same way
  resets    1000 first observations of each, coordinate by coordinate (Kolmogorov-Smirnov)
  returns   where one step differs: 200 episodes in each simulator (Kolmogorov-Smirnov) of three fixed policies, one of them
            trained in EnvPool, until one differs

The simulators agree in one step if no more than SHARE of the steps differ by more than TOLERANCE, in the observation or in
the reward. A task is the same if

  - the spaces are equal, and episodes end at the same steps in the same way;
  - no coordinate of the resets has p < SIGNIFICANCE divided by the number of coordinates of all tasks;
  - they agree in one step when the ordinary environment has EnvPool's version of MuJoCo; and with the version that is
    installed, or else no policy's returns have p < SIGNIFICANCE divided by three times the number of tasks.

The results, one file for each task, and a table of them are left in benchmarks/results/envpool. Those with the version of
MuJoCo that is in EnvPool 1.2.5 come first:

  pip install --no-deps --target OLD mujoco==3.6.0 dm_control==1.0.38
  PYTHONPATH=OLD python benchmarks/envpool_tasks.py --steps-only --results benchmarks/results/envpool/mujoco-3.6.0
"""

import argparse
import json
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from gymnasium import spaces
from runs import ROOT, provenance, write_result, write_table

RESULTS = ROOT / "benchmarks" / "results" / "envpool"
SAME_MUJOCO = RESULTS / "mujoco-3.6.0"
#: of |ordinary - EnvPool| / max(1, |ordinary|)
TOLERANCE, SHARE = 1e-2, 1e-3
SIGNIFICANCE = 0.01
N_STEPS, N_RESETS, N_EPISODES, N_POLICIES = 1100, 1000, 200, 3
HORIZONS = (10, 100)
TRAINING_STEPS = 200_000


# --- The state that an observation determines: what it does not determine stays as it is


def nearest(angle: float, sine: float, cosine: float) -> float:
    """The angle next to a given one that has this sine and cosine."""
    return float(angle + np.angle((cosine + 1j * sine) * np.exp(-1j * angle)))


def all_but(n: int, limit: float = np.inf) -> Callable:
    """Positions but the first n, then velocities. What the observation clips to a limit is not known."""

    def restore(model, data, obs, first):
        velocities = obs[model.nq - n : model.nq - n + model.nv]
        data.qpos[n:] = obs[: model.nq - n]
        data.qvel[:] = np.where(np.abs(velocities) < limit, velocities, data.qvel)

    return restore


def cartpole(model, data, obs, first):
    data.qpos[:] = obs[0], nearest(data.qpos[1], obs[2], obs[1])
    data.qvel[:] = obs[3:]


def finger_spin(model, data, obs, first):
    position, velocity = obs[:4], obs[6:]
    # The tip goes around with the hinge
    data.qpos[:] = position[0], position[1], nearest(data.qpos[2], -position[2], position[3])
    data.qvel[:] = velocity


def finger_turn(model, data, obs, first):
    position, target, touch, velocity = np.split(obs[1:], [4, 6, 8])
    finger_spin(model, data, np.concatenate([position, touch, velocity]), first)
    model.site("target").pos[[0, 2]] = data.body("spinner").xpos[[0, 2]] + target


def fish(model, data, obs, first):
    data.qpos[7:] = obs[:7]
    data.qvel[:] = obs[11:]


def reacher_of_dmc(model, data, obs, first):
    import mujoco

    data.qpos[:], to_target, data.qvel[:] = np.split(obs, [2, 4])
    if first:
        mujoco.mj_kinematics(model, data)
        model.geom("target").pos[:2] = data.geom("finger").xpos[:2] + to_target


def reacher(model, data, obs, first):
    data.qpos[:] = *(nearest(data.qpos[i], obs[2 + i], obs[i]) for i in range(2)), *obs[4:6]
    data.qvel[:2] = obs[6:8]


def pusher(model, data, obs, first):
    data.qpos[:7], data.qvel[:7] = obs[:7], obs[7:14]
    # MuJoCo's positions in space, which are observed, are those before the last substep: not those of the joints
    error = obs[17:19] - (model.body("object").pos if first else data.body("object").xpos)[:2]
    data.qpos[7:9] = error[::-1] + (0 if first else data.qpos[7:9])


def inverted_double_pendulum(model, data, obs, first):
    data.qpos[:] = obs[0], *(nearest(data.qpos[i], obs[i], obs[2 + i]) for i in (1, 2))
    data.qvel[:] = np.where(np.abs(obs[5:8]) < 10, obs[5:8], data.qvel)


#: How MuJoCo's state is restored from an observation, by the task
RESTORE: dict[str, Callable[[Any, Any, np.ndarray, bool], None]] = {
    "dm_control/ball_in_cup-catch-v0": all_but(0),
    "dm_control/cartpole-balance-v0": cartpole,
    "dm_control/cheetah-run-v0": all_but(1),
    "dm_control/finger-spin-v0": finger_spin,
    "dm_control/finger-turn_easy-v0": finger_turn,
    "dm_control/finger-turn_hard-v0": finger_turn,
    "dm_control/fish-swim-v0": fish,
    "dm_control/point_mass-easy-v0": all_but(0),
    "dm_control/reacher-easy-v0": reacher_of_dmc,
    "dm_control/reacher-hard-v0": reacher_of_dmc,
    "Ant-v5": all_but(2),
    "HalfCheetah-v5": all_but(1),
    "Hopper-v5": all_but(1, limit=10),
    "Humanoid-v5": all_but(2),
    "HumanoidStandup-v5": all_but(2),
    "InvertedDoublePendulum-v5": inverted_double_pendulum,
    "InvertedPendulum-v5": all_but(0),
    "Pusher-v5": pusher,
    "Reacher-v5": reacher,
    "Swimmer-v5": all_but(2),
    "Walker2d-v5": all_but(1, limit=10),
}


# --- The two simulators


class Ordinary:
    """The ordinary environment, whose state can be set."""

    def __init__(self, env_id: str):
        from sb3_flow.envs.envpool import make_ordinary

        self.env_id, self.restore = env_id, RESTORE[env_id]
        self.env = make_ordinary(env_id)
        assert isinstance(self.env.action_space, spaces.Box)
        self.action_space = self.env.action_space
        self.unwrapped = cast(Any, self.env.unwrapped)
        #: of dm_control, None of gymnasium's own environments
        self.physics = self.unwrapped._env.physics if env_id.startswith("dm_control/") else None

    @property
    def state(self) -> tuple[Any, Any]:
        """MuJoCo's model and data."""
        if self.physics is None:
            return self.unwrapped.model, self.unwrapped.data
        return self.physics.model.ptr, self.physics.data.ptr

    def start(self, obs: np.ndarray, orientation: np.ndarray | None = None) -> None:
        """
        Begin an episode.

        :param obs: Its first observation
        :param orientation: of the fish, a quaternion
        """
        import mujoco

        self.env.reset()
        model, data = self.state
        mujoco.mj_resetData(model, data)
        forward = (lambda: mujoco.mj_forward(model, data)) if self.physics is None else self.physics.after_reset
        forward()
        self.restore(model, data, obs, True)
        if orientation is not None:
            turn(model, data, obs, orientation)
        forward()

    def correct(self, obs: np.ndarray) -> None:
        """Go on from the state of an observation that is nearly that of now."""
        import mujoco

        model, data = self.state
        self.restore(model, data, obs, False)
        if self.physics is not None:
            # dm_control's steps begin with the second half of one of MuJoCo
            mujoco.mj_step1(model, data)

    def reset(self, seed: int | None = None) -> np.ndarray:
        return self.env.reset(seed=seed)[0]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, str]:
        obs, reward, terminated, truncated, _ = self.env.step(action)
        return obs, float(reward), end_of(terminated or truncated, truncated and not terminated)


def make_pool(env_id: str, n_envs: int, seed: int) -> Any:
    """EnvPool's environments, of tasks that are not the same, too."""
    from sb3_flow.envs import envpool

    return envpool.make_envpool(f"envpool/{envpool.TASKS[env_id]}", n_envs=n_envs, seed=seed, num_threads=1)


# --- The fish swims without gravity and touches nothing: turned, its motion is the same. How it is turned is not observed, but
# its velocity in space is


def turn(model, data, obs, orientation):
    """Turn the fish, and put the target where its mouth sees it."""
    import mujoco

    data.qpos[3:7] = orientation
    mujoco.mj_kinematics(model, data)
    mouth = data.geom("mouth")
    model.geom("target").pos[:] = mouth.xpos + mouth.xmat.reshape(3, 3) @ obs[7:10]


def orientation_of(ordinary: Ordinary, episode: "Episode", n_steps: int = 50) -> np.ndarray:
    """The orientation at the start: the one that turns the velocities of the first steps to those observed."""
    from scipy.spatial.transform import Rotation

    ordinary.start(episode.obs[0], np.array([1.0, 0.0, 0.0, 0.0]))
    ours = []
    for action in episode.actions[:n_steps]:
        ordinary.step(action)
        ours.append(ordinary.state[1].qvel[:3].copy())
    rotation, _ = Rotation.align_vectors(episode.obs[1 : n_steps + 1, 11:14], np.array(ours))
    return rotation.as_quat(scalar_first=True)


# --- Policies: of each environment the step in its episode, the observation, and a seed of the episode -> actions

Policy = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
KINDS: dict[str, Callable[[int, np.ndarray, int, int], Any]] = {
    "uniform": lambda t, obs, dim, seed: np.random.default_rng([seed, t]).uniform(-1, 1, dim),
    "small": lambda t, obs, dim, seed: np.random.default_rng([seed, t]).uniform(-0.1, 0.1, dim),
    "zero": lambda t, obs, dim, seed: np.zeros(dim),
    "lower bound": lambda t, obs, dim, seed: np.full(dim, -1.0),
    "upper bound": lambda t, obs, dim, seed: np.full(dim, 1.0),
    "bounds, 5 steps each": lambda t, obs, dim, seed: np.random.default_rng([seed, t // 5]).choice([-1.0, 1.0], dim),
    "bounds, 20 steps each": lambda t, obs, dim, seed: np.random.default_rng([seed, t // 20]).choice([-1.0, 1.0], dim),
    "sinusoid": lambda t, obs, dim, seed: np.sin((0.1 + 0.05 * np.arange(dim)) * t + np.arange(dim)),
    "linear": lambda t, obs, dim, seed: np.tanh(
        np.random.default_rng(0).standard_normal((dim, len(obs))) @ np.clip(obs, -10, 10) / np.sqrt(len(obs))
    ),
}


def fixed(kind: str, space: spaces.Box) -> Policy:
    """One of the kinds, scaled to the bounds."""

    def policy(steps: np.ndarray, obs: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        unit = np.stack([KINDS[kind](t, row, space.shape[0], seed) for t, row, seed in zip(steps, obs, seeds, strict=True)])
        # Representable in single precision, which gymnasium's actions have
        return (space.low + (unit + 1) / 2 * (space.high - space.low)).astype(np.float32).astype(np.float64)

    return policy


def trained(env_id: str, seed: int) -> Policy:
    """PPO from EnvPool, its mean action."""
    import torch as th
    from stable_baselines3 import PPO

    th.set_num_threads(1)
    env = make_pool(env_id, 16, seed)
    kwargs: dict[str, Any] = dict(n_steps=256, batch_size=512, n_epochs=5, learning_rate=1e-3, device="cpu", seed=seed)
    model = PPO("MlpPolicy", env, **kwargs).learn(TRAINING_STEPS)
    env.close()

    return lambda steps, obs, seeds: model.predict(obs, deterministic=True)[0]


# --- Steps


class Episode(NamedTuple):
    """What EnvPool did from one reset to the next. Observations are one more than steps."""

    obs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    ends: np.ndarray


def end_of(done: bool, truncated: bool) -> str:
    return ("truncated" if truncated else "terminated") if done else ""


def record(ordinary: Ordinary, seed: int) -> list[Episode]:
    """Step EnvPool with actions of each kind."""
    policies = [fixed(kind, ordinary.action_space) for kind in KINDS]
    env, seeds = make_pool(ordinary.env_id, len(policies), seed), seed + np.arange(len(policies))
    obs = env.reset()
    observations = [[row] for row in obs]
    steps: list[list[tuple]] = [[] for _ in policies]
    episodes = []
    for t in range(N_STEPS):
        actions = np.concatenate([policy(np.array([t]), obs[[i]], seeds[[i]]) for i, policy in enumerate(policies)])
        obs, rewards, dones, infos = env.step(actions)
        for i, info in enumerate(infos):
            steps[i].append((actions[i], float(rewards[i]), end_of(dones[i], info["TimeLimit.truncated"])))
            observations[i].append(info["terminal_observation"] if dones[i] else obs[i])
            if dones[i] or t == N_STEPS - 1:
                columns = zip(*steps[i], strict=True)
                episodes.append(Episode(np.array(observations[i]), *map(np.array, columns)))
                observations[i], steps[i] = [obs[i]], []
    env.close()
    return episodes


def difference(ordinary: Any, pool: Any) -> Any:
    return np.abs(np.subtract(ordinary, pool)) / np.maximum(1, np.abs(ordinary))


def compare_steps(ordinary: Ordinary, seed: int) -> dict[str, Any]:
    episodes = record(ordinary, seed)
    observations: list[np.ndarray] = []
    rewards: list[float] = []
    free = dict.fromkeys(HORIZONS, 0.0)
    other_ends = rewarded = 0
    for episode in episodes:
        orientation = orientation_of(ordinary, episode) if ordinary.restore is fish else None
        ordinary.start(episode.obs[0], orientation)
        for t, action in enumerate(episode.actions):
            obs, reward, end = ordinary.step(action)
            observations.append(difference(obs, episode.obs[t + 1]))
            rewards.append(difference(reward, episode.rewards[t]))
            other_ends += end != episode.ends[t]
            rewarded += reward != 0
            ordinary.correct(episode.obs[t + 1])
        ordinary.start(episode.obs[0], orientation)
        for t, action in enumerate(episode.actions[: max(HORIZONS)]):
            obs, *_ = ordinary.step(action)
            for horizon in free:
                if t < horizon:
                    free[horizon] = max(free[horizon], float(difference(obs, episode.obs[t + 1]).max()))
    per_step = np.max(observations, axis=1)
    return dict(
        n_steps=len(rewards),
        n_episodes=len(episodes),
        longest_episode=max(len(episode.actions) for episode in episodes),
        n_rewarded=rewarded,
        n_other_ends=other_ends,
        observation=dict(
            max=float(per_step.max()),
            median=float(np.median(per_step)),
            share_above_tolerance=float(np.mean(per_step > TOLERANCE)),
            max_per_coordinate=np.max(observations, axis=0).tolist(),
        ),
        reward=dict(max=float(np.max(rewards)), share_above_tolerance=float(np.mean(np.array(rewards) > TOLERANCE))),
        free={str(horizon): value for horizon, value in free.items()},
    )


# --- Distributions


def p_value(ordinary: np.ndarray, pool: np.ndarray) -> float:
    """That two samples are of the same distribution. Rounded: what is always the same may differ in the last bits."""
    from scipy.stats import ks_2samp

    return float(ks_2samp(np.round(ordinary, 9), np.round(pool, 9)).pvalue)


def compare_resets(ordinary: Ordinary, seed: int) -> dict[str, Any]:
    n_envs = 50
    env = make_pool(ordinary.env_id, n_envs, seed)
    samples = dict(
        ordinary=np.stack([ordinary.reset(seed if i == 0 else None) for i in range(N_RESETS)]),
        envpool=np.concatenate([env.reset() for _ in range(N_RESETS // n_envs)]),
    )
    return dict(
        n=N_RESETS,
        p=[p_value(*columns) for columns in zip(*(sample.T for sample in samples.values()), strict=True)],
        **{name: dict(mean=sample.mean(0).tolist(), std=sample.std(0).tolist()) for name, sample in samples.items()},
    )


def returns_of(env: Any, policy: Policy, seed: int) -> np.ndarray:
    """Of the first episodes of each environment, the same number: the first to end would be short ones."""
    n_envs = env.num_envs
    obs, steps = env.reset(), np.zeros(n_envs, int)
    returns: list[list[float]] = [[] for _ in range(n_envs)]
    while min(map(len, returns)) < N_EPISODES // n_envs:
        seeds = seed + np.arange(n_envs) + n_envs * np.array([len(done) for done in returns])
        obs, _, dones, infos = env.step(policy(steps, obs, seeds))
        steps = np.where(dones, 0, steps + 1)
        for i in np.flatnonzero(dones):
            returns[i].append(infos[i]["episode"]["r"])
    env.close()
    return np.array([done[: N_EPISODES // n_envs] for done in returns]).ravel()


def compare_returns(env_id: str, space: spaces.Box, seed: int, n_envs: int = 20) -> dict[str, Any]:
    """Of three policies, or until one of them is enough to tell the simulators from each other."""
    from stable_baselines3.common.env_util import make_vec_env

    from sb3_flow.envs.envpool import make_ordinary

    policies = {"trained": trained(env_id, seed), **{kind: fixed(kind, space) for kind in ("uniform", "sinusoid")}}
    result: dict[str, Any] = {}
    for name, policy in policies.items():
        ordinary = make_vec_env(lambda: make_ordinary(env_id), n_envs, seed=seed)
        samples = dict(
            ordinary=returns_of(ordinary, policy, seed),
            envpool=returns_of(make_pool(env_id, n_envs, seed), policy, seed + 1000),
        )
        result[name] = dict(
            n=N_EPISODES,
            p=p_value(*samples.values()),
            # Mean, and half of its 95 % interval
            **{key: [float(x.mean()), float(1.96 * x.std(ddof=1) / np.sqrt(len(x)))] for key, x in samples.items()},
        )
        if other_returns(result):
            break
    return result


def other_returns(returns: dict[str, Any]) -> bool:
    return min(policy["p"] for policy in returns.values()) < SIGNIFICANCE / (N_POLICIES * len(RESTORE))


# --- All of them


def compare(env_id: str, steps_only: bool, seed: int = 0) -> dict[str, Any]:
    ordinary, env = Ordinary(env_id), make_pool(env_id, 1, seed)
    result: dict[str, Any] = dict(
        env=env_id,
        equal_spaces=env.observation_space.shape == ordinary.env.observation_space.shape
        and env.action_space == ordinary.action_space,
        steps=compare_steps(ordinary, seed),
    )
    if not steps_only:
        result["resets"] = compare_resets(ordinary, seed)
        if disagreements(result):
            result["returns"] = compare_returns(env_id, ordinary.action_space, seed)
    source = provenance()
    source["versions"] |= {name: version(name) for name in ("envpool", "dm_control", "shimmy")}
    return result | source


def disagreements(result: dict[str, Any]) -> list[str]:
    """What is not the same after one step."""
    return [key for key in ("observation", "reward") if result["steps"][key]["share_above_tolerance"] > SHARE]


def differences(results: dict[str, dict], of_same_mujoco: dict[str, dict]) -> dict[str, list[str]]:
    """
    :param results: of all tasks
    :param of_same_mujoco: with EnvPool's version of MuJoCo
    :return: what each differs in, nothing if it is the same
    """
    n_coordinates = sum(len(result["resets"]["p"]) for result in results.values())
    found: dict[str, list[str]] = {}
    for env_id, result in results.items():
        differs = {
            "spaces": not result["equal_spaces"],
            "ends of episodes": result["steps"]["n_other_ends"] > 0,
            "resets": min(result["resets"]["p"]) < SIGNIFICANCE / n_coordinates,
            **dict.fromkeys(disagreements(of_same_mujoco[env_id]), True),
        }
        found[env_id] = [name for name, is_so in differs.items() if is_so]
        if not found[env_id] and disagreements(result) and other_returns(result["returns"]):
            found[env_id] = ["version of MuJoCo"]
    return found


HEADER = ("", "EnvPool", "one step", "100 steps", "reward", "one step, MuJoCo 3.6", "resets, p", "returns, p",
          "trained in EnvPool: return there", "in the ordinary one", "")  # fmt: skip


def to_text(interval: list[float]) -> str:
    return "{:.4g} ± {:.2g}".format(*interval)


def rows(results: dict[str, dict], of_same_mujoco: dict[str, dict]) -> list[tuple[str, ...]]:
    from sb3_flow.envs.envpool import TASKS

    differs = differences(results, of_same_mujoco)
    table = []
    for env_id, result in results.items():
        steps, returns = result["steps"], result.get("returns")
        table.append((
            env_id,
            TASKS[env_id],
            f"{steps['observation']['max']:.0e}",
            f"{steps['free']['100']:.0e}",
            f"{steps['reward']['max']:.0e}",
            f"{of_same_mujoco[env_id]['steps']['observation']['max']:.0e}",
            f"{min(result['resets']['p']):.1g} of {len(result['resets']['p'])}",
            "" if returns is None else f"{min(policy['p'] for policy in returns.values()):.1g} of {len(returns)}",
            *("" if returns is None else to_text(returns["trained"][key]) for key in ("envpool", "ordinary")),
            f"differs: {', '.join(differs[env_id])}" if differs[env_id] else "same",
        ))  # fmt: skip
    return table


def load(folder: Path) -> dict[str, dict]:
    found = (json.loads(file.read_text()) for file in sorted(folder.glob("*.json")))
    return {result["env"]: result for result in sorted(found, key=lambda result: list(RESTORE).index(result["env"]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=RESTORE, default=list(RESTORE), metavar="TASK", help=", ".join(RESTORE))
    parser.add_argument("--steps-only", action="store_true", help="no distributions, and no table")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore", category=UserWarning)
    for env_id in [] if args.table_only else args.tasks:
        result = compare(env_id, args.steps_only)
        write_result(args.results / f"{env_id.split('/')[-1]}.json", result)
        print(f"{env_id}: {result['steps']['observation']['max']:.1e} in one step", flush=True)
    if args.steps_only:
        return
    write_table(args.results / "tasks.csv", HEADER, rows(load(args.results), load(SAME_MUJOCO)))


if __name__ == "__main__":
    main()
