"""
Does a policy keep equally good actions? FPO, and SB3's PPO beside it: `python benchmarks/modes.py`

Each run is one `sb3-flow train` in a process of its own with one thread, then episodes and action samples of the policy. It
leaves a JSON file in benchmarks/results/modes; runs whose file is there with today's settings are not repeated, so
that an interrupted benchmark goes on where it stopped, and can be done in parts (--tasks, --algos, --seeds, --jobs). The
table is made of these files (`--table-only` does nothing else), `--figures` draws the policies of the first of the seeds.

Tasks:
  two-peaks                      shares of 10,000 samples of the action at either peak
  multi-goal, multi-goal-8       shares of 2,000 sampled episodes that reach each goal, and returns (of 25 episodes to each of
                                 eight goals, the best mean would be that of chance)
  two_walls, three_goals, ...    layouts of GridWorld: episodes from each of its cells, from zero noise (PPO: of the mean
                                 action) and sampled; in the saddle row of two_walls, 10,000 samples of the action in each cell

Algorithms:
  fpo   hyperparams/fpo.yml
  ppo   SB3's PPO with the environments, rollouts, minibatches, steps and discount of fpo.yml, its own number of epochs (10),
        clip range (0.2) and networks (2×64), and a learning rate that is linear from 1e-3

The seeds of the tuning were 1000 and more.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from runs import ROOT, class_defaults, do_runs, has_result, train_and_evaluate, write_result, write_table

RESULTS = ROOT / "benchmarks" / "results" / "modes"
FIGURES = ROOT / "docs" / "_static"
LAYOUTS = ("two_walls", "three_goals", "tree_in_the_middle", "two_slits", "c_shape")
N_GOALS = {"multi-goal": 4, "multi-goal-8": 8}
TASKS = {
    "two-peaks": "sb3_flow/TwoPeaks-v0",
    "multi-goal": "sb3_flow/MultiGoal-v0",
    "multi-goal-8": "sb3_flow/MultiGoal-8-v0",
    **{layout: f"sb3_flow/GridWorld-{layout}-v0" for layout in LAYOUTS},
}
ALGOS = ("fpo", "ppo")
N_EPISODES = 2_000


def hyperparameters(algo: str, task: str) -> dict[str, Any]:
    """The block of hyperparameters, in rl-zoo3's format."""
    from sb3_flow.zoo import default_conf_file

    block = yaml.safe_load(Path(default_conf_file("fpo")).read_text())[TASKS[task]]
    if algo == "fpo":
        return block
    kept = ("n_envs", "n_timesteps", "policy", "n_steps", "batch_size", "gamma", "gae_lambda")
    return {key: block[key] for key in kept if key in block} | {"learning_rate": "lin_1e-3"}


def result_file(algo: str, task: str, seed: int) -> Path:
    return RESULTS / f"{task}-{algo}-seed{seed}.json"


def settings(algo: str, task: str) -> dict[str, Any]:
    """All that a result depends on."""
    from stable_baselines3 import PPO

    from sb3_flow import FPO

    return dict(hyperparameters=hyperparameters(algo, task), defaults=class_defaults(dict(fpo=FPO, ppo=PPO)[algo]))


def is_done(algo: str, task: str, seed: int) -> bool:
    """Whether there is a result, of today's settings."""
    return has_result(result_file(algo, task, seed), settings(algo, task))


def load(algo: str, task: str, seed: int, logs: Path) -> Any:
    from sb3_flow.zoo import register
    from sb3_flow.zoo.evaluate import load_run

    register()
    return load_run(algo, TASKS[task], str(logs / result_file(algo, task, seed).stem), seed=20_000 + seed)[0]


def modes_of_two_peaks(model: Any) -> dict[str, Any]:
    from sb3_flow.envs.two_peaks import PEAK, WIDTH, peaks

    actions = model.predict(np.zeros((10_000, 1), dtype=np.float32), deterministic=False)[0][:, 0]
    shares = [float((np.abs(actions - peak) < 2 * WIDTH).mean()) for peak in (-PEAK, PEAK)]
    return dict(shares=shares, mean_return=float(peaks(actions).mean()))


def modes_of_multi_goal(model: Any, n_goals: int) -> dict[str, Any]:
    from sb3_flow.plotting.multi_goal import goal_statistics, run_episodes

    return goal_statistics(run_episodes(model, n_goals, N_EPISODES, seed=10_000), n_goals)


