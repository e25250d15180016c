"""
FPO against SB3's PPO as their classes come, with no argument but the environment: `python benchmarks/out_of_the_box.py`

Each run is `FPO("MlpPolicy", task, seed=seed).learn(300_000)`, or the same with PPO, in a process of its own with one thread,
then 20 episodes from zero noise (PPO: of the mean action) and 20 stochastic ones. It leaves a JSON file in
benchmarks/results/out_of_the_box; runs whose file is there are not repeated, so that an interrupted benchmark goes on where it
stopped, and can be done in parts (--tasks, --algos, --seeds, --jobs). Those of other defaults are out of date.

The scores of random actions, from which the ratios of the table are measured, are of 100 episodes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from runs import N_EVAL_EPISODES, ROOT, class_defaults, do_runs, has_result, provenance, write_result, write_table

RESULTS = ROOT / "benchmarks" / "results" / "out_of_the_box"
TASKS = ("Pendulum-v1", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "LunarLanderContinuous-v3", "Swimmer-v5")
ALGOS = ("fpo", "ppo")
STEPS = 300_000
N_RANDOM_EPISODES = 100
BIN = 10_000


def algorithm(algo: str) -> Any:
    from stable_baselines3 import PPO

    from sb3_flow import FPO

    return {"fpo": FPO, "ppo": PPO}[algo]


def result_file(algo: str, task: str, seed: int) -> Path:
    return RESULTS / f"{task}-{algo}-seed{seed}.json"


def is_done(algo: str, task: str, seed: int) -> bool:
    return has_result(result_file(algo, task, seed), dict(defaults=class_defaults(algorithm(algo))))


def run(algo: str, task: str, seed: int, logs: Path) -> None:
    """One run, in this process."""
    import torch as th
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    th.set_num_threads(1)
    source = provenance()
    model = algorithm(algo)("MlpPolicy", task, seed=seed)
    history: list[tuple[int, float]] = []

    def note_episodes(variables: dict[str, Any], _: Any) -> bool:
        ended = [info["episode"]["r"] for info in variables["infos"] if "episode" in info]
        history.extend((model.num_timesteps, episode_return) for episode_return in ended)
        return True

    model.learn(STEPS, callback=note_episodes)
    env = make_vec_env(task, seed=10_000 + seed)
    returns: dict[str, Any] = {}
    for name, deterministic in (("deterministic", True), ("stochastic", False)):
        returns[name], _ = evaluate_policy(model, env, N_EVAL_EPISODES, deterministic, return_episode_rewards=True)
    steps, episode_returns = np.array(history).T
    bins = steps // BIN
    result = dict(
        algo=algo,
        env=task,
        steps=STEPS,
        seed=seed,
        **returns,
        training_curve=[[int(i * BIN + BIN // 2), float(episode_returns[bins == i].mean())] for i in np.unique(bins)],
        defaults=class_defaults(algorithm(algo)),
        command=f"python benchmarks/out_of_the_box.py --tasks {task} --algos {algo} --seeds {seed}",
        **source,
    )
    write_result(result_file(algo, task, seed), result)


def random_returns(task: str) -> list[float]:
    """Returns of random actions, measured once."""
    import gymnasium as gym

    file = RESULTS / f"{task}-random.json"
    if not file.exists():
        env = gym.make(task)
        env.action_space.seed(0)
        returns = []
        for episode in range(N_RANDOM_EPISODES):
            env.reset(seed=episode)
            total, ended = 0.0, False
            while not ended:
                _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
                total, ended = total + float(reward), terminated or truncated
            returns.append(total)
        write_result(file, dict(env=task, returns=returns, **provenance()))
    return json.loads(file.read_text())["returns"]


def print_table() -> None:
    """One row a task, and the mean of the ratios, from the score of random actions."""

    def describe(returns: np.ndarray) -> str:
        return f"{returns.mean():.0f} ± {returns.std():.0f}"

    rows, ratios = [], []
    for task in TASKS:
        runs: dict[str, dict[int, dict[str, Any]]] = {algo: {} for algo in ALGOS}
        for algo, of_algo in runs.items():
            for file in RESULTS.glob(f"{task}-{algo}-seed*.json"):
                run = json.loads(file.read_text())
                if is_done(algo, task, run["seed"]):
                    of_algo[run["seed"]] = run
        seeds = sorted(runs["fpo"].keys() & runs["ppo"].keys())
        if not seeds:
            continue
        random = float(np.mean(random_returns(task)))
        cells, of_task = [], []
        for mode in ("deterministic", "stochastic"):
            fpo, ppo = (np.array([np.mean(runs[algo][seed][mode]) for seed in seeds]) for algo in ALGOS)
            of_task.append((fpo.mean() - random) / (ppo.mean() - random))
            cells += [describe(fpo), describe(ppo), f"{of_task[-1]:.2f}"]
        ratios.append(of_task)
        rows.append([task, ", ".join(map(str, seeds)), f"{random:.0f}", *cells])
    if not rows:
        return
    means = [f"{mean:.2f}" for mean in np.mean(ratios, axis=0)]
    rows.append(["Mean", "", "", "", "", means[0], "", "", means[1]])
    header = ["Task", "Seeds", "Random", "FPO", "PPO", "Ratio", "FPO, sampled", "PPO, sampled", "Ratio, sampled"]
    write_table(RESULTS.with_suffix(".csv"), header, rows)


def main() -> None:
    do_runs(__file__, __doc__, ("algos", ALGOS), TASKS, (0, 1, 2), run, result_file, is_done)
    print_table()


if __name__ == "__main__":
    main()
