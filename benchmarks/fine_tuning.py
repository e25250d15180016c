"""
A clone that learns from rewards: `python benchmarks/fine_tuning.py`

Demonstrations are cloned with `pretrain()`, and the clone is fine-tuned with FPO and with DPPO (their presets.FINE_TUNE),
beside FPO and SB3's PPO from nothing, with the same environments, rollouts, discount and number of steps. Each run is a
process of its own with one thread, evaluated every 20,480 steps (20 episodes from zero noise, of PPO of the mean action, and
20 sampled). It leaves a JSON file in benchmarks/results/fine_tuning; runs whose file is there with today's settings are not
repeated, so that an interrupted benchmark goes on where it stopped, and can be done in parts (--tasks, --arms, --seeds,
--jobs).

Tasks:
  HalfCheetah   HalfCheetah-v5. 50 sampled episodes of a mediocre policy: FPO as its class comes, seed 1000, 163,840 steps
  pointmaze     ogbench/pointmaze-medium-navigate-singletask-v0, whose reward only tells whether the goal is reached.
                Episodes of an expert that goes the shortest way, with much noise

The seeds of the tuning were 1000 and more.
"""

import inspect
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from runs import ROOT, class_defaults, do_runs, has_result, provenance, write_result, write_table

RESULTS = ROOT / "benchmarks" / "results" / "fine_tuning"
FIGURE = ROOT / "docs" / "_static" / "fine_tuning.png"
STEPS = 307_200
EVAL_FREQ, N_EVAL_EPISODES = 20_480, 20
PRETRAIN_STEPS = 20_000
#: Environment, number of environments, and what all arms have of it
TASKS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "HalfCheetah": ("HalfCheetah-v5", 1, dict(n_steps=2048)),
    "pointmaze": ("ogbench/pointmaze-medium-navigate-singletask-v0", 8, dict(n_steps=256, gamma=0.995)),
}
ARMS = ("FPO, fine-tuned", "DPPO, fine-tuned", "FPO", "PPO")
SEEDS = (0, 1, 2)
#: Number of the episodes, and whose they are: steps of a policy, or noise of an expert
DEMONSTRATIONS: dict[str, dict[str, Any]] = {
    "HalfCheetah": dict(n_episodes=50, steps=163_840),
    "pointmaze": dict(n_episodes=20, noise=1.0),
}


def result_file(arm: str, task: str, seed: int) -> Path:
    return RESULTS / f"{task}-{arm.replace(', ', '_')}-seed{seed}.json"


def algorithm(arm: str) -> Any:
    from stable_baselines3 import PPO

    from sb3_flow import DPPO, FPO

    return dict(FPO=FPO, DPPO=DPPO, PPO=PPO)[arm.split(",")[0]]


def arguments(arm: str, task: str) -> dict[str, Any]:
    """Of the constructor."""
    from sb3_flow.dppo import presets as of_dppo
    from sb3_flow.fpo import presets as of_fpo

    if "fine-tuned" not in arm:
        return TASKS[task][2]
    return TASKS[task][2] | (of_dppo if arm.startswith("DPPO") else of_fpo).FINE_TUNE


def settings(arm: str, task: str) -> dict[str, Any]:
    """All that a result depends on."""
    env_id, n_envs, _ = TASKS[task]
    of_all = dict(env=env_id, n_envs=n_envs, steps=STEPS, eval_freq=EVAL_FREQ, n_eval_episodes=N_EVAL_EPISODES)
    if "fine-tuned" in arm:
        of_pretrain = inspect.signature(algorithm(arm).pretrain).parameters.values()
        options = {
            parameter.name: str(parameter.default) for parameter in of_pretrain if parameter.default is not parameter.empty
        }
        of_all |= dict(pretrain_steps=PRETRAIN_STEPS, demonstrations=DEMONSTRATIONS[task], pretrain=options)
    return of_all | dict(arguments=arguments_as_text(arm, task), defaults=class_defaults(algorithm(arm)))


def arguments_as_text(arm: str, task: str) -> dict[str, str]:
    return {name: str(value) for name, value in arguments(arm, task).items()}


def is_done(arm: str, task: str, seed: int) -> bool:
    """Whether there is a result, of today's settings."""
    return has_result(result_file(arm, task, seed), dict(settings=settings(arm, task)))


def demonstrations(task: str, logs: Path) -> Path:
    """The dataset of a task, recorded once."""
    of_task = DEMONSTRATIONS[task]
    file = logs / f"{task}-{'-'.join(str(value) for value in of_task.values())}.npz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        # (another run may record the same)
        unfinished = logs / f"{os.getpid()}-{file.name}"
        np.savez(unfinished, **(record_cheetah if task == "HalfCheetah" else record_pointmaze)(**of_task))
        unfinished.replace(file)
    return file