def modes_of_gridworld(model: Any, layout: str) -> dict[str, Any]:
    from sb3_flow.envs.gridworld import FREE, GOAL, make_layout
    from sb3_flow.plotting.gridworld import multimodality, run_episodes, saddle_line

    cells = make_layout(layout)
    modes: dict[str, Any] = {}
    for name, deterministic in (("deterministic", True), ("stochastic", False)):
        episodes = run_episodes(model, np.argwhere(cells == FREE)[:, ::-1], layout, deterministic)
        ends = np.array([positions[-1] for positions in episodes])
        modes[f"{name}_success_rate"] = float((cells[ends[:, 1], ends[:, 0]] == GOAL).mean())
        modes[f"{name}_mean_length"] = float(np.mean([len(positions) - 1 for positions in episodes]))
    if layout == "two_walls":
        modes |= dict(saddle_row=saddle_line(model, n_samples=10_000).tolist(), saddle=multimodality(model))
    return modes


def run(algo: str, task: str, seed: int, logs: Path) -> None:
    """One run, in this process."""
    block = hyperparameters(algo, task)
    file = result_file(algo, task, seed)
    steps = int(float(block["n_timesteps"]))
    result = train_and_evaluate(algo, TASKS[task], steps, seed, block, logs / file.stem, 20, ["--eval-freq", "-1"])
    model = load(algo, task, seed, logs)
    if task == "two-peaks":
        modes = modes_of_two_peaks(model)
    elif task in N_GOALS:
        modes = modes_of_multi_goal(model, N_GOALS[task])
    else:
        modes = modes_of_gridworld(model, task)
    command = f"python benchmarks/modes.py --tasks {task} --algos {algo} --seeds {seed}"
    write_result(file, dict(algo=algo, task=task, **result | settings(algo, task), modes=modes, command=command))


#: What the table has of a run, and with how many digits
COLUMNS = {
    "Kept": 0,
    "Smallest share, %": 0,
    "Return": 2,
    "Best goal's return": 2,
    "Success from zero noise, %": 1,
    "Success, sampled, %": 1,
}


def describe(task: str, modes: dict[str, Any]) -> dict[str, float]:
    """How evenly the modes of a run are shared, and how good the policy is: what there is of ``COLUMNS``."""
    kept, smallest, score, best, deterministic, stochastic = COLUMNS
    if task == "two-peaks":
        shares = np.array(modes["shares"])
        return {kept: (shares >= 0.2).sum(), smallest: 100 * shares.min(), score: modes["mean_return"]}
    if task in N_GOALS:
        # (without a goal that is reached there is no best one)
        of_goals = {} if modes["best_goal_return"] is None else {best: modes["best_goal_return"]}
        of_goals |= {kept: modes["n_goals_kept"], smallest: 100 * min(modes["shares"])}
        return of_goals | {score: modes["mean_return"]}
    row = {
        deterministic: 100 * modes["deterministic_success_rate"],
        stochastic: 100 * modes["stochastic_success_rate"],
    }
    if "saddle_row" in modes:
        # Of each cell, the smaller of the two shares
        smaller = np.array(modes["saddle_row"]).min(axis=1)
        row |= {kept: (smaller >= 0.3).sum(), smallest: 100 * smaller.min()}
    return row


def print_table() -> None:
    """One row for each task and algorithm, with ranges over seeds."""
    rows = []
    for task in TASKS:
        for algo in ALGOS:
            files = sorted(RESULTS.glob(f"{task}-{algo}-seed*.json"))
            results = [json.loads(file.read_text()) for file in files]
            results = [result for result in results if is_done(algo, task, result["seed"])]
            if not results:
                continue
            runs = [describe(task, result["modes"]) for result in results]
            cells = []
            for name, digits in COLUMNS.items():
                values = [f"{value:.{digits}f}" for value in sorted(run[name] for run in runs if name in run)]
                cells.append(" to ".join(dict.fromkeys(values[:1] + values[-1:])))
            seeds = ", ".join(str(result["seed"]) for result in results)
            rows.append([task, algo.upper(), seeds, *cells])
    write_table(RESULTS.with_suffix(".csv"), ["Task", "Algorithm", "Seeds", *COLUMNS], rows)


def draw(seed: int, logs: Path) -> None:
    """The policies of one seed."""
    import torch as th

    from sb3_flow.plotting.gridworld import plot_gridworld
    from sb3_flow.plotting.multi_goal import plot_multi_goal

    def models(task: str) -> dict[str, Any]:
        return {algo.upper(): load(algo, task, seed, logs) for algo in ALGOS if result_file(algo, task, seed).exists()}

    th.manual_seed(0)
    print(*plot_gridworld(models("two_walls"), FIGURES / "saddle.png"), sep="\n")
    for task, n_goals in N_GOALS.items():
        print(plot_multi_goal(models(task), FIGURES / f"{task.replace('-', '_')}.png", n_goals))


def main() -> None:
    args = do_runs(__file__, __doc__, ("algos", ALGOS), TASKS, (0, 1, 2, 3, 4), run, result_file, is_done, flags=["--figures"])
    print_table()
    if args.figures:
        draw(args.seeds[0], args.logs)


if __name__ == "__main__":
    main()