def record(env: Any, act: Any, n_episodes: int) -> dict[str, Any]:
    """Episodes of a function from an observation to an action, as a dataset."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("observations", "actions", "rewards", "next_observations", "terminated", "truncated")
    }
    for episode in range(n_episodes):
        obs, _ = env.reset(seed=20_000 + episode)
        ended = False
        while not ended:
            action = act(obs)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            row = (obs, action, reward, next_obs, terminated, truncated)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(np.float32(value))
            obs, ended = next_obs, terminated or truncated
    return {name: np.array(column) for name, column in columns.items()}


def record_cheetah(n_episodes: int, steps: int) -> dict[str, Any]:
    import gymnasium as gym

    from sb3_flow import FPO

    model = FPO("MlpPolicy", "HalfCheetah-v5", seed=1000).learn(steps)
    return record(gym.make("HalfCheetah-v5"), lambda obs: model.predict(obs, deterministic=False)[0], n_episodes)


def record_pointmaze(n_episodes: int, noise: float) -> dict[str, Any]:
    import gymnasium as gym

    import sb3_flow  # noqa: F401 (registers the environments)

    env = gym.make(TASKS["pointmaze"][0])
    unwrapped: Any = env.unwrapped
    generator = np.random.default_rng(0)

    def act(obs: np.ndarray) -> np.ndarray:
        position = unwrapped.get_xy()
        direction = unwrapped.get_oracle_subgoal(position, unwrapped.cur_goal_xy)[0] - position
        direction = direction / (np.linalg.norm(direction) + 1e-6)
        return np.clip(direction + generator.normal(0, noise, 2), -1, 1)

    return record(env, act, n_episodes)


def run(arm: str, task: str, seed: int, logs: Path) -> None:
    """One run, in this process."""
    import torch as th
    from stable_baselines3.common.env_util import make_vec_env

    th.set_num_threads(1)
    source = provenance()
    env_id, n_envs, _ = TASKS[task]
    model = algorithm(arm)("MlpPolicy", make_vec_env(env_id, n_envs, seed=seed), seed=seed, **arguments(arm, task))
    if "fine-tuned" in arm:
        model.pretrain(str(demonstrations(task, logs)), PRETRAIN_STEPS)
    eval_env = make_vec_env(env_id, 10, seed=10_000 + seed)
    curve = [evaluate(model, eval_env, 0)]
    while model.num_timesteps < STEPS:
        model.learn(EVAL_FREQ, reset_num_timesteps=False)
        curve.append(evaluate(model, eval_env, model.num_timesteps))
        print(curve[-1], flush=True)
    command = f'python benchmarks/fine_tuning.py --arms "{arm}" --tasks {task} --seeds {seed}'
    result = dict(arm=arm, task=task, seed=seed, curve=curve, settings=settings(arm, task), command=command, **source)
    write_result(result_file(arm, task, seed), result)


def evaluate(model: Any, env: Any, timesteps: int) -> dict[str, Any]:
    """Mean return, and share of the episodes that succeed, from zero noise and sampled."""
    from stable_baselines3.common.evaluation import evaluate_policy

    row: dict[str, Any] = dict(timesteps=timesteps)
    for mode, deterministic in (("deterministic", True), ("sampled", False)):
        successes: list[bool] = []

        def note(variables: dict[str, Any], _: Any, successes: list[bool] = successes) -> None:
            if variables["done"] and "is_success" in variables["info"]:
                successes.append(bool(variables["info"]["is_success"]))

        returns, _ = evaluate_policy(model, env, N_EVAL_EPISODES, deterministic, callback=note, return_episode_rewards=True)
        row[mode] = float(np.mean(returns))
        if successes:
            row[f"{mode}_success"] = float(np.mean(successes))
    return row


def load(arm: str, task: str) -> list[dict[str, Any]]:
    """Results of today's settings."""
    files = sorted(RESULTS.glob(result_file(arm, task, 0).name.replace("seed0", "seed*")))
    results = [json.loads(file.read_text()) for file in files]
    return [result for result in results if is_done(arm, task, result["seed"])]


def print_table() -> None:
    """One row a task and arm: the clone, the lowest point on the way, and the end."""
    rows = []
    for task in TASKS:
        for arm in ARMS:
            results = load(arm, task)
            if not results:
                continue
            cells = []
            for mode in ("deterministic", "sampled"):
                key = f"{mode}_success" if f"{mode}_success" in results[0]["curve"][0] else mode
                scores = [[row[key] for row in result["curve"]] for result in results]
                digits = 2 if key != mode else 0
                for pick in (lambda curve: curve[0], min, lambda curve: curve[-1]):
                    cells.append("; ".join(f"{pick(curve):.{digits}f}" for curve in scores))
            rows.append([task, arm, ", ".join(str(result["seed"]) for result in results), *cells])
    of_mode = ["Start", "Lowest", "End"]
    header = ["Task", "Arm", "Seeds", *of_mode, *(f"{name}, sampled" for name in of_mode)]
    if rows:
        write_table(RESULTS.with_suffix(".csv"), header, rows)


def draw() -> None:
    """Learning curves, mean and range over seeds, from the score of the clone on."""
    from sb3_flow.plotting import BLUE, GREEN, GREY, ORANGE, new_figure

    colors = dict(zip(ARMS, (BLUE, GREEN, ORANGE, GREY), strict=True))
    figure = new_figure(figsize=(9.0, 3.4))
    for axis, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        key = "deterministic"
        for arm in ARMS:
            results = load(arm, task)
            if not results:
                continue
            key = "deterministic_success" if "deterministic_success" in results[0]["curve"][0] else "deterministic"
            steps = np.array([row["timesteps"] for row in results[0]["curve"]]) / 1000
            scores = np.array([[row[key] for row in result["curve"]] for result in results])
            axis.plot(steps, scores.mean(axis=0), color=colors[arm], label=arm)
            axis.fill_between(steps, scores.min(axis=0), scores.max(axis=0), color=colors[arm], alpha=0.2, linewidth=0)
            if "fine-tuned" in arm:
                axis.axhline(scores[:, 0].mean(), color=colors[arm], linestyle=":")
        axis.set(title=task, xlabel="thousand steps", ylabel="success" if "success" in key else "return")
    figure.axes[0].legend(frameon=False)
    figure.savefig(FIGURE)
    print(FIGURE)


def main() -> None:
    args = do_runs(__file__, __doc__, ("arms", ARMS), TASKS, SEEDS, run, result_file, is_done, flags=["--figures"])
    print_table()
    if args.figures:
        draw()


if __name__ == "__main__":
    main()
